"""Threads that patch, unpatch and accelerate one model at the same time."""

import os
import sys
import threading

import pytest
import torch
from lookalike_var import lookalike
from small_models import small_model

import variant
from variant.errors import UserError
from variant_kernels import patch
from variant_kernels.integrations import PatchError, base

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


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_forked_process_patches_while_a_thread_of_its_parent_did():
    held, done = threading.Event(), threading.Event()

    def hold():
        with base.one_thread("patch"):
            held.set()
            done.wait(60)

    thread = threading.Thread(target=hold, daemon=True)
    thread.start()
    held.wait(60)
    child = os.fork()
    if child == 0:
        os._exit(0 if base._CHANGES.acquire(timeout=1) else 1)
    done.set()
    thread.join(60)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_thread_that_waits_for_ever_is_told_why(model, monkeypatch):
    vae, handle = small_model().vae, patch(lookalike(sides=(1, 2, 3), vocab=24, depth=2))
    ours = variant.accelerate(model, vae)
    monkeypatch.setattr(base, "PATIENCE", 0.01)
    results = []

    def wait(*_):
        results.extend(run_in_threads(lambda index: patch(model), 1))
        results.extend(run_in_threads(lambda index: handle.unpatch(), 1))
        results.extend(run_in_threads(lambda index: variant.accelerate(model, vae), 1))
        results.extend(run_in_threads(lambda index: ours.generate([1], seed=0), 1))

    other = lookalike(depth=2)
    hook = other.blocks[0].register_forward_pre_hook(wait)
    with patch(other):
        hook.remove()
    for result, (kind, op) in zip(
        results[:4],
        [(PatchError, "patch"), (PatchError, "unpatch")] + [(UserError, "accelerate")] * 2,
        strict=True,
    ):
        assert type(result) is kind
        assert str(result).startswith(f"{op}: another thread has been patching, unpatching or comp")
    handle.unpatch()
    with patch(model):
        ours.generate([1], seed=0)
