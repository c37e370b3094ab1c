"""block_causal_attention: every backend against float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from compare import (
    SCORE_SIZES,
    Tally,
    assert_softmax,
    backends_for,
    cases,
    draws,
    largest_of,
    moved,
    name_of,
    random_cases,
    scores_of_size,
    wide,
)
from test_qk_norm import plain_qk_norm

from variant_kernels import ScaleLayout, block_causal_attention, qk_norm
from variant_kernels.dispatch.support import triton_interprets
from variant_kernels.ops import block_causal_attention as op

CASES = cases(op.block_causal_attention_op.backends)
FLOAT32_BACKENDS = backends_for(op.block_causal_attention_op.backends, torch.float32)


def plain_attention(q, k, v, layout, scale=None):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = op.dense_mask(layout.tokens)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)


def gradients(function, inputs, weight):
    # Not cloned: a clone of a packed view would be contiguous, and strides are the contract's.
    leaves = [t.detach().requires_grad_() for t in inputs]
    return torch.autograd.grad((function(*leaves) * weight).sum(), leaves)


@pytest.mark.parametrize(("backend", "dtype"), CASES, ids=name_of)
def test_matches_float64(backend, dtype):
    tally, generator = Tally(), torch.Generator().manual_seed(1)
    for _, (q, k, v, layout) in draws(op.sample_inputs, dtype, generator):
        for scale in (None, 1.0):
            exact = plain_attention(*wide(q, k, v), layout, scale)
            plain = plain_attention(q, k, v, layout, scale)
            ours = block_causal_attention(
                *moved(q, k, v), layout, softmax_scale=scale, backend=backend
            )
            assert ours.is_contiguous()
            tally.add(f"{tuple(q.shape)} scale {scale}", ours.cpu(), plain, exact)
    tally.check()


@pytest.mark.parametrize(("backend", "dtype"), CASES, ids=name_of)
def test_gradients_match_float64(backend, dtype):
    tally, generator = Tally(), torch.Generator().manual_seed(2)
    for _, (*inputs, layout) in draws(op.sample_inputs, dtype, generator):
        weight = torch.randn(inputs[0].shape, generator=generator).to(dtype)

        def plain_op(*leaves, layout=layout):
            return plain_attention(*leaves, layout)

        def our_op(*leaves, layout=layout):
            return block_causal_attention(*leaves, layout, backend=backend)

        exact = gradients(plain_op, wide(*inputs), weight.double())
        plain = gradients(plain_op, inputs, weight)
        ours = gradients(our_op, moved(*inputs), *moved(weight))
        for name, a, b, c in zip(("dq", "dk", "dv"), ours, plain, exact, strict=True):
            tally.add(f"{tuple(a.shape)} {name}", a.cpu(), b, c, 3, largest_of(exact))
    tally.check()


def random_case(dtype, generator):
    """Ragged scales, any order of the axes in memory, a scale of any sign."""

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    layout = ScaleLayout.from_patch_nums([(draw(1, 6), draw(1, 7)) for _ in range(draw(1, 5))])
    shape = (draw(1, 2), layout.total, draw(1, 3), (16, 40, 64, 72)[draw(0, 3)])
    inputs = []
    for _ in range(4):
        order = torch.randperm(3, generator=generator).tolist()
        stored = torch.randn([shape[axis] for axis in order] + [shape[3] + 8], generator=generator)
        x = stored.to(dtype)[..., : shape[3]].permute(*(order.index(axis) for axis in range(3)), 3)
        inputs.append(x)
    return inputs, layout, (-0.3, 0.0, 0.125, 1.0)[draw(0, 3)]


def add_case(tally, plain_op, our_op, inputs, weight, names, sizes=()):
    """Output and gradients of one case, divided by a power of two near the largest value.

    Each case is drawn once: only the largest errors of all cases show the error of plain torch.

    sizes: factors of gradients, by name.  "dscale" is a long sum that cancels: its limit is 16
    units in the last place of its terms, whose magnitude is the entry (scores of up to 20 carry
    about as many units into each probability).
    """
    on_device = moved(*inputs)
    exact = [plain_op(*wide(*inputs)), *gradients(plain_op, wide(*inputs), weight.double())]
    plain = [plain_op(*inputs), *gradients(plain_op, inputs, weight)]
    ours = [our_op(*on_device), *gradients(our_op, on_device, *moved(weight))]
    sizes = dict(sizes)
    terms = sizes.pop("dscale", None)
    results = {}
    for name, *values in zip(("out", *names), ours, plain, exact, strict=True):
        size = sizes.get(name, torch.ones(()))
        results[name] = [x.detach().cpu() * size.to(x.dtype) for x in values]
    shared = largest_of([results[name][2] for name in names if name != "dscale"])
    for name, values in results.items():
        largest = {"out": float(values[2].abs().max()), "dscale": 16 * (terms or 0)}.get(
            name, shared
        )
        near = 2.0 ** math.frexp(largest)[1]
        scaled = [x / near for x in values]
        tally.add(name, *scaled, 2 if name == "out" else 3, largest / near)


@pytest.mark.parametrize(("backend", "dtype"), CASES, ids=name_of)
def test_random_layouts_strides_and_scales_match_float64(backend, dtype):
    tally, generator = Tally(), torch.Generator().manual_seed(8)
    for _ in random_cases(8):
        (*inputs, weight), layout, scale = random_case(dtype, generator)

        def plain_op(*leaves, layout=layout, scale=scale):
            return plain_attention(*leaves, layout, scale)

        def our_op(*leaves, layout=layout, scale=scale):
            return block_causal_attention(*leaves, layout, softmax_scale=scale, backend=backend)

        add_case(tally, plain_op, our_op, inputs, weight, ("dq", "dk", "dv"))
    tally.check()


def plain_after_qk_norm(q, k, v, scale_mul, layout, scale):
    # Norms of 16-bit values are float32, as autocast has it.
    wide_qk = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k))
    q, k = (x.to(v.dtype) for x in plain_qk_norm(*wide_qk, scale_mul))
    return plain_attention(q, k, v, layout, scale)


def terms_of_dscale(q, k, v, scale_mul, layout, scale, weight):
    """The sum of the magnitudes of the terms of dscale; the largest over all heads."""
    q, k = plain_qk_norm(q, k, scale_mul)
    (dq,) = gradients(lambda leaf: plain_attention(leaf, k, v, layout, scale), [q], weight)
    return float((dq * q).sum(-1).abs().sum((0, 1)).max())


@pytest.mark.parametrize(("backend", "dtype"), CASES, ids=name_of)
def test_random_cases_with_qk_norm_inside_match_float64(backend, dtype):
    tally, generator = Tally(), torch.Generator().manual_seed(11)
    for index in random_cases(6):
        (q, k, v, weight), layout, scale = random_case(dtype, generator)
        # Some queries and keys are short: only their direction may have an effect. Gradients of
        # short vectors are large, so gradients are compared for unit lengths.
        lengths = 4.0 ** -torch.randint(0, 6, (*q.shape[:3], 1), generator=generator)
        heads = q.shape[2]
        scale_mul = torch.linspace(3, -1, heads).view(1, heads, 1, 1)
        scale_mul = scale_mul.to(dtype) if index % 2 else scale_mul
        inputs = q * lengths.to(dtype), k * lengths.to(dtype), v, scale_mul
        scale = None if index == 0 else scale
        plain_scale = 1.0 if scale is None else scale

        def plain_op(*leaves, layout=layout, scale=plain_scale):
            return plain_after_qk_norm(*leaves, layout, scale)

        def our_op(q, k, v, scale_mul, layout=layout, scale=scale):
            return block_causal_attention(
                q, k, v, layout, scale_mul_1H11=scale_mul, softmax_scale=scale, backend=backend
            )

        terms = terms_of_dscale(*wide(*inputs), layout, plain_scale, weight.double())
        sizes = {"dq": lengths, "dk": lengths, "dscale": terms}
        add_case(tally, plain_op, our_op, inputs, weight, ("dq", "dk", "dv", "dscale"), sizes)
    tally.check()


@pytest.mark.parametrize("backend", FLOAT32_BACKENDS)
def test_qk_norm_inside_treats_extremes_as_qk_norm_before(backend):
    # A query and a key of zero length, a scale past the clamp, one that is zero in float32.
    layout = ScaleLayout.from_patch_nums((1, 2, 3))
    packed = torch.randn(1, 14, 3, 3, 16, generator=torch.Generator().manual_seed(12))
    packed[0, 6, :2, 0] = 0
    scale_mul = torch.tensor([5.0, 9.0, -200.0, 9.0, 1.0, 9.0]).view(1, 6, 1, 1)[:, ::2]
    inputs = moved(*packed.unbind(2), scale_mul)
    (weight,) = moved(torch.randn(1, 14, 3, 16, generator=torch.Generator().manual_seed(13)))

    def inside(q, k, v, scale_mul):
        return block_causal_attention(q, k, v, layout, scale_mul_1H11=scale_mul, backend=backend)

    def before(q, k, v, scale_mul):
        q, k = qk_norm(q, k, scale_mul, backend=backend)
        return block_causal_attention(q, k, v, layout, softmax_scale=1, backend=backend)

    torch.testing.assert_close(inside(*inputs), before(*inputs), rtol=1e-4, atol=1e-5)
    actual, expected = (gradients(way, inputs, weight) for way in (inside, before))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert actual[3][0, 0] == 0
    again = gradients(inside, inputs, weight)
    assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))


@pytest.mark.parametrize("backend", FLOAT32_BACKENDS)
def test_qk_norm_inside_keeps_no_copy_of_queries_and_keys(backend):
    layout = ScaleLayout.from_patch_nums((1, 2))
    (packed, scale_mul) = moved(torch.randn(1, 5, 3, 2, 16), torch.zeros(1, 2, 1, 1))
    kept = {}

    def note(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    packed.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        out = block_causal_attention(
            *packed.unbind(2), layout, scale_mul_1H11=scale_mul, backend=backend
        )
    lse_bytes = 4 * 2 * 5
    assert sum(kept.values()) == packed.nbytes + scale_mul.nbytes + out.nbytes + lse_bytes


@pytest.mark.parametrize("backend", FLOAT32_BACKENDS)
def test_later_scales_change_nothing_and_own_scale_is_seen_whole(backend):
    generator = torch.Generator().manual_seed(3)
    *inputs, layout = op.sample_inputs(torch.float32, generator)[2]
    q, k, v = moved(*inputs)
    before = block_causal_attention(q, k, v, layout, backend=backend)
    k2, v2 = k.clone(), v.clone()
    k2[:, layout.offsets[3] :] = 1e4
    v2[:, layout.offsets[3] :] = 1e4
    after = block_causal_attention(q, k2, v2, layout, backend=backend)
    assert torch.equal(before[:, : layout.offsets[3]], after[:, : layout.offsets[3]])
    v3 = v.clone()
    v3[:, layout.offsets[3] - 1] += 100  # the last token of scale 2
    third = block_causal_attention(q, k, v3, layout, backend=backend)
    changed = (third != before).any(-1).any(-1)[0]
    assert not changed[: layout.offsets[2]].any()
    assert changed[layout.offsets[2] :].all()


@pytest.mark.parametrize("backend", FLOAT32_BACKENDS)
def test_large_scores_do_not_overflow(backend):
    layout = ScaleLayout.from_patch_nums((1, 2, 3))
    q = torch.full((1, 14, 1, 16), 100.0)
    v = torch.randn(q.shape, generator=torch.Generator().manual_seed(0))
    q_moved, v_moved = moved(q, v)
    out = block_causal_attention(q_moved, q_moved, v_moved, layout, backend=backend)
    torch.testing.assert_close(out.cpu(), plain_attention(q, q, v, layout))


@pytest.mark.parametrize(("exponent", "scale"), SCORE_SIZES)
@pytest.mark.parametrize(("backend", "dtype"), CASES, ids=name_of)
def test_finite_scores_of_any_size_give_their_softmax(backend, dtype, exponent, scale):
    generator = torch.Generator().manual_seed(exponent)
    layout = ScaleLayout.from_patch_nums((1, (2, 3), (6, 12)))  # several tiles of keys
    inputs = [x[None] for x in scores_of_size(exponent, layout.total, 1, dtype, generator)]
    (weight,) = moved(torch.randn(inputs[0].shape, generator=generator).to(dtype))
    leaves = [x.requires_grad_() for x in moved(*inputs)]
    out = block_causal_attention(*leaves, layout, softmax_scale=scale, backend=backend)
    exact = plain_attention(*wide(*inputs), layout, scale)
    assert_softmax(out, exact)
    # Probabilities are computed again from their float32 logarithm, which keeps 24 bits: large ones
    # have few after the point, but none exceeds 1. float16 may not hold dq and dk.
    *_, dv = gradients = torch.autograd.grad((out * weight).sum(), leaves)
    assert not any(gradient.isnan().any() for gradient in gradients)
    assert (dv.abs().cpu() <= 1.01 * weight.abs().sum(1, keepdim=True).cpu()).all()


@pytest.mark.parametrize("exponent", [10, 13, 17, 20])
@pytest.mark.parametrize(("backend", "dtype"), CASES, ids=name_of)
def test_gradients_lose_the_digits_of_a_large_logarithm(backend, dtype, exponent):
    generator = torch.Generator().manual_seed(exponent)
    layout = ScaleLayout.from_patch_nums((1, (2, 3), (6, 12)))
    inputs = [x[None] for x in scores_of_size(exponent, layout.total, 1, dtype, generator)]
    weight = torch.randn(inputs[0].shape, generator=generator).to(dtype).abs()
    (moved_weight,) = moved(weight)
    leaves = [x.requires_grad_() for x in moved(*inputs)]
    out = block_causal_attention(*leaves, layout, softmax_scale=1.0, backend=backend)
    (dv,) = torch.autograd.grad((out * moved_weight).sum(), leaves[2:])
    v = wide(inputs[2])[0].requires_grad_()
    exact_out = plain_attention(*wide(*inputs[:2]), v, layout, 1.0)
    (exact,) = torch.autograd.grad((exact_out * weight.double()).sum(), (v,))
    # All terms of a sum are positive: it is off by no more than the worst of them.
    tolerance = 2.0 ** (exponent - 23) + 4 * max(torch.finfo(dtype).eps, 2**-20)
    torch.testing.assert_close(dv.cpu().double(), exact, rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("backend", FLOAT32_BACKENDS)
def test_backward_is_deterministic(backend):
    generator = torch.Generator().manual_seed(5)
    # Interpreted programs run one after another: a small case of several tiles shows as much.
    case = 3 if triton_interprets() else -1
    *inputs, layout = op.sample_inputs(torch.float32, generator)[case]
    inputs = moved(*inputs)
    (weight,) = moved(torch.randn(inputs[0].shape, generator=generator))
    first, second = (
        gradients(lambda *a: block_causal_attention(*a, layout, backend=backend), inputs, weight)
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", FLOAT32_BACKENDS)
def test_opcheck_passes(backend):
    *inputs, layout = op.sample_inputs(torch.float32, torch.Generator().manual_seed(4))[1]
    leaves = [t.detach().requires_grad_() for t in moved(*inputs)]
    torch.library.opcheck(
        op.block_causal_attention_op.overload, (*leaves, layout.tokens, 0.2, backend)
    )
    scale_mul = moved(torch.zeros(1, inputs[0].shape[2], 1, 1))[0].requires_grad_()
    torch.library.opcheck(
        op.block_causal_attention_qk_norm_op.overload,
        (*leaves, scale_mul, layout.tokens, 0.2, backend),
    )


def test_fullgraph_compile_runs_forward_and_backward():
    q, k, v, layout = op.sample_inputs(torch.float32, torch.Generator().manual_seed(6))[1]

    def attend(q, k, v, scale_mul=None):
        return block_causal_attention(q, k, v, layout, scale_mul_1H11=scale_mul)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    weight = torch.ones_like(q)
    for inputs in ((q, k, v), (q, k, v, torch.zeros(1, q.shape[2], 1, 1))):
        expected = gradients(attend, inputs, weight)
        for a, b in zip(gradients(compiled, inputs, weight), expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("backend", FLOAT32_BACKENDS)
def test_a_second_derivative_is_refused(backend):
    layout = ScaleLayout.from_patch_nums((1, 2))
    q = moved(torch.randn(1, 5, 1, 16))[0].requires_grad_()
    out = block_causal_attention(q, q, q, layout, backend=backend)
    normed = block_causal_attention(
        q, q, q, layout, scale_mul_1H11=torch.zeros(1, 1, 1, 1, device=q.device), backend=backend
    )
    for result in (out, normed):
        (first,) = torch.autograd.grad(result.square().sum(), q, create_graph=True)
        with pytest.raises(RuntimeError, match="has no second derivative"):
            torch.autograd.grad(first.sum(), q)


def test_wrong_arguments_are_named():
    layout = ScaleLayout.from_patch_nums((1, 2))
    q = torch.zeros(1, 5, 2, 16)
    with pytest.raises(ValueError, match=r"q_BLHD must have 5 tokens to match layout \(1, 4\)"):
        block_causal_attention(q[:, :4], q[:, :4], q[:, :4], layout)
    with pytest.raises(ValueError, match=r"v_BLHD must be \(1, 5, 2, 16\) to match q_BLHD"):
        block_causal_attention(q, q, q[..., :8], layout)
    with pytest.raises(ValueError, match=r"scale_mul_1H11 must be \(1, 2, 1, 1\) for q_BLHD's"):
        block_causal_attention(q, q, q, layout, scale_mul_1H11=torch.zeros(1, 1, 1, 1))
    with pytest.raises(TypeError, match="layout must be a ScaleLayout; got tuple"):
        block_causal_attention(q, q, q, (1, 4))
