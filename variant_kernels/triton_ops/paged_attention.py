"""paged_attention in Triton. B batch, T queries, H heads, D head width, P pages, N tokens of a
page, M page-table entries; inside the kernels Q queries and K keys of a tile, S parts of the keys.

A program computes one query tile of one head of one sequence. If these programs are too few for
the GPU, the keys are split over several programs; each writes its part and softmax statistics, and
a second kernel combines the parts in a fixed order (Flash-Decoding). Lengths are read on the GPU
only.
"""

# Triton's compiler gives a kernel's arguments other types than Python's checker sees.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# Variables that are assigned and read under the same compile-time constant are bound.
# pyright: reportPossiblyUnboundVariable=false

from __future__ import annotations

from math import e, log2

import torch
import triton
import triton.language as tl

from variant_kernels.split_keys import num_splits
from variant_kernels.triton_ops import common, tuning
from variant_kernels.triton_ops.block_causal_attention import SMALLEST, query_factors
from variant_kernels.triton_ops.common import on_device_of, padded
from variant_kernels.triton_ops.e4m3 import (
    e4m3_decode,
    page_bytes,
    scale_arguments,
    scale_of,
)
from variant_kernels.triton_ops.paged_attention_configs import (
    configs_for,
    pages_kind,
    resident_programs,
)
from variant_kernels.triton_ops.tuning import Config


@triton.jit
def attend_pages(
    out,
    total,
    largest,
    q,
    k_base,
    v_base,
    table_base,
    k_stride_p,
    k_stride_n,
    v_stride_p,
    v_stride_n,
    k_scales_base,
    v_scales_base,
    k_scales_stride_p,
    k_scales_stride_n,
    v_scales_stride_p,
    v_scales_stride_n,
    num_pages,
    first,
    last,
    scale_log2,
    KV8: tl.constexpr,
    CONSECUTIVE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Online softmax over the tokens from ``first`` to ``last`` of one sequence; scale_log2: (Q,).

    With CONSECUTIVE the bases are those of the sequence's first page, and token s is row s from
    there. Otherwise the table is read for every token.

    With KV8 keys and values are decoded as late as possible, because decoded tiles take more
    registers. Scales are multiplied into the keys and values: probabilities times a scale may
    underflow in float16, and the columns of scores have another layout, for which the compiler
    would load the page table again.
    """
    columns = tl.arange(0, D_PADDED)
    for start in tl.range(first, last, BLOCK_K):
        rows = tl.arange(0, BLOCK_K)
        visible = rows < last - start
        if CONSECUTIVE:
            # 64-bit address of the tile plus 32-bit offsets: only a scalar changes in the loop.
            wide_start = tl.cast(start, tl.int64)
            k_rows = k_base + wide_start * k_stride_n + rows * k_stride_n
            v_rows = v_base + wide_start * v_stride_n + rows * v_stride_n
            if KV8:
                k_scales = wide_start * k_scales_stride_n + rows * k_scales_stride_n
                v_scales = wide_start * v_scales_stride_n + rows * v_scales_stride_n
        else:
            tokens = start + rows
            if MASKED:
                pages = tl.load(table_base + tokens // PAGE_SIZE, mask=visible, other=0)
            else:
                pages = tl.load(table_base + tokens // PAGE_SIZE)
            # Not validated on a GPU: clamp, so that a bad entry cannot read outside the pool.
            pages = tl.minimum(tl.maximum(pages, 0), num_pages - 1).to(tl.int64)
            slots = tokens % PAGE_SIZE
            k_rows = k_base + pages * k_stride_p + slots * k_stride_n
            v_rows = v_base + pages * v_stride_p + slots * v_stride_n
            if KV8:
                k_scales = pages * k_scales_stride_p + slots * k_scales_stride_n
                v_scales = pages * v_scales_stride_p + slots * v_scales_stride_n
        k_pointers = k_rows[:, None] + columns[None, :]
        v_pointers = v_rows[:, None] + columns[None, :]
        if KV8:
            if MASKED:
                k_exponents = tl.load(k_scales_base + k_scales, mask=visible, other=0)
                v_exponents = tl.load(v_scales_base + v_scales, mask=visible, other=0)
            else:
                k_exponents = tl.load(k_scales_base + k_scales)
                v_exponents = tl.load(v_scales_base + v_scales)
        # Slots past the length may hold NaN, and 0 * NaN is NaN: load zeros instead.
        if MASKED:
            inside = visible[:, None] & (columns < D)[None, :]
            k = tl.load(k_pointers, mask=inside, other=0)
            v = tl.load(v_pointers, mask=inside, other=0)
        elif D == D_PADDED:
            k = tl.load(k_pointers)
            v = tl.load(v_pointers)
        else:
            k = tl.load(k_pointers, mask=(columns < D)[None, :], other=0)
            v = tl.load(v_pointers, mask=(columns < D)[None, :], other=0)
        if KV8:
            k = (e4m3_decode(k) * scale_of(k_exponents)[:, None]).to(q.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if MASKED:
            scores = tl.where(visible[None, :], scores, float("-inf"))
        # Unscaled: see attend_tiles in block_causal_attention.
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        probs = tl.exp2((scores - new_largest[:, None]) * scale_log2[:, None])
        shrink = tl.exp2((largest - new_largest) * scale_log2)
        total = total * shrink + tl.sum(probs, 1)
        if KV8:
            v = (e4m3_decode(v) * scale_of(v_exponents)[:, None]).to(q.dtype)
        out = tl.dot(probs.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
        largest = new_largest
    return out, total, largest


# Sizes that vary with the scale, the batch and the depth. Specialised on divisibility by 16 (and on
# 1), they would give a dozen kernels that take a second each to compile.
COUNTS = ("table_stride", "batch", "num_queries", "heads", "num_pages", "entries", "splits")


@triton.jit(do_not_specialize=COUNTS)
def paged_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    lens_ptr,
    out_ptr,
    statistics_ptr,
    scale_ptr,
    q_stride_b,
    q_stride_t,
    q_stride_h,
    k_stride_p,
    k_stride_n,
    k_stride_h,
    v_stride_p,
    v_stride_n,
    v_stride_h,
    table_stride,
    lens_stride,
    k_scales_ptr,
    v_scales_ptr,
    k_scales_stride_p,
    k_scales_stride_n,
    v_scales_stride_p,
    v_scales_stride_n,
    batch,
    num_queries,
    heads,
    num_pages,
    entries,
    splits,
    scale_log2,
    KV8: tl.constexpr,
    CONSECUTIVE: tl.constexpr,
    NEGATE: tl.constexpr,
    SPLIT: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One query tile over one part of the keys; scale_log2 > 0, q negated if NEGATE.

    With KV8 pages are bytes and have scales. With CONSECUTIVE the pages of a sequence follow one
    another, so that only the first entry of its table is read.
    scale_ptr: (H,) logarithms of qk_norm's scales, or None; keys are normalised already.
    out: (B, T, H, D); with SPLIT float32 (S, B, T, H, D), and statistics (2, S, B, T, H) are the
    largest score of each query, unscaled without scale_ptr, and its sum of exponentials.
    """
    tiles = tl.cdiv(num_queries, BLOCK_Q)
    tile = tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles % heads
    sequence = tl.program_id(0) // tiles // heads
    split = sequence // batch
    b, h = (sequence % batch).to(tl.int64), head.to(tl.int64)
    kv_len = tl.load(lens_ptr + b * lens_stride)
    kv_len = tl.minimum(tl.maximum(kv_len, 0), entries * PAGE_SIZE)
    k_base, v_base = k_ptr + h * k_stride_h, v_ptr + h * v_stride_h
    table_base = table_ptr + b * table_stride
    if KV8:
        k_scales_ptr += h
        v_scales_ptr += h
    if CONSECUTIVE:
        # Not validated on a GPU: stay inside the pool.
        page = tl.minimum(tl.maximum(tl.load(table_base), 0), num_pages - 1)
        kv_len = tl.minimum(kv_len, (num_pages - page) * PAGE_SIZE)
        k_base += page.to(tl.int64) * k_stride_p
        v_base += page.to(tl.int64) * v_stride_p
        if KV8:
            k_scales_ptr += page.to(tl.int64) * k_scales_stride_p
            v_scales_ptr += page.to(tl.int64) * v_scales_stride_p
    # Each part is a multiple of BLOCK_K: only the last one has an incomplete tile.
    part = tl.cdiv(tl.cdiv(kv_len, splits), BLOCK_K) * BLOCK_K
    first = split * part
    last = tl.minimum(first + part, kv_len)
    full_end = first + tl.maximum(last - first, 0) // BLOCK_K * BLOCK_K

    queries = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    columns = tl.arange(0, D_PADDED)
    inside = (queries < num_queries)[:, None] & (columns < D)[None, :]
    q_rows = q_ptr + b * q_stride_b + h * q_stride_h + queries.to(tl.int64) * q_stride_t
    q_pointers = q_rows[:, None] + columns[None, :]
    scale_log2 = tl.full((BLOCK_Q,), scale_log2, tl.float32)
    if scale_ptr is not None:
        factor, _ = query_factors(tl.load(q_pointers, mask=inside, other=0.0), scale_ptr, h)
        scale_log2 = tl.maximum(scale_log2 * factor, SMALLEST, propagate_nan=tl.PropagateNan.ALL)
        # Keep the compiler from merging this load with the next, as in block_causal_attention.
        tl.debug_barrier()
    q = tl.load(q_pointers, mask=inside, other=0.0)
    if NEGATE:
        q = -q
    out = tl.zeros((BLOCK_Q, D_PADDED), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    largest = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    # Complete tiles first, then the incomplete tile at the end of the part, with a mask.
    for MASKED in tl.static_range(2):
        out, total, largest = attend_pages(
            out, total, largest, q, k_base, v_base, table_base,
            k_stride_p=k_stride_p, k_stride_n=k_stride_n,
            v_stride_p=v_stride_p, v_stride_n=v_stride_n,
            k_scales_base=k_scales_ptr, v_scales_base=v_scales_ptr,
            k_scales_stride_p=k_scales_stride_p, k_scales_stride_n=k_scales_stride_n,
            v_scales_stride_p=v_scales_stride_p, v_scales_stride_n=v_scales_stride_n,
            num_pages=num_pages,
            first=full_end if MASKED else first, last=last if MASKED else full_end,
            scale_log2=scale_log2,
            KV8=KV8, CONSECUTIVE=CONSECUTIVE, PAGE_SIZE=PAGE_SIZE, BLOCK_K=BLOCK_K,
            D=D, D_PADDED=D_PADDED, MASKED=MASKED,
        )  # fmt: skip

    # Without keys: zeros, and a sum of 0, which is the part's weight.
    out = out / tl.where(total == 0.0, 1.0, total)[:, None]
    out_rows = ((split * batch + b) * num_queries + queries) * heads + h
    out_pointers = out_ptr + out_rows[:, None] * D + columns[None, :]
    tl.store(out_pointers, out.to(out_ptr.dtype.element_ty), mask=inside)
    if SPLIT:
        # Apart: a logarithm of the sum would lose the digits of the sum to a large score. Scores of
        # normalised queries and keys are at most 100.
        if scale_ptr is not None:
            largest = largest * scale_log2
        parts = tl.cast(splits, tl.int64) * batch * num_queries * heads
        tl.store(statistics_ptr + out_rows, largest, mask=queries < num_queries)
        tl.store(statistics_ptr + parts + out_rows, total, mask=queries < num_queries)


@triton.jit(do_not_specialize=("num_rows", "splits"))
def paged_attention_combine_kernel(
    parts_ptr,
    statistics_ptr,
    out_ptr,
    num_rows,
    splits,
    scale_log2,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out = sum of weight * part over the splits / sum of weight, for BLOCK_R rows.

    weight = 2^(scale_log2 (largest score - that of all parts)) * sum of exponentials
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.arange(0, D_PADDED)
    inside = (row < num_rows)[:, None] & (columns < D)[None, :]
    out = tl.zeros((BLOCK_R, D_PADDED), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    largest = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    for split in range(splits):
        part_row = tl.cast(split, tl.int64) * num_rows + row
        score = tl.load(statistics_ptr + part_row, mask=row < num_rows, other=float("-inf"))
        sums_ptr = statistics_ptr + tl.cast(splits, tl.int64) * num_rows
        part_total = tl.load(sums_ptr + part_row, mask=row < num_rows, other=0.0)
        part = tl.load(parts_ptr + part_row[:, None] * D + columns[None, :], mask=inside, other=0.0)
        new_largest = tl.maximum(largest, score)
        # Parts without keys have -inf, and so have the first ones; -inf - -inf would be NaN.
        origin = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        shrink = tl.exp2((largest - origin) * scale_log2)
        weight = tl.exp2((score - origin) * scale_log2) * part_total
        total = total * shrink + weight
        out = out * shrink[:, None] + part * weight[:, None]
        largest = new_largest
    out = out / tl.where(total == 0.0, 1.0, total)[:, None]
    out_pointers = out_ptr + row[:, None] * D + columns[None, :]
    tl.store(out_pointers, out.to(out_ptr.dtype.element_ty), mask=inside)


BLOCK_ROWS = 4


def launch_paged_attention_forward(
    *,
    q_BTHD: torch.Tensor,
    k_pages_PNHD: torch.Tensor,
    v_pages_PNHD: torch.Tensor,
    page_table_BM: torch.Tensor,
    kv_lens_B: torch.Tensor,
    softmax_scale: float,
    k_scales_PNH: torch.Tensor | None = None,
    v_scales_PNH: torch.Tensor | None = None,
    consecutive: bool = False,
    scale_mul_1H11: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(softmax_scale * q k^T) v over the first kv_lens_B[b] tokens of sequence b.

    Token s is stored in page page_table_BM[b, s // N], slot s % N. With scales, pages are
    float8_e4m3fn and k and v are page * scale (``kv_quantization``). A length of 0 gives zeros.
    Page-table entries and slots past the length are not read. On a GPU values are not validated:
    lengths are clamped to the capacity of the table, page indices to the pool.

    With scale_mul_1H11, (1, H, 1, 1), queries are first normalised as by qk_norm; keys must be. The
    norm is a factor on a query's scores, so that q is read once and no copy of it is written.

    With consecutive only the first entry of each sequence is read, and its pages are read from
    there on: without a lookup for every token.

    Returns:
        out_BTHD: contiguous, q's dtype.
    """
    num_pages, page_size = k_pages_PNHD.shape[:2]
    entries = page_table_BM.shape[1]
    out_BTHD = torch.empty_like(q_BTHD, memory_format=torch.contiguous_format)
    if out_BTHD.numel() == 0:
        return out_BTHD
    if num_pages == 0 or entries == 0:
        return out_BTHD.zero_()
    k_pages, v_pages = page_bytes(k_pages_PNHD, v_pages_PNHD, k_scales_PNH)
    scales = scale_arguments(k_scales_PNH, v_scales_PNH)
    # The slots of neighbouring pages are equally far apart, unless the pool is a strided view.
    consecutive = consecutive and all(
        x is None or x.stride(0) == page_size * x.stride(1)
        for x in (k_pages, v_pages, k_scales_PNH, v_scales_PNH)
    )

    if scale_mul_1H11 is not None:
        scale_mul_1H11 = scale_mul_1H11.contiguous()

    def launch(config: Config) -> None:
        _launch(
            config, q_BTHD, k_pages, v_pages, page_table_BM, kv_lens_B, softmax_scale, scales,
            consecutive, scale_mul_1H11, out_BTHD,
        )  # fmt: skip

    with on_device_of(q_BTHD):
        batch, num_queries, heads, head_dim = q_BTHD.shape
        key = tuning.Key(
            (head_dim, q_BTHD.element_size(), k_pages_PNHD.element_size(), pages_kind(consecutive)),
            # The room of the tables hardly matters.
            (*map(tuning.power_of_two_from, (num_queries, batch * heads)), page_size),
            (q_BTHD.dtype, k_pages_PNHD.dtype, scale_mul_1H11 is not None),
        )
        candidates = configs_for(q_BTHD, k_scales_PNH is not None, consecutive)
        launch(tuning.best(paged_attention_kernel, candidates, key, launch, q_BTHD.device))
    return out_BTHD


def _launch(
    config: Config,
    q_BTHD: torch.Tensor,
    k_pages_PNHD: torch.Tensor,
    v_pages_PNHD: torch.Tensor,
    page_table_BM: torch.Tensor,
    kv_lens_B: torch.Tensor,
    softmax_scale: float,
    scales: tuple[torch.Tensor | int | None, ...],
    consecutive: bool,
    scale_mul_1H11: torch.Tensor | None,
    out_BTHD: torch.Tensor,
) -> None:
    """Both kernels with one config; pages and scales as ``e4m3`` prepares them."""
    batch, num_queries, heads, head_dim = q_BTHD.shape
    num_pages, page_size = k_pages_PNHD.shape[:2]
    entries = page_table_BM.shape[1]
    capacity = entries * page_size
    programs = batch * heads * -(-num_queries // config.block_q)
    splits = num_splits(
        blocks=programs,
        resident=common.num_processors(q_BTHD.device) * resident_programs(config, head_dim),
        tiles=-(-capacity // config.block_k),
        part_bytes=4 * q_BTHD.numel(),
    )
    # The kernel computes max(scale * scores) as scale * max(scores), so the sign goes into q. A
    # scale of zero times a masked score of -inf would be NaN; 1e-30 has the effect of zero.
    scale_log2 = max(abs(softmax_scale) * log2(e), SMALLEST.value)
    target, statistics_2SBTH = out_BTHD, None
    if splits > 1:
        target, statistics_2SBTH = _split_buffers(q_BTHD, splits)
    paged_attention_kernel[(programs * splits,)](
        q_BTHD,
        k_pages_PNHD,
        v_pages_PNHD,
        page_table_BM,
        kv_lens_B,
        target,
        statistics_2SBTH,
        scale_mul_1H11,
        *q_BTHD.stride()[:3],
        *k_pages_PNHD.stride()[:3],
        *v_pages_PNHD.stride()[:3],
        page_table_BM.stride(0),
        kv_lens_B.stride(0),
        *scales,
        batch,
        num_queries,
        heads,
        num_pages,
        entries,
        splits,
        scale_log2,
        KV8=scales[0] is not None,
        CONSECUTIVE=consecutive,
        NEGATE=softmax_scale < 0,
        SPLIT=splits > 1,
        PAGE_SIZE=page_size,
        D=head_dim,
        D_PADDED=padded(head_dim),
        BLOCK_Q=config.block_q,
        BLOCK_K=config.block_k,
        enable_fp_fusion=True,
        **config.options,
    )
    if statistics_2SBTH is not None:
        factor = scale_log2 if scale_mul_1H11 is None else 1.0  # else the statistics are scaled
        _launch_combine(target, statistics_2SBTH, factor, out_BTHD)


def _split_buffers(q_BTHD: torch.Tensor, splits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Uninitialised float32 buffers: parts (S, B, T, H, D) and their statistics (2, S, B, T, H)."""
    batch, num_queries, heads, head_dim = q_BTHD.shape
    shape = (splits, batch, num_queries, heads)
    statistics_2SBTH = q_BTHD.new_empty((2, *shape), dtype=torch.float32)
    return q_BTHD.new_empty((*shape, head_dim), dtype=torch.float32), statistics_2SBTH


def _launch_combine(
    parts_SBTHD: torch.Tensor,
    statistics_2SBTH: torch.Tensor,
    scale_log2: float,
    out_BTHD: torch.Tensor,
) -> None:
    batch, num_queries, heads, head_dim = out_BTHD.shape
    num_rows = batch * num_queries * heads
    paged_attention_combine_kernel[(-(-num_rows // BLOCK_ROWS),)](
        parts_SBTHD,
        statistics_2SBTH,
        out_BTHD,
        num_rows,
        parts_SBTHD.shape[0],
        scale_log2,
        D=head_dim,
        D_PADDED=padded(head_dim),
        BLOCK_R=BLOCK_ROWS,
        num_warps=4,
        enable_fp_fusion=True,
    )
