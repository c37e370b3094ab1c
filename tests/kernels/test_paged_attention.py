"""paged_attention and append_paged_kv: every backend against float64, pages poisoned with NaN."""

import pytest
import torch
import torch.nn.functional as F
from compare import (
    DTYPES,
    SCORE_SIZES,
    Tally,
    assert_softmax,
    backends_for,
    cases,
    draws,
    moved,
    name_of,
    random_cases,
    scores_of_size,
)

from variant_kernels import append_paged_kv, paged_attention
from variant_kernels.ops import append_paged_kv as append
from variant_kernels.ops import paged_attention as paged

CASES = cases(paged.paged_attention_op.backends)
FLOAT32_BACKENDS = backends_for(paged.paged_attention_op.backends, torch.float32)


def plain_attention(q, k_pages, v_pages, table, lengths, scale=None):
    """Each sequence by itself: its pages gathered, then torch's attention."""
    out = torch.zeros(q.shape, dtype=q.dtype)
    size = k_pages.shape[1]
    for row, length in enumerate(lengths.tolist()):
        if length:
            pages = table[row, : -(-length // size)].long()
            k, v = (x[pages].flatten(0, 1)[:length].transpose(0, 1) for x in (k_pages, v_pages))
            q_row = q[row].transpose(0, 1)
            out[row] = F.scaled_dot_product_attention(q_row, k, v, scale=scale).transpose(0, 1)
    return out


@pytest.mark.parametrize(("backend", "dtype"), CASES, ids=name_of)
def test_matches_float64_and_reads_no_poisoned_slot(backend, dtype):
    tally, generator = Tally(), torch.Generator().manual_seed(1)
    for _, (q, k_pages, v_pages, table, lengths) in draws(paged.sample_inputs, dtype, generator):
        exact = plain_attention(q.double(), k_pages.double(), v_pages.double(), table, lengths)
        plain = plain_attention(q, k_pages, v_pages, table, lengths)
        inputs = moved(q, k_pages, v_pages, table, lengths)
        ours = paged_attention(*inputs, backend=backend).cpu()
        tally.add(f"{tuple(q.shape)}", ours, plain, exact)
        assert not ours[lengths == 0].any()
    tally.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_neither_the_page_size_nor_the_rest_of_the_batch_changes_a_bit(dtype):
    generator = torch.Generator().manual_seed(4)
    # 211 keys: more than one tile of them, the last odd.
    k, v = torch.randn(2, 211, 2, 32, generator=generator).to(dtype)
    q = torch.randn(3, 9, 2, 32, generator=generator).to(dtype)
    outputs = []
    for page_size in (1, 16, 37, 211):
        entries = -(-211 // page_size)
        pages = torch.full((2, entries + 1, page_size, 2, 32), torch.nan, dtype=dtype)
        pages[:, 1:].flatten(1, 2)[:, :211] = torch.stack((k, v))
        table = torch.arange(1, entries + 1, dtype=torch.int32).expand(3, entries).contiguous()
        lengths = torch.tensor([17, 0, 211], dtype=torch.int32)
        batch = paged_attention(q, *pages, table, lengths, backend="cpu")
        alone = paged_attention(q[2:], *pages, table[2:], lengths[2:], backend="cpu")
        outputs += [batch[2:], alone]
    assert all(torch.equal(out, outputs[0]) for out in outputs)


@pytest.mark.parametrize("keys", [1, 2])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_what_is_not_finite_in_a_visible_key_is_seen(dtype, poison, keys):
    q = torch.ones(1, 3, 1, 16, dtype=dtype)
    pages = torch.ones(2, 1, 4, 1, 16, dtype=dtype)
    pages[0, 0, keys - 1, 0, 5] = poison
    table = torch.zeros(1, 1, dtype=torch.int32)
    lengths = torch.tensor([keys], dtype=torch.int32)
    assert paged_attention(q, *pages, table, lengths, backend="cpu").isnan().all()


def random_case(dtype, generator):
    """Random pages of any size in any order, everything outside them NaN; a scale of any sign."""

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    batch, heads, head_dim = draw(1, 3), draw(1, 3), (16, 40, 64, 72)[draw(0, 3)]
    page_size = (1, 5, 16, 256)[draw(0, 3)]
    lengths = torch.randint(0, 150, (batch,), generator=generator, dtype=torch.int32)
    entries = -(-150 // page_size) + draw(0, 2)
    order = torch.randperm(batch * entries + draw(0, 3), generator=generator)
    table = order[: batch * entries].view(batch, entries).to(torch.int32)
    # The head before the slot in memory in half of the cases.
    shape = (len(order), heads, page_size) if draw(0, 1) else (len(order), page_size, heads)
    pages = torch.full((2, *shape, head_dim), torch.nan, dtype=dtype)
    pages = pages if shape[1] == page_size and shape[2] == heads else pages.transpose(2, 3)
    for row, length in enumerate(lengths.tolist()):
        for entry in range(entries):
            here = min(max(length - entry * page_size, 0), page_size)
            values = torch.randn(2, here, heads, head_dim, generator=generator).to(dtype)
            pages[:, table[row, entry], :here] = values
            if not here:
                table[row, entry] = -7
    q = torch.randn(batch, heads, draw(1, 40), head_dim, generator=generator).to(dtype)
    return (q.transpose(1, 2), *pages, table, lengths), (-0.3, 0.0, 0.125, 1.0)[draw(0, 3)]


@pytest.mark.parametrize(("backend", "dtype"), CASES, ids=name_of)
def test_random_pages_strides_and_scales_match_float64(backend, dtype):
    tally, generator = Tally(), torch.Generator().manual_seed(5)
    for index in random_cases(12):
        inputs, scale = random_case(dtype, generator)
        exact = plain_attention(*(x.double() for x in inputs[:3]), *inputs[3:], scale)
        plain = plain_attention(*inputs, scale)
        ours = paged_attention(*moved(*inputs), softmax_scale=scale, backend=backend).cpu()
        tally.add(str(index), ours, plain, exact)
    tally.check()


def consecutive_case(dtype, generator):
    """Random sequences whose pages follow one another; slots outside them are NaN."""

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    batch, heads, head_dim = draw(1, 3), draw(1, 3), (16, 40, 64, 72)[draw(0, 3)]
    page_size = (1, 5, 16, 64)[draw(0, 3)]
    lengths = torch.randint(0, 150, (batch,), generator=generator, dtype=torch.int32)
    entries = -(-lengths.max().item() // page_size) + draw(0, 2)
    table = torch.full((batch, entries), -7, dtype=torch.int32)
    shape = (2, 2 + batch * entries, page_size, heads, head_dim)
    pages = torch.full(shape, torch.nan, dtype=dtype)
    for row in torch.randperm(batch, generator=generator).tolist():
        first, length = 1 + row * entries, int(lengths[row])
        used = -(-length // page_size)
        table[row, :used] = torch.arange(first, first + used)
        values = torch.randn(2, length, heads, head_dim, generator=generator).to(dtype)
        flat = pages[:, first : first + used].flatten(1, 2)
        flat[:, :length] = values
        pages[:, first : first + used] = flat.unflatten(1, (used, page_size))
    q = torch.randn(batch, draw(1, 40), heads, head_dim, generator=generator).to(dtype)
    return (q, *pages, table, lengths), (-0.3, 0.0, 0.125, 1.0)[draw(0, 3)]


@pytest.mark.parametrize(("backend", "dtype"), CASES, ids=name_of)
def test_consecutive_pages_give_the_same_as_a_table(backend, dtype):
    tally, generator = Tally(), torch.Generator().manual_seed(7)
    for index in random_cases(6):
        inputs, scale = consecutive_case(dtype, generator)
        exact = plain_attention(*(x.double() for x in inputs[:3]), *inputs[3:], scale)
        plain = plain_attention(*inputs, scale)
        args = moved(*inputs)
        given = {"softmax_scale": scale, "backend": backend}
        ours = paged_attention(*args, consecutive=True, **given)
        assert torch.equal(ours, paged_attention(*args, **given)), index
        tally.add(str(index), ours.cpu(), plain, exact)
    tally.check()


def test_a_wrong_promise_of_consecutive_pages_is_named():
    q, pages = torch.randn(2, 3, 2, 16), torch.randn(9, 4, 2, 16)
    table = torch.tensor([[4, 5, 0], [1, 2, 4]], dtype=torch.int32)
    lengths = torch.tensor([8, 9], dtype=torch.int32)
    with pytest.raises(
        ValueError, match=r"page_table_BM\[1, 2\] must be the page after 2 .* got 4"
    ):
        paged_attention(q, pages, pages, table, lengths, consecutive=True)
    paged_attention(q, pages, pages, table, lengths - 1, consecutive=True)
    paged_attention(q, pages, pages, table[:, :0], lengths * 0, consecutive=True)
    with pytest.raises(TypeError, match="consecutive must be True or False"):
        paged_attention(q, pages, pages, table, lengths, consecutive=1)


def paged_case_of_size(exponent, dtype, generator):
    """One sequence of 150 tokens on pages of 16 slots, and its last 20 queries."""
    q, k, v = scores_of_size(exponent, 160, 2, dtype, generator)
    k[149] = k[159]
    pages = (x.view(10, 16, 2, 64) for x in (k, v))
    table = torch.arange(10, dtype=torch.int32)[None]
    return q[None, -20:], *pages, table, torch.tensor([150], dtype=torch.int32)


@pytest.mark.parametrize(("exponent", "scale"), SCORE_SIZES)
@pytest.mark.parametrize(("backend", "dtype"), CASES, ids=name_of)
def test_finite_scores_of_any_size_give_their_softmax(backend, dtype, exponent, scale):
    inputs = paged_case_of_size(exponent, dtype, torch.Generator().manual_seed(exponent))
    ours = paged_attention(*moved(*inputs), softmax_scale=scale, backend=backend).cpu()
    exact = plain_attention(*(x.double() for x in inputs[:3]), *inputs[3:], scale)
    assert_softmax(ours, exact)


@pytest.mark.parametrize(
    ("backend", "dtype"), cases(append.append_paged_kv_op.backends), ids=name_of
)
def test_appended_tokens_are_read_back(backend, dtype):
    for k, v, k_pages, v_pages, slots in append.sample_inputs(
        dtype, torch.Generator().manual_seed(2)
    ):
        before = k_pages.clone(), v_pages.clone()
        args = moved(k, v, k_pages, v_pages, slots)
        append_paged_kv(*args, backend=backend)
        after = (pages.cpu() for pages in args[2:4])
        for new, pages, old in zip((k, v), after, before, strict=True):
            expected = old.flatten(0, 1).clone()
            for slot, token in zip(slots.flatten().tolist(), new.flatten(0, 1), strict=True):
                if slot >= 0:
                    expected[slot] = token
            assert torch.equal(pages.flatten(0, 1), expected)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_bad_pages_lengths_and_slots_are_named_and_nothing_is_written(backend):
    q, pages = torch.zeros(2, 3, 2, 16), torch.zeros(4, 4, 2, 16)
    table = torch.tensor([[0, 1], [2, 7]], dtype=torch.int32)
    lengths = torch.tensor([3, 5], dtype=torch.int32)
    with pytest.raises(
        ValueError, match=r"paged_attention: page_table_BM\[1, 1\] must be in \[0, 4\); got 7"
    ):
        paged_attention(q, pages, pages, table, lengths, backend=backend)
    with pytest.raises(ValueError, match=r"kv_lens_B\[0\] must be in \[0, 8\]"):
        paged_attention(q, pages, pages, table, lengths + 6, backend=backend)
    with pytest.raises(ValueError, match=r"kv_lens_B\[0\] must be in \[0, 8\]"):
        paged_attention(q, pages, pages, table, lengths - 4, backend=backend)
    empty_first = torch.tensor([0, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"page_table_BM\[1, 1\] must be in"):
        paged_attention(q, pages, pages, table, empty_first, backend=backend)
    with pytest.raises(ValueError, match=r"kv_lens_B\[1\] must be in \[0, 8\]"):
        paged_attention(q, pages, pages, table, empty_first + 4 * empty_first, backend=backend)
    # An unused entry may hold anything.
    paged_attention(q, pages, pages, table, lengths.clamp_max(4), backend=backend)
    slots = torch.tensor([[0, 1, 2], [3, 4, 16]])
    with pytest.raises(
        ValueError,
        match=r"append_paged_kv: slots_BT\[1, 2\] must be -1 or in \[0, 16\).*; got 16",
    ):
        append_paged_kv(q + 1, q + 1, pages, pages.clone(), slots, backend=backend)
    assert not pages.any()


@pytest.mark.parametrize("backend", FLOAT32_BACKENDS)
def test_empty_batches_and_pools_give_zeros(backend):
    pages, q, table, none = moved(
        torch.zeros(0, 4, 2, 16),
        torch.ones(2, 3, 2, 16),
        torch.zeros(2, 1, dtype=torch.int32),
        torch.zeros(2, dtype=torch.int32),
    )
    assert not paged_attention(q, pages, pages, table, none, backend=backend).any()
    assert not paged_attention(q, pages, pages, table[:, :0], none, backend=backend).any()
    empty = paged_attention(q[:0], pages, pages, table[:0], none[:0], backend=backend)
    assert empty.shape == (0, 3, 2, 16)


def test_pages_that_share_addresses_are_refused():
    k, slots = torch.zeros(1, 3, 2, 16), torch.zeros(1, 3, dtype=torch.int64)
    pages = torch.zeros(4, 4, 2, 16)
    with pytest.raises(ValueError, match="must not share memory"):
        append_paged_kv(k, k, pages, pages, slots)
    with pytest.raises(ValueError, match="k_pages_PNHD must not be expanded"):
        append_paged_kv(k, k, pages[:1].expand(4, -1, -1, -1), pages, slots)
    with pytest.raises(ValueError, match="k_pages_PNHD must have page_size >= 1"):
        append_paged_kv(k, k, pages[:, :0], pages[:, :0], slots)


def test_inference_only_ops_refuse_gradients():
    pages = torch.zeros(4, 4, 2, 16)
    q = torch.zeros(1, 3, 2, 16, requires_grad=True)
    with pytest.raises(RuntimeError, match="append_paged_kv: has no gradient"):
        append_paged_kv(q, q, pages, pages.clone(), torch.zeros(1, 3, dtype=torch.int64))
    table, lengths = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="paged_attention: has no gradient"):
        paged_attention(q, pages, pages, table, lengths)


@pytest.mark.parametrize("backend", FLOAT32_BACKENDS)
def test_opcheck_passes(backend):
    inputs = moved(*paged.sample_inputs(torch.float32, torch.Generator().manual_seed(3))[1])
    torch.library.opcheck(paged.paged_attention_op.overload, (*inputs, 0.25, backend))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_opcheck_of_append_passes(backend):
    generator = torch.Generator().manual_seed(3)
    inputs = append.sample_inputs(torch.float32, generator)[1]
    torch.library.opcheck(append.append_paged_kv_op.overload, (*inputs, backend))


def test_wrong_arguments_are_named():
    q, pages = torch.zeros(2, 3, 2, 16), torch.zeros(4, 4, 2, 16)
    table, lengths = torch.zeros(2, 2, dtype=torch.int32), torch.ones(2, dtype=torch.int32)
    with pytest.raises(TypeError, match=r"page_table_BM must be int32; got torch.int64"):
        paged_attention(q, pages, pages, table.long(), lengths)
    with pytest.raises(ValueError, match=r"page_table_BM must have 2 rows to match q_BTHD"):
        paged_attention(q, pages, pages, table[:1], lengths)
    with pytest.raises(ValueError, match=r"k_pages_PNHD must end in \(H, D\) = \(2, 16\)"):
        paged_attention(q, pages[:, :, :1], pages, table, lengths)
    with pytest.raises(ValueError, match=r"kv_lens_B must be \(2,\) to match q_BTHD"):
        paged_attention(q, pages, pages, table, lengths[:1])


# Two axes of stride 1, as of sliding windows: a copy may order them the other way round.
@pytest.mark.parametrize("strides", [(40, 1, 16, 1), (40, 16, 1, 1), (1, 40, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sliding_windows_are_taken_as_they_are(dtype, strides):
    generator = torch.Generator().manual_seed(2)
    values, k_pages, v_pages = (
        torch.randn(*shape, generator=generator).to(dtype)
        for shape in ((200,), (2, 4, 3, 16), (2, 4, 3, 16))
    )
    q = values.as_strided((2, 2, 3, 16), strides)
    table, lengths = torch.tensor([[1], [0]], dtype=torch.int32), torch.tensor([4, 3]).int()
    pages = k_pages, v_pages, table, lengths
    expected = paged_attention(q, *pages, backend="reference")
    bound = 1e-5 if dtype == torch.float32 else 0.02
    assert (paged_attention(q, *pages, backend="cpu") - expected).abs().max() < bound
