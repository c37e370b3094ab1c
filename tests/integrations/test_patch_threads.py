"""Threads that patch, unpatch and accelerate one model at the same time."""

import contextlib
import os
import sys
import threading
from typing import Any

import pytest
import torch
from lookalike_var import lookalike
from small_models import small_model

import variant
from variant.errors import UserError
from variant_kernels import patch
from variant_kernels.integrations import PatchError, base, claims, classes

LABELS = torch.tensor([1, 3])


def paint(model):
    return model.autoregressive_infer_cfg(2, LABELS, g_seed=5, cfg=2.0, top_k=10)[0]


def members(model):
    return [(type(module), dict(vars(module))) for module in model.modules()]


def is_same(before, after):
    """Whether every module has its class and the very objects that it had."""
    return all(
        kind is other and old.keys() == new.keys() and all(old[name] is new[name] for name in old)
        for (kind, old), (other, new) in zip(before, after, strict=True)
    )


def run_in_threads(work, count=8):
    """What each of the threads returned or raised."""
    begin, results = threading.Barrier(count, timeout=60), []

    def run(index):
        begin.wait()
        try:
            results.append(work(index))
        except Exception as error:
            results.append(error)

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "a deadlock"
    return results


@pytest.fixture
def model():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield lookalike(sides=(1, 2, 3), vocab=24, depth=2)
    sys.setswitchinterval(interval)


def test_of_threads_that_patch_one_model_one_has_it_and_the_others_an_error(model):
    tokens, before = paint(model), members(model)
    for _ in range(2):
        results = run_in_threads(lambda index: patch(model))
        (handle,) = (result for result in results if isinstance(result, base.Handle))
        errors = [str(result) for result in results if isinstance(result, PatchError)]
        assert len(errors) == 7
        assert all("is patched already, perhaps by another thread; use the" in e for e in errors)
        assert torch.equal(paint(model), tokens)
        assert handle.stats().kv_allocated_bytes > 0
        # Of unpatch every thread is right: a second call does nothing.
        assert run_in_threads(lambda index, own=handle: own.unpatch()) == [None] * 8
        assert is_same(before, members(model))


def test_accelerate_beside_a_patch_disturbs_neither(model):
    tokens, before, vae = paint(model), members(model), small_model().vae

    def work(index):
        if index % 2:
            return variant.accelerate(model, vae)
        with patch(model):
            return paint(model)

    for result in run_in_threads(work, 4):
        if isinstance(result, Exception):
            assert "is patched already" in str(result)
        elif isinstance(result, torch.Tensor):
            assert torch.equal(result, tokens)
        else:
            assert isinstance(result, variant.VARiant)
    assert is_same(before, members(model))


@pytest.mark.parametrize("begun", [0, 3, 11])
def test_a_generation_that_begins_while_the_model_is_unpatched_is_an_error(
    model, monkeypatch, begun
):
    tokens = paint(model)
    handle = patch(model)
    restored, results, restore = [], [], base._restore

    def restore_one(target):
        if len(restored) == begun:
            results.extend(run_in_threads(lambda index: paint(model), 1))
        restored.append(target)
        restore(target)

    monkeypatch.setattr(base, "_restore", restore_one)
    handle.unpatch()
    (result,) = results
    assert isinstance(result, PatchError)
    assert "another thread is unpatching the model; generate again" in str(result)
    assert not any(base.STATE in vars(module) for module in model.modules())
    assert torch.equal(paint(model), tokens)


def test_an_unpatch_that_is_refused_lets_generations_begin(model):
    tokens = paint(model)
    with patch(model) as handle:
        model.blocks[0].attn.forward = model.blocks[0].attn.forward
        with pytest.raises(PatchError, match="was replaced since patch"):
            handle.unpatch()
        assert torch.equal(paint(model), tokens)
        del model.blocks[0].attn.forward


def exit_code_of_fork(work):
    """Of a forked process: 0 if ``work`` returns True there."""
    child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(BaseException):
            code = 0 if work() else 1
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_forked_process_patches_while_a_thread_of_its_parent_did(monkeypatch):
    held, done, part = threading.Event(), threading.Event(), torch.nn.Identity()
    monkeypatch.setattr(claims, "PATIENCE", 1.0)

    def hold():
        with claims.one_thread("patch", [part]):
            held.set()
            done.wait(60)

    def claim():
        with claims.one_thread("patch", [part]):
            return True

    thread = threading.Thread(target=hold, daemon=True)
    thread.start()
    held.wait(60)
    code = exit_code_of_fork(claim)
    done.set()
    thread.join(60)
    assert code == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_within_a_patch_has_the_model_until_its_own_patch_ends(monkeypatch):
    part = torch.nn.Identity()
    monkeypatch.setattr(claims, "PATIENCE", 0.0)

    def claim(_=None):
        with claims.one_thread("patch", [part]):
            return True

    def work():
        (during,) = run_in_threads(claim, 1)
        stack.close()
        return isinstance(during, PatchError) and run_in_threads(claim, 1) == [True]

    with contextlib.ExitStack() as stack:
        stack.enter_context(claims.one_thread("patch", [part]))
        assert exit_code_of_fork(work) == 0
        assert isinstance(run_in_threads(claim, 1)[0], PatchError)  # the parent still has it


def test_a_thread_waits_for_its_own_model_alone_and_is_told_why(model, monkeypatch):
    """Models that share a block, or the VQ-VAE, wait for each other; others do not."""
    vae, other = small_model().vae, lookalike(sides=(1, 2, 3), vocab=24, depth=2)
    tokens, handle = paint(model), patch(other)
    ours = variant.accelerate(other, vae)
    sharing = lookalike(sides=(1, 2, 3), vocab=24, depth=2)
    sharing.blocks[1] = other.blocks[1]
    monkeypatch.setattr(claims, "PATIENCE", 0.01)
    refused, free = [], []

    def wait(*_):
        hook.remove()
        for work in (
            lambda index: patch(sharing),
            lambda index: handle.unpatch(),
            lambda index: patch(other),
            lambda index: variant.accelerate(other, vae),
            lambda index: variant.accelerate(model, vae),
            lambda index: ours.generate([1], seed=0),
        ):
            refused.extend(run_in_threads(work, 1))
        free.extend(run_in_threads(lambda index: variant.accelerate(model, small_model().vae), 1))
        with patch(model):
            free.append(paint(model))
        free.extend(run_in_threads(lambda index: patch(model).unpatch(), 1))

    hook = vae.decoder.register_forward_pre_hook(wait)
    variant.accelerate(other, vae)
    for result, (kind, op) in zip(
        refused,
        [(PatchError, "patch"), (PatchError, "unpatch"), (PatchError, "patch")]
        + [(UserError, "accelerate")] * 3,
        strict=True,
    ):
        assert type(result) is kind, result
        assert str(result).startswith(f"{op}: another thread has been patching, unpatching or comp")
    accelerated, painted, unpatched = free
    assert isinstance(accelerated, variant.VARiant)
    assert torch.equal(painted, tokens)
    assert unpatched is None
    handle.unpatch()
    patch(sharing).unpatch()
    ours.generate([1], seed=0)


def test_models_that_share_a_vae_are_accelerated_at_the_same_time(model):
    vae = small_model().vae
    models = [model, lookalike(sides=(1, 2, 3), vocab=24, depth=2)]
    expected = [variant.accelerate(m, vae).generate([1], seed=0).images for m in models]
    before = members(vae)
    results = run_in_threads(
        lambda index: (
            index % 2,
            variant.accelerate(models[index % 2], vae).generate([1], seed=0).images,
        ),
        4,
    )
    for index, images in results:
        assert torch.equal(images, expected[index])
    assert is_same(before, members(vae))


def test_a_model_can_be_walked_through_while_its_members_are_restored():
    """A thread that waits for a model lists its modules first."""
    part: Any = torch.nn.Linear(2, 2)
    part.cache, part.extra = None, 1
    kinds = []

    class Member:
        def __del__(self):
            kinds.append([type(module) for module in part.modules()])

    with base.kept_members(part):
        del part.cache
        part.extra, part.cache = Member(), Member()
    assert kinds == [[torch.nn.Linear]] * 2
    assert list(vars(part))[-2:] == ["cache", "extra"]
    assert (part.cache, part.extra) == (None, 1)


def test_one_class_is_made_for_a_patch_whichever_thread_makes_it(monkeypatch):
    made, make = [], classes._made_class

    def make_slowly(mixin, original):
        kind = make(mixin, original)
        made.append(kind)
        begin.wait()
        return kind

    class Part(torch.nn.Identity):
        pass

    begin = threading.Barrier(2, timeout=60)
    monkeypatch.setattr(classes, "_made_class", make_slowly)
    first, second = run_in_threads(lambda index: classes.patched_class(base.Patched, Part), 2)
    assert len(made) == 2
    assert first is second is classes.patched_class(base.Patched, Part)
