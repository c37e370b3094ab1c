"""8-bit K/V: the rounding by exact arithmetic, then every backend that writes or reads pages."""

from fractions import Fraction

import pytest
import torch
from compare import (
    SCORE_SIZES,
    Tally,
    assert_softmax,
    backends_for,
    cases,
    draws,
    moved,
    name_of,
    random_cases,
)
from test_paged_attention import paged_case_of_size, plain_attention, random_case

from variant_kernels import append_paged_kv, paged_attention, qk_norm, qk_norm_append_paged_kv
from variant_kernels.kv_quantization import KV8_DTYPE, dequantize_kv, quantize_kv, scale_values
from variant_kernels.ops import append_paged_kv as append
from variant_kernels.ops import paged_attention as paged
from variant_kernels.ops import qk_norm_append_paged_kv as fused

PAGED_CASES = cases(paged.paged_attention_op.backends, KV8_DTYPE)
APPEND_CASES = cases(append.append_paged_kv_op.backends, KV8_DTYPE)
FUSED_CASES = cases(fused.qk_norm_append_paged_kv_op.backends, KV8_DTYPE)

# --- the rounding -------------------------------------------------------------------------------


def e4m3_values() -> list[Fraction]:
    """Every finite value that is not negative, by the format's definition (arXiv 2209.05433)."""
    subnormal = [Fraction(m, 8) * Fraction(1, 64) for m in range(8)]
    normal = [(1 + Fraction(m, 8)) * Fraction(2) ** (e - 7) for e in range(1, 16) for m in range(8)]
    return subnormal + normal[:-1]  # the last pattern is NaN


def nearest(x: Fraction, values: list[Fraction]) -> Fraction:
    """Ties go to the even pattern."""
    order = sorted(range(len(values)), key=lambda i: (abs(values[i] - abs(x)), i % 2))
    return values[order[0]] if x >= 0 else -values[order[0]]


def exact_row(row: torch.Tensor) -> list[Fraction]:
    """The values and scale that a row must round to, in exact arithmetic."""
    numbers = [Fraction(x) for x in row.double().tolist()]
    exponent = -126
    while max(map(abs, numbers)) > 448 * Fraction(2) ** exponent:
        exponent += 1
    scale = Fraction(2) ** exponent
    values = e4m3_values()
    return [nearest(x / scale, values) * scale for x in numbers]


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.nightly)],
    ids=name_of,
)
def test_rows_round_as_exact_arithmetic_says(dtype):
    generator = torch.Generator().manual_seed(1)
    largest = 1e4 if dtype == torch.float16 else 1e30
    for size in (0.0, 1e-45, 1e-38, 1e-6, 0.9, 1.75, 1.7500001, 448.0, largest):
        rows = torch.randn(6, 16, generator=generator)
        rows = (rows / rows.abs().amax(-1, keepdim=True) * size).to(dtype)
        # Within a row: magnitudes from the largest down to below the smallest e4m3 value.
        rows[3:] *= torch.logspace(0, -7, 16)
        values, scales = quantize_kv(rows.unsqueeze(1))
        decoded = dequantize_kv(values, scales).squeeze(1)
        for row, ours in zip(rows, decoded, strict=True):
            # Numbers below float32's range have rounded to zero, so no flushing is visible.
            assert [Fraction(x) for x in ours.double().tolist()] == exact_row(row), size


def test_a_scale_is_the_smallest_power_of_two_that_holds_its_row():
    rows = torch.tensor([448.0, 449.0, 224.0, 224.1, 1.75, 1.0, 0.0, 3e38]).view(-1, 1, 1)
    _, scales = quantize_kv(rows.expand(-1, 1, 16))
    expected = [1.0, 2.0, 0.5, 1.0, 2.0**-8, 2.0**-8, 2.0**-126, 2.0**120]
    assert scale_values(scales).flatten().tolist() == expected


def test_what_is_read_back_is_the_same_in_16_bits():
    x = torch.randn(500, 3, 64, generator=torch.Generator().manual_seed(2))
    x *= torch.logspace(-6, 3, 500).view(-1, 1, 1)
    for dtype in (torch.bfloat16, torch.float16):
        values, scales = quantize_kv(x.to(dtype))
        wide = dequantize_kv(values, scales)
        assert torch.equal(dequantize_kv(values, scales, dtype).float(), wide)


# --- writing ------------------------------------------------------------------------------------


def empty_pool(like: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Pages of bytes that are NaN to e4m3, and scales of 2^128; strides beyond the shape's."""
    pages, size, heads, head_dim = like.shape
    pool = torch.full((pages, 2, size, heads + 1, head_dim), 0x7F, dtype=torch.uint8)
    scales = torch.full((2, pages, size + 1, heads), 255, dtype=torch.uint8)
    k_pages, v_pages = pool[:, :, :, :heads].view(KV8_DTYPE).unbind(1)
    k_scales, v_scales = scales[:, :, :size].unbind(0)
    return k_pages, v_pages, k_scales, v_scales


def same(ours: torch.Tensor, expected: torch.Tensor) -> bool:
    """Bit by bit."""
    return torch.equal(ours.cpu().view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize(("backend", "dtype"), APPEND_CASES, ids=name_of)
def test_appended_tokens_are_the_rounded_ones_bit_by_bit(backend, dtype):
    generator = torch.Generator().manual_seed(3)
    for k, v, k_pages, _, slots in append.sample_inputs(dtype, generator):
        # Sizes that differ by token, and a row of zeros.
        k = k * torch.logspace(-4, 3, k.shape[1]).to(dtype).view(-1, 1, 1)
        v = v.clone()
        v[0, 0] = 0
        pool = empty_pool(k_pages)
        *pages, k_scales, v_scales = moved(*(x.clone() for x in pool))
        args = moved(k, v, slots)
        append_paged_kv(
            *args[:2],
            *pages,
            args[2],
            k_scales_PNH=k_scales,
            v_scales_PNH=v_scales,
            backend=backend,
        )
        for new, values, scales, old, old_scales in zip(
            (k, v), pages, (k_scales, v_scales), pool[:2], pool[2:], strict=True
        ):
            expected = old.contiguous().view(torch.uint8).flatten(0, 1)
            expected_scales = old_scales.contiguous().flatten(0, 1)
            rounded, row_scales = quantize_kv(new)
            for b in range(new.shape[0]):
                for t in range(new.shape[1]):
                    if slots[b, t] >= 0:
                        expected[slots[b, t]] = rounded[b, t].view(torch.uint8)
                        expected_scales[slots[b, t]] = row_scales[b, t]
            assert same(values.contiguous().flatten(0, 1), expected)
            assert same(scales.contiguous().flatten(0, 1), expected_scales)


@pytest.mark.parametrize(("backend", "dtype"), FUSED_CASES, ids=name_of)
def test_the_fused_op_equals_its_two_halves_bit_by_bit(backend, dtype):
    generator = torch.Generator().manual_seed(4)
    for qkv, scale, k_pages, _, slots in fused.sample_inputs(dtype, generator):
        qkv, slots = moved(qkv, slots)
        scale = None if scale is None else moved(scale)[0]
        pools = [moved(*empty_pool(k_pages)) for _ in range(2)]
        q, k, v = qkv.unbind(2)
        if scale is not None:
            q, k = qk_norm(q, k, scale, backend=backend)
        *halves, k_scales, v_scales = pools[0]
        append_paged_kv(
            k, v, *halves, slots, k_scales_PNH=k_scales, v_scales_PNH=v_scales, backend=backend
        )
        *pages, k_scales, v_scales = pools[1]
        ours = qk_norm_append_paged_kv(
            qkv, scale, *pages, slots, k_scales_PNH=k_scales, v_scales_PNH=v_scales, backend=backend
        )
        assert torch.equal(ours, q)
        for one, other in zip(*pools, strict=True):
            assert same(one.contiguous(), other.cpu().contiguous())


@pytest.mark.parametrize(("backend", "dtype"), APPEND_CASES, ids=name_of)
def test_entries_that_are_not_finite_are_read_back_as_nan(backend, dtype):
    k = torch.ones(1, 2, 1, 16, dtype=dtype)
    k[0, 0, 0, 3], k[0, 1, 0, 5] = torch.inf, torch.nan
    pages = torch.zeros(2, 1, 2, 1, 16, dtype=torch.uint8).view(KV8_DTYPE)
    scales = torch.zeros(2, 1, 2, 1, dtype=torch.uint8)
    k, slots, *target = moved(k, torch.tensor([[0, 1]]), *pages, *scales)
    append_paged_kv(
        k, k, *target[:2], slots, k_scales_PNH=target[2], v_scales_PNH=target[3], backend=backend
    )
    read = dequantize_kv(target[0].cpu(), target[2].cpu())
    assert read[0, 0, 0].isnan().nonzero().tolist() == [[3]]
    assert read[0, 1, 0].isnan().nonzero().tolist() == [[5]]


# --- reading ------------------------------------------------------------------------------------


def in_8_bits(pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values, scales and the numbers that they represent; NaN stays NaN in both."""
    values, scales = quantize_kv(pages)
    poisoned = pages.isnan().any(-1)
    values.view(torch.uint8)[poisoned] = 0x7F
    scales[poisoned] = 255
    return values, scales, dequantize_kv(values, scales, torch.float64)


@pytest.mark.parametrize(("backend", "dtype"), PAGED_CASES, ids=name_of)
def test_attention_matches_float64_and_reads_no_poisoned_slot(backend, dtype):
    tally, generator = Tally(), torch.Generator().manual_seed(5)
    problems = [
        (f"{tuple(inputs[0].shape)}", inputs, None)
        for _, inputs in draws(paged.sample_inputs, dtype, generator)
    ]
    problems += [(f"{i}", *random_case(dtype, generator)) for i in random_cases(12)]
    for name, (q, k_pages, v_pages, table, lengths), scale in problems:
        k_values, k_scales, k_exact = in_8_bits(k_pages)
        v_values, v_scales, v_exact = in_8_bits(v_pages)
        exact = plain_attention(q.double(), k_exact, v_exact, table, lengths, scale)
        # The same numbers: 16 bits hold every product of an e4m3 value and its scale.
        plain = plain_attention(q, k_exact.to(dtype), v_exact.to(dtype), table, lengths, scale)
        args = moved(q, k_values, v_values, table, lengths, k_scales, v_scales)
        *inputs, k_scales, v_scales = args
        ours = paged_attention(
            *inputs,
            softmax_scale=scale,
            k_scales_PNH=k_scales,
            v_scales_PNH=v_scales,
            backend=backend,
        ).cpu()
        tally.add(name, ours, plain, exact)
        assert not ours[lengths == 0].any()
    tally.check()


@pytest.mark.parametrize(("exponent", "scale"), SCORE_SIZES)
@pytest.mark.parametrize(("backend", "dtype"), PAGED_CASES, ids=name_of)
def test_finite_scores_of_any_size_give_their_softmax(backend, dtype, exponent, scale):
    q, *pages, table, lengths = paged_case_of_size(
        exponent, dtype, torch.Generator().manual_seed(exponent)
    )
    (k_values, k_scales, k_exact), (v_values, v_scales, v_exact) = map(in_8_bits, pages)
    exact = plain_attention(q.double(), k_exact, v_exact, table, lengths, scale)
    *inputs, k_scales, v_scales = moved(q, k_values, v_values, table, lengths, k_scales, v_scales)
    ours = paged_attention(
        *inputs, softmax_scale=scale, k_scales_PNH=k_scales, v_scales_PNH=v_scales, backend=backend
    ).cpu()
    assert_softmax(ours, exact)


@pytest.mark.parametrize(("backend", "dtype"), PAGED_CASES, ids=name_of)
def test_a_visible_nan_is_seen(backend, dtype):
    values, scales = quantize_kv(torch.ones(2, 1, 4, 1, 16))
    values.view(torch.uint8)[0, 0, 1, 0, 5] = 0x7F
    table, lengths = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([2], dtype=torch.int32)
    q = torch.ones(1, 3, 1, 16, dtype=dtype)
    q, k, v, table, lengths, k_scales, v_scales = moved(q, *values, table, lengths, *scales)
    out = paged_attention(
        q, k, v, table, lengths, k_scales_PNH=k_scales, v_scales_PNH=v_scales, backend=backend
    )
    assert out.isnan().all()


# --- the contract -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "impls",
    [
        paged.paged_attention_op.backends,
        append.append_paged_kv_op.backends,
        fused.qk_norm_append_paged_kv_op.backends,
    ],
)
def test_whoever_serves_exact_pages_serves_8_bits(impls):
    # A backend that refused would be absent from every test above (flash, flashinfer: 16 bits).
    assert backends_for(impls, torch.float32, KV8_DTYPE) == backends_for(impls, torch.float32)


@pytest.mark.parametrize(
    "backend", backends_for(paged.paged_attention_op.backends, torch.float32, KV8_DTYPE)
)
def test_opcheck_passes(backend):
    generator = torch.Generator().manual_seed(6)
    q, k_pages, v_pages, table, lengths = paged.sample_inputs(torch.float32, generator)[1]
    k_values, k_scales, _ = in_8_bits(k_pages)
    v_values, v_scales, _ = in_8_bits(v_pages)
    args = moved(q, k_values, v_values, table, lengths)
    scales = moved(k_scales, v_scales)
    # test_schema compares inputs before and after with an operation that no 8-bit float has.
    torch.library.opcheck(
        paged.paged_attention_op.overload,
        (*args, 0.25, backend, *scales),
        test_utils=("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"),
    )
    compiled = torch.compile(
        lambda q, k, v, table, lengths, k_scales, v_scales: paged_attention(
            q, k, v, table, lengths, k_scales_PNH=k_scales, v_scales_PNH=v_scales, backend=backend
        ),
        fullgraph=True,
        backend="aot_eager",
    )
    expected = paged.paged_attention_op(*args, q.shape[-1] ** -0.5, backend, *scales)
    assert torch.equal(compiled(*args, *scales), expected)


def test_scales_and_dtypes_that_do_not_fit_are_named():
    q, pages = torch.zeros(2, 3, 2, 16), torch.zeros(4, 4, 2, 16)
    table, lengths = torch.zeros(2, 2, dtype=torch.int32), torch.ones(2, dtype=torch.int32)
    narrow, scales = pages.to(KV8_DTYPE), torch.ones(4, 4, 2, dtype=torch.uint8)
    rest, slots = (table, lengths), torch.arange(6).view(2, 3)
    wide, one = scales.float(), scales[:1].expand(4, -1, -1)
    with pytest.raises(ValueError, match="v_scales_PNH must be given where the other scales are"):
        paged_attention(q, narrow, narrow, *rest, k_scales_PNH=scales)
    with pytest.raises(TypeError, match=r"k_pages_PNHD must be float8_e4m3fn .* without scales"):
        paged_attention(q, narrow, narrow, *rest)
    with pytest.raises(TypeError, match=r"k_pages_PNHD must be float8_e4m3fn .* got float32 with"):
        paged_attention(q, pages, pages, *rest, k_scales_PNH=scales, v_scales_PNH=scales)
    with pytest.raises(ValueError, match=r"v_scales_PNH must be \(4, 4, 2\) to match k_pages_PNHD"):
        paged_attention(q, narrow, narrow, *rest, k_scales_PNH=scales, v_scales_PNH=scales[:3])
    with pytest.raises(TypeError, match="k_scales_PNH must be uint8; got float32"):
        paged_attention(q, narrow, narrow, *rest, k_scales_PNH=wide, v_scales_PNH=wide)
    with pytest.raises(ValueError, match="k_scales_PNH and v_scales_PNH must not share memory"):
        append_paged_kv(
            q, q, narrow, narrow.clone(), slots, k_scales_PNH=scales, v_scales_PNH=scales
        )
    with pytest.raises(ValueError, match="k_scales_PNH must not be expanded"):
        paged_attention(q, narrow, narrow, *rest, k_scales_PNH=one, v_scales_PNH=one)


def test_only_8_bit_pages_are_asked_for_as_such():
    op = append.append_paged_kv_op
    tokens, slots = torch.ones(1, 2, 3, 16), torch.arange(2)[None]
    scales = torch.zeros(4, 8, 3, dtype=torch.uint8)
    for dtype in (torch.float32, KV8_DTYPE):
        pages = torch.zeros(4, 8, 3, 16).to(dtype)
        extra = (scales, scales) if dtype is KV8_DTYPE else ()
        request = op._request(tokens, tokens, pages, pages, slots, *extra)
        assert request.kv_dtype == (KV8_DTYPE if extra else None)
        assert request.head_dim == 16
