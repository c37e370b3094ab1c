"""The chunked cross-entropy against torch's on all logits at once."""

import pytest
import torch
from live_bytes import LiveBytes
from torch.nn import functional as F

from variant.models import token_loss, var
from variant.models.token_loss import linear_cross_entropy
from variant.training.distillation import distillation_loss


def case(dtype, weight_dtype, *, tokens=(3, 37), width=24, vocab=50):
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(*tokens, width, generator=generator).to(dtype).requires_grad_()
    weight, bias = (
        (0.3 * torch.randn(*shape, generator=generator)).to(weight_dtype).requires_grad_()
        for shape in ((vocab, width), (vocab,))
    )
    return h, weight, bias, torch.randint(vocab, tokens, generator=generator)


def at_once(h, weight, bias, targets):
    """Losses of all tokens from all logits."""
    logits = F.linear(h, weight.to(h.dtype), bias.to(h.dtype))
    wide = logits.to(torch.promote_types(h.dtype, torch.float32))
    return F.cross_entropy(wide.transpose(1, 2), targets, reduction="none")


@pytest.mark.parametrize("rows", [1, 7, 37, 1000])
def test_equals_the_cross_entropy_of_all_logits(rows, monkeypatch):
    monkeypatch.setattr(token_loss, "CHUNK_LOGITS", rows * 50)
    *inputs, targets = case(torch.float64, torch.float64)
    expected = at_once(*inputs, targets)
    loss = linear_cross_entropy(*inputs, targets)
    torch.testing.assert_close(loss.losses_BL, expected.detach(), rtol=1e-13, atol=1e-13)
    assert not loss.losses_BL.requires_grad
    grads = torch.autograd.grad(2.5 * loss.mean, inputs)
    for grad, wanted in zip(grads, torch.autograd.grad(2.5 * expected.mean(), inputs), strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-12, atol=1e-15)


@pytest.mark.skipif(
    not hasattr(F, "linear_cross_entropy"), reason="torch has no F.linear_cross_entropy"
)
def test_equals_torch_s_chunked_cross_entropy():
    *inputs, targets = case(torch.float64, torch.float64)
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=16)
    h, weight, bias = inputs
    theirs = F.linear_cross_entropy(
        h.flatten(0, 1), weight, targets.flatten(), linear_bias=bias, options=options
    )
    ours = linear_cross_entropy(*inputs, targets).mean
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=0)
    pairs = zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True)
    for grad, wanted in pairs:
        torch.testing.assert_close(grad, wanted, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_is_as_exact_in_16_bits_as_all_logits_at_once(dtype):
    *inputs, targets = case(dtype, torch.float32, vocab=200)
    exact_inputs = [x.detach().to(dtype).double().requires_grad_() for x in inputs]
    exact = torch.autograd.grad(at_once(*exact_inputs, targets).mean(), exact_inputs)
    theirs = torch.autograd.grad(at_once(*inputs, targets).mean(), inputs)
    ours = torch.autograd.grad(linear_cross_entropy(*inputs, targets).mean, inputs)
    for our, their, true in zip(ours, theirs, exact, strict=True):
        assert our.dtype == their.dtype
        error, allowed = ((x.double() - true).norm() for x in (our, their))
        assert error <= 1.2 * allowed


def test_gradients_of_likely_tokens_survive_in_float16():
    # Before loss scaling 1 / (tokens * V) is below float16's range.
    h, weight, bias, targets = case(torch.float16, torch.float32, tokens=(40, 680), vocab=64)
    loss = linear_cross_entropy(h, weight, bias, targets).mean
    (grad,) = torch.autograd.grad(2.0**11 * loss, [h])
    exact = [x.detach().double().requires_grad_() for x in (h, weight, bias)]
    (wanted,) = torch.autograd.grad(2.0**11 * at_once(*exact, targets).mean(), exact[:1])
    assert (grad.double() - wanted).norm() < 3e-3 * wanted.norm()


def test_frozen_weights_get_no_gradient_and_evaluation_computes_none():
    h, weight, bias, targets = case(torch.float32, torch.float32)
    weight.requires_grad_(False)
    linear_cross_entropy(h, weight, bias, targets).mean.backward()
    assert weight.grad is None
    assert h.grad is not None
    with torch.no_grad():
        assert not linear_cross_entropy(h, weight, bias, targets).mean.requires_grad


def test_needs_less_than_2_mb_an_image():
    images = 10
    h, weight, bias, targets = case(
        torch.bfloat16, torch.float32, tokens=(images, 680), width=16, vocab=4096
    )
    with LiveBytes() as live:
        linear_cross_entropy(h, weight, bias, targets).mean.backward()
    assert live.peak < 2e6 * images
    with LiveBytes() as live:
        at_once(h[:1], weight, bias, targets[:1]).mean().backward()
    assert live.peak > 11e6  # the measure sees the logits


def test_transforms_of_torch_func_and_forward_mode_work():
    *inputs, targets = case(torch.float64, torch.float64, tokens=(2, 5))

    def ours(*tensors):
        return linear_cross_entropy(*tensors, targets).mean

    def theirs(*tensors):
        return at_once(*tensors, targets).mean()

    plain = [x.detach() for x in inputs]
    wanted = torch.autograd.grad(ours(*inputs), inputs)
    for transform in (torch.func.grad, torch.func.jacrev):
        grads = transform(ours, (0, 1, 2))(*plain)
        for grad, expected in zip(grads, wanted, strict=True):
            torch.testing.assert_close(grad, expected)
    ones = tuple(map(torch.ones_like, plain))
    tangent = torch.func.jvp(ours, tuple(plain), ones)[1]
    torch.testing.assert_close(tangent, torch.func.jvp(theirs, tuple(plain), ones)[1])
    assert tangent.abs() > 1e-3
    several = torch.stack([plain[0], 2 * plain[0]])
    mapped = torch.func.vmap(ours, (0, None, None))(several, *plain[1:])
    torch.testing.assert_close(mapped, torch.stack([ours(h, *plain[1:]) for h in several]))


@pytest.mark.parametrize("target", [-100, -1, 50])
def test_no_path_leaves_out_a_token(target):
    """Values on a GPU are not checked beforehand: each path has to fail by itself."""
    h, weight, bias, targets = case(torch.float32, torch.float32)
    targets[1, 3] = target
    head = torch.nn.Linear(24, 50).requires_grad_(False)
    looked_at = torch.nn.Linear(24, 50)
    looked_at.register_forward_hook(lambda *_: None)
    logits = head(h)
    for compute in (
        lambda: linear_cross_entropy(h, weight, bias, targets),
        lambda: torch.func.grad(lambda h: linear_cross_entropy(h, weight, bias, targets).mean)(h),
        lambda: var.token_loss(head, h, targets),
        lambda: var.token_loss(looked_at, h, targets),
        lambda: distillation_loss(logits, targets, logits, 0.5),
    ):
        with pytest.raises(RuntimeError, match=rf"index {target} is out of bounds"):
            compute()


def test_logits_of_other_tokens_than_the_targets_are_refused():
    h, _, _, targets = case(torch.float32, torch.float32)
    longer = torch.nn.Sequential(torch.nn.Linear(24, 50), torch.nn.ZeroPad2d((0, 0, 0, 1)))
    with pytest.raises(ValueError, match=r"logits must be \(\*\(3, 37\), V\).* \(3, 38, 50\)"):
        var.token_loss(longer, h, targets)
