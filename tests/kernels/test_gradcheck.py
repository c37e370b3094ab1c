"""float64 through the reference backend: numerical gradients, and every backend against it."""

import pytest
import torch

from tests.kernels.compare import DRAWS, Tally, backends_for, largest_of, moved, wide
from variant_kernels import (
    ScaleLayout,
    adaln_modulate,
    append_paged_kv,
    block_causal_attention,
    gated_residual_adaln,
    paged_attention,
    qk_norm,
    qk_norm_append_paged_kv,
    sample_tokens,
    use_backend,
)
from variant_kernels.ops import adaln, tables
from variant_kernels.ops import block_causal_attention as block_causal
from variant_kernels.ops import paged_attention as paged
from variant_kernels.ops import qk_norm as norm


def drawn(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def heads(layout):
    return (2, layout.total, 2, 16)


SQUARE, RAGGED = ScaleLayout.from_patch_nums((1, 2)), ScaleLayout.from_patch_nums((1, (1, 3)))
# A scale on either side of the clamp at log 100 = 4.605: beyond it there is no gradient.
SCALES = torch.tensor([[-0.5, 4.7]]).view(1, 2, 1, 1)
CASES = {
    "adaln_modulate": (adaln_modulate, drawn((2, 3, 7), (2, 7), (2, 7))),
    "adaln_modulate of one token": (adaln_modulate, drawn((1, 1, 8), (1, 8), (1, 8))),
    "gated_residual_adaln": (
        gated_residual_adaln,
        drawn((2, 3, 7), (2, 3, 7), (2, 7), (2, 7), (2, 7)),
    ),
    "qk_norm": (qk_norm, [*drawn((2, 3, 2, 16), (2, 3, 2, 16)), SCALES]),
    "block_causal_attention": (
        lambda q, k, v, **named: block_causal_attention(q, k, v, SQUARE, **named),
        drawn(*[heads(SQUARE)] * 3),
    ),
    "block_causal_attention of ragged scales": (
        lambda q, k, v, **named: block_causal_attention(
            q, k, v, RAGGED, softmax_scale=-0.7, **named
        ),
        drawn(*[heads(RAGGED)] * 3),
    ),
    "block_causal_attention with qk_norm": (
        lambda q, k, v, scale, **named: block_causal_attention(
            q, k, v, SQUARE, scale_mul_1H11=scale, **named
        ),
        [*drawn(*[heads(SQUARE)] * 3), SCALES],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_the_numerical_ones(case):
    function, inputs = CASES[case]
    leaves = [x.requires_grad_() for x in moved(*wide(*inputs))]

    def reference(*tensors):
        return function(*tensors, backend="reference")

    assert torch.autograd.gradcheck(reference, leaves)
    assert torch.autograd.gradcheck(reference, leaves, check_batched_grad=True, fast_mode=True)


def test_every_op_with_a_gradient_is_among_the_cases():
    names = {name.split()[0] for name in CASES}
    assert names == {
        op for op, backends in tables().items() if backends["reference"]._backward is not None
    }


def results(function, inputs, backend):
    """Results and gradients of the same weighted sum."""
    leaves = [x.detach().clone().requires_grad_() for x in moved(*inputs)]
    outputs = function(*leaves, backend=backend)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    weights = drawn(*[y.shape for y in outputs], seed=5)
    total = sum((w.to(y) * y).sum() for w, y in zip(weights, outputs, strict=True))
    return [*outputs, *torch.autograd.grad(total, leaves)]


@pytest.mark.parametrize("case", CASES)
def test_every_backend_is_as_near_to_float64_as_the_reference(case):
    function, shapes = CASES[case]
    draws = [
        [x if x is SCALES else drawn(x.shape, seed=10 * draw + i)[0] for i, x in enumerate(shapes)]
        for draw in range(DRAWS)
    ]
    for backend in backends_for(tables()[case.split()[0]], torch.float32):
        tally = Tally()
        for inputs in draws:
            values = (
                results(function, inputs, backend),
                results(function, inputs, "reference"),
                results(function, wide(*inputs), "reference"),
            )
            largest = largest_of(values[2])
            for i, (ours, plain, exact) in enumerate(zip(*values, strict=True)):
                tally.add(f"{backend} {i}", ours.cpu(), plain.cpu(), exact.cpu(), 3, largest)
        tally.check()


def test_inference_only_ops_take_float64_too():
    q, k_pages, v_pages, table, lens = paged.sample_inputs(
        torch.float32, torch.Generator().manual_seed(1)
    )[1]
    exact = paged_attention(*moved(*wide(q, k_pages, v_pages), table, lens), backend="reference")
    assert exact.dtype == torch.float64
    torch.testing.assert_close(
        paged_attention(*moved(q, k_pages, v_pages, table, lens)), exact.float()
    )
    (qkv,) = moved(*wide(*drawn((1, 5, 3, 2, 16))))
    pool, slots = qkv.new_zeros(2, 2, 4, 2, 16), torch.arange(5, device=qkv.device).view(1, 5)
    scale = qkv.new_zeros(1, 2, 1, 1)
    q = qk_norm_append_paged_kv(qkv, scale, *pool, slots, backend="reference")
    q_alone, k_alone = qk_norm(qkv[:, :, 0], qkv[:, :, 1], scale, backend="reference")
    assert torch.equal(q, q_alone)
    assert torch.equal(pool[0].flatten(0, 1)[:5], k_alone[0])
    append_paged_kv(qkv[:, :, 0], qkv[:, :, 2], *pool, slots, backend="reference")
    assert torch.equal(pool[1].flatten(0, 1)[:5], qkv[0, :, 2])


def test_other_backends_refuse_float64_and_say_what_to_do():
    x, row, _ = moved(*wide(*CASES["adaln_modulate"][1]))
    for backend in ("auto", "cpu", "triton", "cuda"):
        with pytest.raises(TypeError, match="adaln_modulate: float64 runs with backend=") as caught:
            adaln_modulate(x, row, row, backend=backend)
        assert f'got backend="{backend}"' in str(caught.value)
        assert 'Convert the tensors to float32, or pass backend="reference"' in str(caught.value)
    with use_backend("reference"):
        assert adaln_modulate(x, row, row).dtype == torch.float64
    with pytest.raises(TypeError, match="logits_2BTV must be one of float32, bfloat16, float16; "):
        sample_tokens(x[:, :, :4], guidance=1.0, backend="reference")


def test_the_backward_pass_in_float64_keeps_the_references_backend():
    leaves = [x.requires_grad_() for x in moved(*wide(*CASES["adaln_modulate"][1]))]
    with use_backend("reference"):
        y = adaln_modulate(*leaves)
    y.sum().backward()
    assert all(leaf.grad.dtype == torch.float64 for leaf in leaves)


@pytest.mark.parametrize("backend", backends_for(norm.qk_norm_op.backends, torch.float32))
def test_below_the_least_norm_qk_norm_is_a_division(backend):
    """There the gradient is grad / 1e-12, without the part along the vector."""
    x, weight = drawn((1, 2, 1, 16), (1, 2, 1, 16), seed=7)
    x = 1e-14 * x / x.norm(dim=-1, keepdim=True)
    x[:, 1] *= 99  # just below 1e-12
    q, k, scale, weight = moved(x, x.clone(), torch.zeros(1, 1, 1, 1), weight)
    q.requires_grad_()
    k.requires_grad_()
    q_out, k_out = qk_norm(q, k, scale, backend=backend)
    torch.testing.assert_close(k_out, k.detach() * 1e12)
    for grad in torch.autograd.grad(((q_out + k_out) * weight).sum(), (q, k)):
        torch.testing.assert_close(grad, weight * 1e12)


def test_finite_scores_of_any_documented_size_stay_finite():
    """Scores up to 2^24 hold digits for exp; softmax_scale is bounded, adaln's entries are not."""
    q, k, v = drawn(*[heads(SQUARE)] * 3, seed=3)
    for backend in backends_for(block_causal.block_causal_attention_op.backends, torch.float32):
        for size, scale in ((1e3, 1.0), (1.0, 2.0**20), (1.0, -(2.0**20)), (1e-3, 2.0**20)):
            named = {"softmax_scale": scale, "backend": backend}
            ours = block_causal_attention(*moved(size * q, size * k, v), SQUARE, **named)
            named["backend"] = "reference"
            exact = block_causal_attention(*moved(*wide(size * q, size * k, v)), SQUARE, **named)
            torch.testing.assert_close(ours.double(), exact, rtol=1e-3, atol=1e-3)
    for backend in backends_for(adaln.adaln_op.backends, torch.float32):
        x, row = moved(torch.ones(1, 1, 16), torch.zeros(1, 16))
        x[..., 0] = 1e18
        exact = adaln_modulate(*wide(x, row, row), backend="reference")
        torch.testing.assert_close(adaln_modulate(x, row, row, backend=backend).double(), exact)
