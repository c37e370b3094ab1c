"""block_causal_attention in Triton: the forward pass and helpers of both passes.

The backward pass is in ``block_causal_attention_backward``. B batch, L tokens of all scales, H
heads, D width; inside the kernels Q queries and K keys of one tile.

A query attends to a prefix of the keys. Key tiles that are visible to all queries of a tile come
first, without a mask; then the tiles at the boundary, with a mask; the others are skipped. Query
tiles start at ends of scales where this leaves fewer pairs of tiles (``plans.attention_tiles``).
The layout and its tiles are compile-time constants, so there is no table to load and nothing to
prepare before a graph is captured.

With qk_norm the norms of a query tile and the head's scale are multiplied into the factor on its
scores: the products use the tile as it was loaded, because a normalised copy would occupy registers
throughout the loop. Keys are loaded by many programs, so a separate kernel normalises them once;
they are not saved for the backward pass.
"""

# Triton's compiler gives a kernel's arguments other types than Python's checker sees.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from math import e, log2

import torch
import triton
import triton.language as tl

from variant_kernels.plans.attention_tiles import Cuts, cut_queries
from variant_kernels.triton_ops import block_causal_attention_configs as configs
from variant_kernels.triton_ops import tuning
from variant_kernels.triton_ops.common import on_device_of, padded
from variant_kernels.triton_ops.qk_norm import launch_unit_keys
from variant_kernels.triton_ops.rows import head_scale, unit
from variant_kernels.triton_ops.tuning import Config

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# The smallest factor on scores: it has the effect of zero, but zero times the -inf of a masked
# score would be NaN.
SMALLEST = tl.constexpr(1.0e-30)


@triton.jit
def visible_end(position, ENDS: tl.constexpr, NUM_SCALES: tl.constexpr):
    """The number of keys that a query attends to: up to the end of its scale."""
    end = tl.zeros_like(position) + ENDS[0]
    for scale in tl.static_range(1, NUM_SCALES):
        end = tl.where(position >= ENDS[scale - 1], ENDS[scale], end)
    return end


@triton.jit
def first_viewer(position, ENDS: tl.constexpr, NUM_SCALES: tl.constexpr):
    """The first query that attends to a key: the first token of its scale."""
    first = tl.zeros_like(position)
    for scale in tl.static_range(1, NUM_SCALES):
        first = tl.where(position >= ENDS[scale - 1], ENDS[scale - 1], first)
    return first


@triton.jit
def tile_rows(
    tile,
    BLOCK: tl.constexpr,
    RUN_ENDS: tl.constexpr,
    RUN_TILES: tl.constexpr,
    NUM_RUNS: tl.constexpr,
):
    """The first row of a tile and the end of its rows, from ``plans.attention_tiles.Cuts``."""
    start = tile * BLOCK
    end = tl.zeros_like(tile) + RUN_ENDS[0]
    for run in tl.static_range(1, NUM_RUNS):
        inside = tile >= RUN_TILES[run - 1]
        start = tl.where(inside, RUN_ENDS[run - 1] + (tile - RUN_TILES[run - 1]) * BLOCK, start)
        end = tl.where(inside, RUN_ENDS[run], end)
    return start, tl.minimum(start + BLOCK, end)


@triton.jit
def load_tile(
    base,
    start,
    stride,
    end,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    CHECK: tl.constexpr,
):
    """Rows from ``start`` on of one head; zeros past D and, with CHECK, past ``end``."""
    rows = tl.arange(0, BLOCK)
    columns = tl.arange(0, D_PADDED)
    # 64-bit address of the tile plus 32-bit offsets in it: only a scalar changes in the loop.
    pointers = base + tl.cast(start, tl.int64) * stride + rows[:, None] * stride + columns[None, :]
    if CHECK and D == D_PADDED:
        return tl.load(pointers, mask=(start + rows < end)[:, None], other=0.0)
    elif CHECK:
        inside = (start + rows < end)[:, None] & (columns < D)[None, :]
        return tl.load(pointers, mask=inside, other=0.0)
    elif D == D_PADDED:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=(columns < D)[None, :], other=0.0)


@triton.jit
def store_tile(
    base,
    start,
    stride,
    end,
    tile,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
):
    rows = tl.arange(0, BLOCK)
    columns = tl.arange(0, D_PADDED)
    pointers = base + tl.cast(start, tl.int64) * stride + rows[:, None] * stride + columns[None, :]
    inside = (start + rows < end)[:, None] & (columns < D)[None, :]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def query_factors(q, scale_ptr, h):
    """The factor of qk_norm on each query of a tile, (Q,), and exp(scale_mul) of its head."""
    scale = head_scale(tl.load(scale_ptr + h).to(tl.float32))
    _, inverse, _ = unit(q.to(tl.float32))
    return scale * inverse, scale


@triton.jit
def attend_tiles(
    out,
    total,
    largest,
    q,
    ends,
    k_base,
    v_base,
    k_stride,
    v_stride,
    first,
    last,
    scale_log2,
    BLOCK_K: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Online softmax over the keys from ``first`` to ``last``; scale_log2: (Q,).

    ``largest`` holds unscaled scores: the difference of two of them is exact near the largest. The
    difference of scaled scores would be one instruction less for each score, but its rounding error
    exceeds the range of 2^x for scores of 2^31 and more.
    """
    # Counted down: LLVM would compare start + arange, or ends - start, in the 64 bits of addresses.
    visible_keys = ends - first
    for start in tl.range(first, last, BLOCK_K):
        k = load_tile(k_base, start, k_stride, last, BLOCK_K, D, D_PADDED, MASKED)
        v = load_tile(v_base, start, v_stride, last, BLOCK_K, D, D_PADDED, MASKED)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if MASKED:
            visible = tl.arange(0, BLOCK_K)[None, :] < visible_keys[:, None]
            visible_keys -= BLOCK_K
            scores = tl.where(visible, scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        probs = tl.exp2((scores - new_largest[:, None]) * scale_log2[:, None])
        shrink = tl.exp2((largest - new_largest) * scale_log2)
        total = total * shrink + tl.sum(probs, 1)
        out = out * shrink[:, None]
        out = tl.dot(probs.to(v.dtype), v, out, input_precision="ieee")
        largest = new_largest
    return out, total, largest


@triton.jit
def block_causal_attention_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    scale_ptr,
    out_ptr,
    lse_ptr,
    q_stride_b,
    q_stride_l,
    q_stride_h,
    k_stride_b,
    k_stride_l,
    k_stride_h,
    v_stride_b,
    v_stride_l,
    v_stride_h,
    length,
    heads,
    scale_log2,
    ENDS: tl.constexpr,
    NUM_SCALES: tl.constexpr,
    RUN_ENDS: tl.constexpr,
    RUN_TILES: tl.constexpr,
    NUM_RUNS: tl.constexpr,
    NEGATE: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """softmax(scale q k^T) v for one query tile of one head; scale_log2 >= 0, q negated if NEGATE.

    scale_ptr: (H,) logarithms of qk_norm's scales, or None; keys are normalised already.
    Late tiles have most keys and start first, so that no long tile remains at the end.
    """
    TILES: tl.constexpr = RUN_TILES[NUM_RUNS - 1]
    head = tl.program_id(0) // TILES
    tile = TILES - 1 - tl.program_id(0) % TILES
    start, end = tile_rows(tile, BLOCK_Q, RUN_ENDS, RUN_TILES, NUM_RUNS)
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    full_end = visible_end(start, ENDS, NUM_SCALES) // BLOCK_K * BLOCK_K
    last = visible_end(end - 1, ENDS, NUM_SCALES)

    q_base = q_ptr + b * q_stride_b + h * q_stride_h
    k_base = k_ptr + b * k_stride_b + h * k_stride_h
    v_base = v_ptr + b * v_stride_b + h * v_stride_h
    scale_log2 = tl.full((BLOCK_Q,), scale_log2, tl.float32)
    if scale_ptr is not None:
        q = load_tile(q_base, start, q_stride_l, end, BLOCK_Q, D, D_PADDED, True)
        factor, _ = query_factors(q, scale_ptr, h)
        scale_log2 = tl.maximum(scale_log2 * factor, SMALLEST, propagate_nan=tl.PropagateNan.ALL)
        # Keep the compiler from merging this load with the next: a float32 tile that is also used
        # for a sum would stay in registers throughout the loop and spill.
        tl.debug_barrier()
    q = load_tile(q_base, start, q_stride_l, end, BLOCK_Q, D, D_PADDED, True)
    if NEGATE:
        q = -q
    out = tl.zeros((BLOCK_Q, D_PADDED), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    # Every query attends to key 0, which comes first: after it, `largest` is finite.
    largest = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    out, total, largest = attend_tiles(
        out, total, largest, q, 0, k_base, v_base, k_stride_l, v_stride_l,
        0, full_end, scale_log2, BLOCK_K, D, D_PADDED, False,
    )  # fmt: skip
    # After the first loop, throughout which they would occupy registers.
    positions = start + tl.arange(0, BLOCK_Q)
    ends = visible_end(positions, ENDS, NUM_SCALES)
    out, total, largest = attend_tiles(
        out, total, largest, q, ends, k_base, v_base, k_stride_l, v_stride_l,
        full_end, last, scale_log2, BLOCK_K, D, D_PADDED, True,
    )  # fmt: skip

    out = out / total[:, None]
    out_base = out_ptr + (b * length * heads + h) * D
    store_tile(out_base, start, heads * D, end, out, BLOCK_Q, D, D_PADDED)
    lse = (largest * scale_log2 + tl.log2(total)) * LN_2
    tl.store(lse_ptr + (b * heads + h) * length + positions, lse, mask=positions < end)


# --- launchers ----------------------------------------------------------------------------------


def constants(
    scale_lengths: tuple[int, ...], head_dim: int, config: Config, cuts: Cuts
) -> dict[str, int | tuple[int, ...]]:
    """The compile-time constants that all kernels share."""
    return {
        "ENDS": tuple(accumulate(scale_lengths)),
        "NUM_SCALES": len(scale_lengths),
        "RUN_ENDS": cuts.run_ends,
        "RUN_TILES": cuts.run_tiles,
        "NUM_RUNS": len(cuts.run_ends),
        "D": head_dim,
        "D_PADDED": padded(head_dim),
        "BLOCK_Q": config.block_q,
        "BLOCK_K": config.block_k,
    }


def choose_config(
    table: configs.Table,
    kernel: triton.JITFunction,
    q_BLHD: torch.Tensor,
    scale_lengths: tuple[int, ...],
    qk_norm: bool,
    launch: Callable[[Config], None],
) -> Config:
    """The fastest config of a kernel for this layout and head width."""
    batch, _, heads, head_dim = q_BLHD.shape
    # The number of heads matters only while the grid hardly fills the GPU.
    sizes = sum(scale_lengths), tuning.power_of_two_from(batch * heads)
    same = head_dim, q_BLHD.element_size(), "qk_norm" if qk_norm else "no qk_norm"
    key = tuning.Key(same, sizes, (scale_lengths, q_BLHD.dtype))
    return tuning.best(kernel, configs.configs_for(table, q_BLHD), key, launch, q_BLHD.device)


def launch_block_causal_attention_forward(
    *,
    q_BLHD: torch.Tensor,
    k_BLHD: torch.Tensor,
    v_BLHD: torch.Tensor,
    scale_lengths: tuple[int, ...],
    softmax_scale: float,
    scale_mul_1H11: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of each token of scale j to all tokens of the scales up to and including j.

    With scale_mul_1H11, queries and keys are first normalised as by qk_norm.

    Returns:
        out_BLHD (contiguous, q's dtype) and lse_BHL (float32), the natural logarithm of the sum of
        exp(softmax_scale * q.k) over the visible keys of each query.
    """
    batch, length, heads, head_dim = q_BLHD.shape
    out_BLHD = torch.empty_like(q_BLHD, memory_format=torch.contiguous_format)
    lse_BHL = q_BLHD.new_empty((batch, heads, length), dtype=torch.float32)
    if out_BLHD.numel() == 0:
        return out_BLHD, lse_BHL
    if scale_mul_1H11 is not None:
        scale_mul_1H11 = scale_mul_1H11.contiguous()
        k_BLHD = launch_unit_keys(k_BTHD=k_BLHD)

    def launch(config: Config) -> None:
        cuts = cut_queries(scale_lengths, config.block_q, config.block_k)
        block_causal_attention_forward_kernel[(batch * heads * cuts.num_tiles,)](
            q_BLHD,
            k_BLHD,
            v_BLHD,
            scale_mul_1H11,
            out_BLHD,
            lse_BHL,
            *q_BLHD.stride()[:3],
            *k_BLHD.stride()[:3],
            *v_BLHD.stride()[:3],
            length,
            heads,
            # The kernel computes max(scale * scores) as scale * max(scores): the sign goes into q.
            max(abs(softmax_scale) * log2(e), SMALLEST.value),
            NEGATE=softmax_scale < 0,
            **constants(scale_lengths, head_dim, config, cuts),
            enable_fp_fusion=True,
            **config.options,
        )

    with on_device_of(q_BLHD):
        kernel = block_causal_attention_forward_kernel
        normed = scale_mul_1H11 is not None
        launch(choose_config(configs.FORWARD, kernel, q_BLHD, scale_lengths, normed, launch))
    return out_BLHD, lse_BHL
