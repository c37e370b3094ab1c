"""8-bit K and V in Triton: every code, every rounding, split keys, bounds checks, tuning."""

from dataclasses import replace

import pytest
import torch
from compare import DEVICE, DTYPES, Tally, moved, name_of
from test_kv8 import in_8_bits
from test_paged_attention import plain_attention, random_case

from variant_kernels import paged_attention
from variant_kernels.dispatch.request import Request
from variant_kernels.dispatch.support import triton_interprets, triton_unsupported
from variant_kernels.kv_quantization import KV8_DTYPE, quantize_kv

reason = triton_unsupported(Request(DEVICE, (torch.float32,), 64))
if reason is not None:
    pytest.skip(f"{reason} (TRITON_INTERPRET=1 interprets)", allow_module_level=True)

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from variant_kernels.triton_ops import append_paged_kv as append  # noqa: E402
from variant_kernels.triton_ops import paged_attention as paged  # noqa: E402
from variant_kernels.triton_ops import paged_attention_configs as configs  # noqa: E402
from variant_kernels.triton_ops import qk_norm_append_paged_kv as fused  # noqa: E402
from variant_kernels.triton_ops import tuning  # noqa: E402
from variant_kernels.triton_ops.e4m3 import e4m3_decode, e4m3_encode, quantised  # noqa: E402


@triton.jit
def decode_kernel(codes_ptr, out_ptr):
    i = tl.arange(0, 256)
    tl.store(out_ptr + i, e4m3_decode(tl.load(codes_ptr + i)).to(out_ptr.dtype.element_ty))


@triton.jit
def encode_kernel(x_ptr, codes_ptr, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    tl.store(codes_ptr + i, e4m3_encode(tl.load(x_ptr + i)))


@triton.jit
def quantise_kernel(x_ptr, codes_ptr, scales_ptr, ROWS: tl.constexpr, D: tl.constexpr):
    """Rows of D entries in a block of 32 columns."""
    row, column = tl.arange(0, ROWS), tl.arange(0, 32)
    offset, inside = row[:, None] * D + column[None, :], (column < D)[None, :] & (row >= 0)[:, None]
    # On a GPU anything may lie outside the mask.
    x = tl.load(x_ptr + offset, mask=inside, other=60000.0)
    codes, scales = quantised(x, inside)
    tl.store(codes_ptr + offset, codes, mask=inside)
    tl.store(scales_ptr + row, scales)


def bits(x):
    return x.cpu().view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_all_256_codes_are_decoded(dtype):
    codes = torch.arange(256).to(torch.uint8)
    args, out = moved(codes, torch.empty(256, dtype=dtype))
    decode_kernel[(1,)](args, out)
    expected = codes.view(KV8_DTYPE).float()
    assert expected.isnan().nonzero().flatten().tolist() == [0x7F, 0xFF]
    assert torch.equal(out.cpu().isnan(), expected.isnan())
    # Zeros keep their signs.
    wide, numbers = out.cpu().float().nan_to_num(), expected.nan_to_num()
    assert torch.equal(wide.view(torch.int32), numbers.view(torch.int32))


def test_codes_ties_and_their_neighbours_are_encoded():
    exact = torch.arange(127).to(torch.uint8).view(KV8_DTYPE).float()
    ties = (exact[1:] + exact[:-1]) / 2
    numbers = torch.cat((exact, ties))
    infinity = torch.tensor(torch.inf)
    numbers = torch.cat((numbers, numbers.nextafter(infinity), numbers.nextafter(-infinity)))
    numbers = torch.cat((numbers, torch.logspace(-45, 2.65, 500), torch.randn(500) * 100))
    numbers = numbers[numbers.abs() <= 448]
    numbers = torch.cat((numbers, -numbers))
    count = 1 << (len(numbers) - 1).bit_length()
    numbers = torch.nn.functional.pad(numbers, (0, count - len(numbers)))
    args, codes = moved(numbers, torch.empty(count, dtype=torch.uint8))
    encode_kernel[(1,)](args, codes, COUNT=count)
    assert torch.equal(codes.cpu(), bits(numbers.to(KV8_DTYPE)))


def test_what_no_code_stands_for_is_nan():
    numbers = torch.tensor([448.00003, 1e30, torch.inf, torch.nan])
    args, codes = moved(torch.cat((numbers, -numbers)), torch.empty(8, dtype=torch.uint8))
    encode_kernel[(1,)](args, codes, COUNT=8)
    assert ((codes.cpu() & 0x7F) == 0x7F).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_rows_of_every_size_are_quantised_bit_by_bit(dtype):
    generator = torch.Generator().manual_seed(1)
    info = torch.finfo(dtype)
    smallest, largest = info.smallest_normal * info.eps, info.max
    rows = torch.randn(512, 24, generator=generator, dtype=torch.float64)
    rows /= rows.abs().amax(-1, keepdim=True)
    sizes = torch.linspace(0, 1, 512, dtype=torch.float64)
    rows *= (smallest ** (1 - sizes) * largest**sizes).unsqueeze(1)
    # Within some rows: down to below the smallest code.
    rows[::2] *= torch.logspace(0, -5, 24, dtype=torch.float64)
    rows = rows.to(dtype)
    if triton_interprets() and dtype == torch.bfloat16:
        # The interpreter reads subnormal bfloat16 as zero.
        rows[rows.abs() < info.smallest_normal] = 0
    rows[1] = 0
    rows[3, 0], rows[5, 0], rows[7, 0] = 1.75, 448.0, -1.7578125
    assert rows.isfinite().all()
    codes, scales = torch.empty_like(rows, dtype=torch.uint8), torch.empty(512, dtype=torch.uint8)
    args, codes, scales = moved(rows, codes, scales)
    quantise_kernel[(1,)](args, codes, scales, ROWS=512, D=24)
    expected, expected_scales = quantize_kv(rows.unsqueeze(1))
    assert torch.equal(scales.cpu(), expected_scales.flatten())
    assert torch.equal(codes.cpu(), bits(expected.squeeze(1)))


def test_keys_of_8_bits_split_over_programs_match_float64(monkeypatch):
    monkeypatch.setattr(paged, "num_splits", lambda *, tiles, **_: min(tiles, 5))
    tally, generator = Tally(), torch.Generator().manual_seed(2)
    for index in range(2):
        (q, k_pages, v_pages, *rest), scale = random_case(torch.float16, generator)
        k_values, k_scales, k_exact = in_8_bits(k_pages)
        v_values, v_scales, v_exact = in_8_bits(v_pages)
        exact = plain_attention(q.double(), k_exact, v_exact, *rest, scale)
        plain = plain_attention(q, k_exact.to(q.dtype), v_exact.to(q.dtype), *rest, scale)
        args = moved(q, k_values, v_values, *rest, k_scales, v_scales)
        ours = paged_attention(
            *args[:5],
            softmax_scale=scale,
            k_scales_PNH=args[5],
            v_scales_PNH=args[6],
            backend="triton",
        ).cpu()
        tally.add(str(index), ours, plain, exact)
        assert not ours[rest[1] == 0].any()
    tally.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=name_of)
def test_scales_that_only_float32_or_no_probability_can_hold(dtype):
    # 2^-126 and beyond 1 for float32; for float16 all that its numbers need, 2^-32 to 2^8.
    first, last = (1, 240) if dtype == torch.float32 else (95, 135)
    codes = torch.full((1, 1, 1, 16), 0x38, dtype=torch.uint8)  # 1.0
    q, table, lengths = torch.zeros(1, 1, 1, 16, dtype=dtype), torch.zeros(1, 1), torch.ones(1)
    for scale in (first, 119, 127, last):
        scales = torch.full((1, 1, 1), scale, dtype=torch.uint8)
        args = moved(q, codes.view(KV8_DTYPE), table.int(), lengths.int(), scales)
        out = paged_attention(
            *(args[0], args[1], args[1], args[2], args[3]),
            k_scales_PNH=args[4],
            v_scales_PNH=args[4],
            backend="triton",
        )
        expected = torch.tensor(2.0 ** (scale - 127), dtype=torch.float64).to(dtype)
        assert (out.cpu() == expected).all(), scale


@pytest.mark.parametrize("norm", [True, False, None])
def test_slots_outside_the_pool_are_skipped_with_their_scales(norm):
    # The ops check values on the CPU only; on a GPU the kernel must stay inside the pool.
    qkv = torch.randn(1, 4, 3, 3, 16, generator=torch.Generator().manual_seed(3))
    before = torch.full((2, 3, 4, 3, 16), 0x55, dtype=torch.uint8)
    scales = torch.full((2, 3, 4, 3), 0x66, dtype=torch.uint8)
    moved_qkv, slots, *pools = moved(
        qkv, torch.tensor([[12, 5, -2, 2**40]]), *before.clone().view(KV8_DTYPE), *scales.clone()
    )
    names = ("k_pages_PNHD", "v_pages_PNHD", "k_scales_PNH", "v_scales_PNH")
    target = {"slots_BT": slots, **dict(zip(names, pools, strict=True))}
    if norm is None:
        append.launch_append_paged_kv(
            k_BTHD=moved_qkv[:, :, 1], v_BTHD=moved_qkv[:, :, 2], **target
        )
    else:
        scale = moved(torch.zeros(1, 3, 1, 1))[0] if norm else None
        fused.launch_qk_norm_append_paged_kv(qkv_BT3HD=moved_qkv, scale_mul_1H11=scale, **target)
    values, row_scales = quantize_kv(qkv[0, 1, 2])
    for i in range(2):
        written = (bits(pools[i]) != before[i]).flatten(2).any(2)
        assert written.nonzero().tolist() == [[1, 1]]
        written = (pools[2 + i].cpu() != scales[i]).any(-1)
        assert written.nonzero().tolist() == [[1, 1]]
    assert torch.equal(bits(pools[1])[1, 1], bits(values))
    assert torch.equal(pools[3].cpu()[1, 1], row_scales)


def test_calls_of_8_bits_are_tuned_apart(monkeypatch):
    keys = []

    def best(kernel, configs, key, launch, device):
        keys.append(key)
        return configs[0]

    monkeypatch.setattr(tuning, "best", best)
    q, pages = torch.zeros(1, 2, 1, 16), torch.zeros(1, 4, 1, 16)
    rest = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    args = moved(q, pages, *rest, pages.to(KV8_DTYPE), torch.ones(1, 4, 1, dtype=torch.uint8))
    q, exact, table, lengths, narrow, scales = args
    paged_attention(q, exact, exact, table, lengths, backend="triton")
    with_scales = {"k_scales_PNH": scales, "v_scales_PNH": scales}
    paged_attention(q, narrow, narrow, table, lengths, backend="triton", **with_scales)
    assert len(set(keys)) == 2


def test_wide_heads_of_8_bits_have_block_sizes_for_every_number_of_queries():
    for kind, by_queries in configs._CONFIGS.items():
        narrow = configs.configs_by_queries(kind, wide=True, kv8=True)
        assert narrow.keys() == by_queries.keys()
        assert all(narrow.values()), kind
        assert configs.configs_by_queries(kind, wide=False, kv8=True) is by_queries
        # A limit of registers would make wide heads spill.
        assert configs.configs_by_queries(kind, wide=True, kv8=False) == {
            queries: tuple(replace(config, maxnreg=None) for config in choices)
            for queries, choices in by_queries.items()
        }
