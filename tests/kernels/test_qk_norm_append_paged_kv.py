"""qk_norm_append_paged_kv: every backend against float64, and bit by bit against its two halves."""

import math

import pytest
import torch
import torch.nn.functional as F
from compare import DRAWS, Tally, backends_for, cases, moved, name_of
from hypothesis import given, settings
from hypothesis import strategies as st

from variant_kernels import append_paged_kv, qk_norm, qk_norm_append_paged_kv
from variant_kernels.ops import qk_norm_append_paged_kv as op

CASES = cases(op.qk_norm_append_paged_kv_op.backends)
BACKENDS = backends_for(op.qk_norm_append_paged_kv_op.backends, torch.float32)


def plain_q_k(qkv, scale_mul):
    q, k, _ = qkv.unbind(2)
    if scale_mul is None:
        return q, k
    scale = scale_mul.clamp_max(math.log(100)).exp().transpose(1, 2)
    return (F.normalize(q, dim=-1) * scale).to(q.dtype), F.normalize(k, dim=-1)


def written(pages, slots, tokens):
    """The pages after `tokens` were put into their slots one by one."""
    flat = pages.flatten(0, 1).clone()
    for slot, token in zip(slots.flatten().tolist(), tokens.flatten(0, 1), strict=True):
        if slot >= 0:
            flat[slot] = token
    return flat.view(pages.shape)


@pytest.mark.parametrize(("backend", "dtype"), CASES, ids=name_of)
def test_matches_float64_and_leaves_other_slots_alone(backend, dtype):
    tally, generator = Tally(), torch.Generator().manual_seed(1)
    for _ in range(DRAWS):
        inputs = op.sample_inputs(dtype, generator)
        for case, (qkv, scale, k_pages, v_pages, slots) in enumerate(inputs):
            # Zero keys: plain 16-bit torch divides 0 by 0.
            wide_scale = None if scale is None else scale.double()
            exact = plain_q_k(qkv.double(), wide_scale)
            plain = [x.nan_to_num() for x in plain_q_k(qkv, scale)]
            before = k_pages.clone(), v_pages.clone()
            moved_scale = None if scale is None else moved(scale)[0]
            moved_qkv, *target = moved(qkv, k_pages, v_pages, slots)
            q = qk_norm_append_paged_kv(moved_qkv, moved_scale, *target, backend=backend)
            assert q.is_contiguous()
            k_pages, v_pages = (pages.cpu() for pages in target[:2])
            tally.add(f"case {case} q", q.cpu(), plain[0], exact[0])
            tally.add(
                f"case {case} k",
                k_pages,
                written(before[0], slots, plain[1]),
                written(before[0].double(), slots, exact[1]),
                # The other slots hold larger numbers than unit vectors do.
                largest=float(exact[1].abs().max()),
            )
            assert torch.equal(v_pages, written(before[1], slots, qkv[:, :, 2]))
    tally.check()


@st.composite
def problems(draw):
    """Random shapes, dtypes and strides; slots shuffled, some tokens skipped, pages poisoned."""
    dtype = draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16)))
    batch, tokens = draw(st.integers(0, 3)), draw(st.integers(0, 20))
    heads, head_dim = draw(st.integers(1, 5)), 8 * draw(st.integers(2, 32))
    page_size = draw(st.integers(1, 17))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = [batch, tokens, 3, heads, head_dim]
    order = draw(st.permutations(range(4)))
    gap = draw(st.integers(0, 1))
    stored_shape = [shape[i] + gap for i in order] + [head_dim + 8 * gap]
    stored = torch.randn(stored_shape, generator=generator)
    qkv = stored.to(dtype).permute([order.index(i) for i in range(4)] + [4])
    qkv = qkv[:batch, :tokens, :3, :heads, :head_dim]
    pages = -(-batch * tokens // page_size) + draw(st.integers(0, 2))
    pool = torch.full((pages, 2, page_size, heads + gap, head_dim), torch.nan, dtype=dtype)
    slots = torch.randperm(pages * page_size, generator=generator)[: batch * tokens]
    slots = slots.view(batch, tokens)
    slots[torch.rand(slots.shape, generator=generator) < 0.2] = -1
    scale = torch.randn(1, heads, 1, 1, generator=generator) if draw(st.booleans()) else None
    return qkv, scale, pool[:, 0, :, :heads], pool[:, 1, :, :heads], slots


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(problem=problems(), backend=st.sampled_from(BACKENDS))
def test_equals_qk_norm_then_append_bit_by_bit(problem, backend):
    qkv, scale, k_pages, v_pages, slots = problem
    if backend not in backends_for(op.qk_norm_append_paged_kv_op.backends, qkv.dtype):
        backend = "reference"
    qkv, k_pages, v_pages, slots = moved(qkv, k_pages, v_pages, slots)
    scale = None if scale is None else moved(scale)[0]
    expected_pages = k_pages.clone(), v_pages.clone()
    q, k, v = qkv.unbind(2)
    if scale is not None and (backend, q.dtype) == ("cpu", torch.float16):
        # Computed in float32, rounded once: qk_norm itself has no float16 there.
        q, k = (x.half() for x in qk_norm(q.float(), k.float(), scale, backend="cpu"))
    elif scale is not None:
        q, k = qk_norm(q, k, scale, backend=backend)
    append_paged_kv(k, v, *expected_pages, slots, backend=backend)
    ours = qk_norm_append_paged_kv(qkv, scale, k_pages, v_pages, slots, backend=backend)
    assert torch.equal(ours, q)
    for pages, expected in zip((k_pages, v_pages), expected_pages, strict=True):
        # Slots without a new token still hold their NaN.
        assert torch.equal(pages.isnan(), expected.isnan())
        assert torch.equal(pages.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", [True, False])
def test_the_query_shares_no_memory_with_the_projection(backend, norm):
    qkv, pages, scale, slots = moved(
        torch.ones(1, 2, 3, 2, 16),
        torch.zeros(1, 4, 2, 16),
        torch.zeros(1, 2, 1, 1),
        torch.tensor([[0, 1]]),
    )
    scale = scale if norm else None
    q = qk_norm_append_paged_kv(qkv, scale, pages, pages.clone(), slots, backend=backend)
    expected = q.clone()
    qkv.fill_(torch.nan)
    assert torch.equal(q, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_passes(backend):
    inputs = op.sample_inputs(torch.float32, torch.Generator().manual_seed(2))
    for qkv, scale, *target in (inputs[3], inputs[5]):
        scale = None if scale is None else moved(scale)[0]
        case = (*moved(qkv), scale, *moved(*target))
        torch.library.opcheck(op.qk_norm_append_paged_kv_op.overload, (*case, backend))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_slot_outside_the_pool_is_named_and_nothing_is_written(backend):
    pages = torch.zeros(4, 4, 2, 16)
    with pytest.raises(
        ValueError,
        match=r"qk_norm_append_paged_kv: slots_BT\[1, 2\] must be -1 or in \[0, 16\).*; got 16",
    ):
        qk_norm_append_paged_kv(
            torch.ones(2, 3, 3, 2, 16),
            None,
            pages,
            pages.clone(),
            torch.tensor([[0, 1, 2], [3, 4, 16]]),
            backend=backend,
        )
    assert not pages.any()


def test_wrong_arguments_are_named():
    name = "qk_norm_append_paged_kv"
    qkv, scale = torch.zeros(2, 5, 3, 2, 64), torch.zeros(1, 2, 1, 1)
    pages, slots = torch.zeros(4, 4, 2, 64), torch.zeros(2, 5, dtype=torch.int64)
    others = pages.clone()
    with pytest.raises(ValueError, match=rf"{name}: qkv_BT3HD must be \(B, T, 3, H, D\)"):
        qk_norm_append_paged_kv(qkv[:, :, :2], scale, pages, others, slots)
    with pytest.raises(ValueError, match="qkv_BT3HD must have 5 dimensions"):
        qk_norm_append_paged_kv(qkv[0], scale, pages, others, slots)
    with pytest.raises(ValueError, match=r"scale_mul_1H11 must be \(1, 2, 1, 1\) for qkv_BT3HD's"):
        qk_norm_append_paged_kv(qkv, scale[:, :1], pages, others, slots)
    with pytest.raises(TypeError, match="k_pages_PNHD must have the dtype of qkv_BT3HD"):
        qk_norm_append_paged_kv(qkv, scale, pages.bfloat16(), others.bfloat16(), slots)
    with pytest.raises(ValueError, match="must not share memory"):
        qk_norm_append_paged_kv(qkv, scale, pages, pages, slots)
    with pytest.raises(ValueError, match=r"slots_BT must be \(2, 5\) to match qkv_BT3HD"):
        qk_norm_append_paged_kv(qkv, scale, pages, others, slots[:, :4])
    with pytest.raises(TypeError, match=r"slots_BT must be int64; got torch\.int32"):
        qk_norm_append_paged_kv(qkv, scale, pages, others, slots.int())
    with pytest.raises(ValueError, match=r"head_dim\) must be a multiple of 8 from 16 to 256"):
        qk_norm_append_paged_kv(qkv[..., :12], scale, pages, others, slots)


@pytest.mark.parametrize("which", [0, 1])
def test_a_wanted_gradient_is_refused(which):
    tensors = [torch.zeros(1, 3, 3, 2, 16), torch.zeros(1, 2, 1, 1)]
    tensors[which].requires_grad_()
    pages, slots = torch.zeros(4, 4, 2, 16), torch.arange(3).view(1, 3)
    with pytest.raises(RuntimeError, match="qk_norm_append_paged_kv: has no gradient"):
        qk_norm_append_paged_kv(*tensors, pages, pages.clone(), slots)
    with torch.no_grad():
        qk_norm_append_paged_kv(*tensors, pages, pages.clone(), slots)
