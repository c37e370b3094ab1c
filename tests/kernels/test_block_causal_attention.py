"""block_causal_attention: every backend against float64."""

import pytest
import torch
import torch.nn.functional as F
from compare import DRAWS, Tally, backends_for, cases, largest_of, moved, name_of, wide

from variant_kernels import ScaleLayout, block_causal_attention
from variant_kernels.ops import block_causal_attention as op

CASES = cases(op.BLOCK_CAUSAL_IMPLS)
FLOAT32_BACKENDS = backends_for(op.BLOCK_CAUSAL_IMPLS, torch.float32)


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
    for _ in range(DRAWS):
        for q, k, v, layout in op.sample_inputs(dtype, generator):
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
    for _ in range(DRAWS):
        for *inputs, layout in op.sample_inputs(dtype, generator):
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


@pytest.mark.parametrize(("backend", "dtype"), CASES, ids=name_of)
def test_random_layouts_strides_and_scales_match_float64(backend, dtype):
    tally, generator = Tally(), torch.Generator().manual_seed(8)
    for index in range(8):
        (*inputs, weight), layout, scale = random_case(dtype, generator)

        def plain_op(*leaves, layout=layout, scale=scale):
            return plain_attention(*leaves, layout, scale)

        def our_op(*leaves, layout=layout, scale=scale):
            return block_causal_attention(*leaves, layout, softmax_scale=scale, backend=backend)

        on_device = moved(*inputs)
        exact, plain = plain_op(*wide(*inputs)), plain_op(*inputs)
        tally.add(f"{index} out", our_op(*on_device).cpu(), plain, exact)
        exact = gradients(plain_op, wide(*inputs), weight.double())
        plain = gradients(plain_op, inputs, weight)
        ours = gradients(our_op, on_device, *moved(weight))
        for name, a, b, c in zip(("dq", "dk", "dv"), ours, plain, exact, strict=True):
            tally.add(f"{index} {name}", a.cpu(), b, c, 3, largest_of(exact))
    tally.check()


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


@pytest.mark.parametrize("backend", FLOAT32_BACKENDS)
def test_backward_is_deterministic(backend):
    generator = torch.Generator().manual_seed(5)
    *inputs, layout = op.sample_inputs(torch.float32, generator)[-1]
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
    torch.library.opcheck(op.block_causal_attention_op, (*leaves, layout.tokens, 0.2, backend))


def test_fullgraph_compile_runs_forward_and_backward():
    q, k, v, layout = op.sample_inputs(torch.float32, torch.Generator().manual_seed(6))[1]

    def attend(*leaves):
        return block_causal_attention(*leaves, layout)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    weight = torch.ones_like(q)
    expected = gradients(attend, (q, k, v), weight)
    for a, b in zip(gradients(compiled, (q, k, v), weight), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", FLOAT32_BACKENDS)
def test_a_second_derivative_is_refused(backend):
    layout = ScaleLayout.from_patch_nums((1, 2))
    q = moved(torch.randn(1, 5, 1, 16))[0].requires_grad_()
    out = block_causal_attention(q, q, q, layout, backend=backend)
    (first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        torch.autograd.grad(first.sum(), q)


def test_wrong_arguments_are_named():
    layout = ScaleLayout.from_patch_nums((1, 2))
    q = torch.zeros(1, 5, 2, 16)
    with pytest.raises(ValueError, match=r"q_BLHD must have 5 tokens to match layout \(1, 4\)"):
        block_causal_attention(q[:, :4], q[:, :4], q[:, :4], layout)
    with pytest.raises(ValueError, match=r"v_BLHD must be \(1, 5, 2, 16\) to match q_BLHD"):
        block_causal_attention(q, q, q[..., :8], layout)
    with pytest.raises(TypeError, match="layout must be a ScaleLayout; got tuple"):
        block_causal_attention(q, q, q, (1, 4))
