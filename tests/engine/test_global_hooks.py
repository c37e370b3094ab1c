"""Forward hooks that torch calls for every module, set before or after an engine's first use."""

import threading
from contextlib import contextmanager

import pytest
import torch
from small_models import small_model
from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils.flop_counter import FlopCounterMode

from variant.engine import weights as engine_weights
from variant.engine.engine import Engine
from variant.models.var import SelfAttention, token_loss
from variant_kernels.integrations.alterations import without_global_hooks

BF16 = {"dtype": torch.bfloat16}
LABELS = [1, 2]
TOKENS = torch.randint(24, (1, 14), generator=torch.Generator().manual_seed(0))


@contextmanager
def hooked(hook, register=torch_module.register_module_forward_hook):
    handle = register(hook)
    try:
        yield
    finally:
        handle.remove()


def scaled(*kinds):
    return lambda module, inputs, output: 1.5 * output if isinstance(module, kinds) else None


def images(model, **options):
    return model.generate(LABELS, seed=0, **options).images


@pytest.mark.parametrize("is_used", [False, True])
@pytest.mark.parametrize("options", [{}, BF16], ids=["own", "bf16"])
def test_those_that_change_a_part_that_is_read_are_refused(options, is_used):
    model = small_model()
    expected = images(model, **options) if is_used else None
    for kind in (nn.Linear, SelfAttention, type(model.var.blocks[0])):
        with (
            hooked(scaled(kind)),
            pytest.raises(ValueError, match=r"^Engine: forward hooks must not .* on every module"),
        ):
            images(model, **options)

    def doubled(module, inputs):
        return (2 * inputs[0],) if module is model.var.head else None

    with (
        hooked(doubled, torch_module.register_module_forward_pre_hook),
        pytest.raises(ValueError, match="on every module"),
    ):
        images(model, **options)
    if expected is not None:
        assert torch.equal(images(model, **options), expected)


@pytest.mark.parametrize("options", [{}, BF16], ids=["own", "bf16"])
@pytest.mark.parametrize("kind", [nn.Embedding, nn.Conv2d, nn.GroupNorm])
def test_parts_that_are_called_run_theirs(kind, options):
    model, other = small_model(), small_model()
    before = images(model, **options)
    with hooked(scaled(kind)):
        found = images(model, **options)
    for part in other.modules():
        part.register_forward_hook(scaled(kind))
    expected = images(other, **options)
    assert (expected - before).abs().max() > 0.05
    assert (found - expected).abs().max() < (0.05 if options else 1e-5)
    assert torch.equal(images(model, **options), before)


@pytest.mark.parametrize("options", [{}, BF16], ids=["own", "bf16"])
def test_those_that_only_look_on_change_nothing_and_cost_no_new_weights(options, monkeypatch):
    model = small_model()
    engine = model.engine(**options)
    expected, weights = images(model, **options), engine._weights()
    monkeypatch.setattr(engine_weights, "EngineWeights", None)
    with FlopCounterMode(display=False) as counter:
        assert torch.equal(images(model, **options), expected)
        assert engine._weights() is weights
    assert counter.get_total_flops() > 0
    assert torch.equal(images(model, **options), expected)
    assert engine._weights() is weights


def test_a_decoder_of_an_engine_follows_them_while_they_are_there():
    model = small_model()
    engine = Engine(model.var, model.vae)
    plain = engine.decode(TOKENS)
    for _ in range(2):
        with hooked(scaled(nn.Conv2d)):
            assert torch.allclose(engine.decode(TOKENS), model.vae.decode(TOKENS), atol=1e-5)
            assert not torch.allclose(engine.decode(TOKENS), plain, atol=0.05)
        assert torch.equal(engine.decode(TOKENS), plain)


def test_the_loss_is_that_of_the_head_with_them():
    head, h_BLC = nn.Linear(8, 5), torch.randn(2, 3, 8)
    targets_BL = torch.randint(5, (2, 3))
    with hooked(scaled(nn.Linear)):
        found = token_loss(head, h_BLC, targets_BL).mean
    logits_BVL = 1.5 * head(h_BLC).transpose(1, 2)
    assert found.item() == pytest.approx(nn.functional.cross_entropy(logits_BVL, targets_BL).item())


def test_they_rest_in_one_thread_and_are_put_back():
    part, kept, x = nn.Linear(2, 2), nn.Linear(2, 2), torch.ones(1, 2)
    found = {}
    table = torch_module._global_forward_hooks
    with hooked(scaled(nn.Linear)):
        before = dict(table)
        with without_global_hooks(but=[kept]):
            found["rest"] = part(x)
            found["kept"] = kept(x)
            thread = threading.Thread(target=lambda: found.update(other=part(x)))
            thread.start()
            thread.join()
            late = torch_module.register_module_forward_hook(scaled(nn.Conv2d))
        assert dict(table) == before | {late.id: table[late.id]}
        late.remove()
        assert torch.equal(part(x), found["other"])
        with pytest.raises(KeyError), without_global_hooks():
            raise KeyError
        assert dict(table) == before
        handle = torch_module.register_module_forward_hook(scaled(nn.Conv2d))
        with without_global_hooks():
            handle.remove()
        assert dict(table) == before
    assert not table
    assert torch.equal(part(x), found["rest"])
    assert torch.equal(found["other"], 1.5 * found["rest"])
    assert torch.equal(found["kept"], 1.5 * kept(x))


def test_two_threads_pause_them_at_once():
    part, x, found = nn.Linear(2, 2), torch.ones(1, 2), {}
    table = torch_module._global_forward_hooks
    inside, leave = threading.Event(), threading.Event()

    def other():
        with without_global_hooks():
            inside.set()
            leave.wait(60)
            found["other"] = part(x)

    plain = part(x)
    with hooked(scaled(nn.Linear)):
        before = dict(table)
        thread = threading.Thread(target=other)
        thread.start()
        inside.wait(60)
        with without_global_hooks():
            with without_global_hooks(but=[part]):
                found["kept"] = part(x)
            found["inside"] = part(x)
        found["after"] = part(x)
        leave.set()
        thread.join()
        assert dict(table) == before
    assert torch.equal(found["other"], plain)
    assert torch.equal(found["inside"], plain)
    assert torch.equal(found["kept"], 1.5 * plain)
    assert torch.equal(found["after"], 1.5 * plain)
