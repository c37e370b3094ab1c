"""The backward pass of block_causal_attention in Triton.

B batch, L tokens of all scales, H heads, D width; inside the kernels Q queries and K keys of one
tile.

Two kernels: one computes dQ with a program per query tile, the other dK and dV with a program per
key tile. Each result is accumulated by one program in a fixed order, so that runs agree bit for
bit; the cost is that both kernels compute the probabilities: seven products instead of five.

With qk_norm both kernels apply its gradient to dQ and dK just before storing them. The dQ kernel
also stores the queries that the other kernel reads, each multiplied by a power of two: this is
exact (except for float16 entries below 6e-5), and the rest of qk_norm's factor, between 1 and 2,
cannot overflow a float16 gradient of a score.
"""

# Triton's compiler gives a kernel's arguments other types than Python's checker sees.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

from math import e, log2

import torch
import triton
import triton.language as tl

from variant_kernels.plans.attention_tiles import cut_keys, cut_queries
from variant_kernels.tensors import last_contiguous
from variant_kernels.triton_ops import block_causal_attention_configs as configs
from variant_kernels.triton_ops.block_causal_attention import (
    SMALLEST,
    choose_config,
    constants,
    first_viewer,
    load_tile,
    query_factors,
    store_tile,
    tile_rows,
    visible_end,
)
from variant_kernels.triton_ops.common import on_device_of
from variant_kernels.triton_ops.qk_norm import launch_unit_keys
from variant_kernels.triton_ops.rows import MAX_LOG_SCALE, power_of_two, unit_gradient
from variant_kernels.triton_ops.tuning import Config

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def probability(exponent):
    """2^exponent, at most 1: the rounding error of a large lse may exceed the range of 2^x."""
    return tl.exp2(tl.minimum(exponent, 0.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def query_gradient_tiles(
    dq,
    q,
    grad,
    lse_log2,
    delta,
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
    """dq += dS K over the keys from ``first`` to ``last``."""
    visible_keys = ends - first  # counted down, as in attend_tiles
    for start in tl.range(first, last, BLOCK_K):
        k = load_tile(k_base, start, k_stride, last, BLOCK_K, D, D_PADDED, MASKED)
        v = load_tile(v_base, start, v_stride, last, BLOCK_K, D, D_PADDED, MASKED)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        probs = probability(scores * scale_log2[:, None] - lse_log2[:, None])
        if MASKED:
            visible = tl.arange(0, BLOCK_K)[None, :] < visible_keys[:, None]
            visible_keys -= BLOCK_K
            probs = tl.where(visible, probs, 0.0)
        dprobs = tl.dot(grad, tl.trans(v), input_precision="ieee")
        dscores = probs * (dprobs - delta[:, None])
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit
def block_causal_attention_dq_kernel(
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    scale_ptr,
    statistics_ptr,
    near_q_ptr,
    dq_ptr,
    grad_stride_b,
    grad_stride_l,
    grad_stride_h,
    q_stride_b,
    q_stride_l,
    q_stride_h,
    k_stride_b,
    k_stride_l,
    k_stride_h,
    v_stride_b,
    v_stride_l,
    v_stride_h,
    out_stride_b,
    out_stride_l,
    out_stride_h,
    length,
    heads,
    softmax_scale,
    scale_log2,
    ENDS: tl.constexpr,
    NUM_SCALES: tl.constexpr,
    RUN_ENDS: tl.constexpr,
    RUN_TILES: tl.constexpr,
    NUM_RUNS: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dQ of one query tile of one head, and the statistics of its queries for the other kernel.

    Statistics (B, H, S, L) hold delta = rowsum(grad_out * out) and lse in base 2; the other kernel
    would otherwise compute them for every key tile. S is 2; with qk_norm (scale_ptr is not None) S
    is 4: the rest of each query's factor, and the query's term in the gradient of scale_mul. near_q
    (B, L, H, D): the queries times powers of two.
    """
    TILES: tl.constexpr = RUN_TILES[NUM_RUNS - 1]
    head = tl.program_id(0) // TILES
    tile = TILES - 1 - tl.program_id(0) % TILES
    start, end = tile_rows(tile, BLOCK_Q, RUN_ENDS, RUN_TILES, NUM_RUNS)
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    positions = start + tl.arange(0, BLOCK_Q)
    full_end = visible_end(start, ENDS, NUM_SCALES) // BLOCK_K * BLOCK_K
    last = visible_end(end - 1, ENDS, NUM_SCALES)

    grad_base = grad_ptr + b * grad_stride_b + h * grad_stride_h
    out_base = out_ptr + b * out_stride_b + h * out_stride_h
    grad = load_tile(grad_base, start, grad_stride_l, end, BLOCK_Q, D, D_PADDED, True)
    out = load_tile(out_base, start, out_stride_l, end, BLOCK_Q, D, D_PADDED, True)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    # Rows past the end: a probability of exp2(-inf) = 0.
    lse = tl.load(
        lse_ptr + (b * heads + h) * length + positions, mask=positions < end, other=float("inf")
    )
    lse_log2 = lse * LOG2_E
    rows_of_statistics = 2 if scale_ptr is None else 4
    statistics = statistics_ptr + (b * heads + h) * rows_of_statistics * length + positions
    tl.store(statistics, delta, mask=positions < end)
    tl.store(statistics + length, lse_log2, mask=positions < end)

    q_base = q_ptr + b * q_stride_b + h * q_stride_h
    k_base = k_ptr + b * k_stride_b + h * k_stride_h
    v_base = v_ptr + b * v_stride_b + h * v_stride_h
    offset = (b * length * heads + h) * D
    q = load_tile(q_base, start, q_stride_l, end, BLOCK_Q, D, D_PADDED, True)
    scale_log2, scale = tl.full((BLOCK_Q,), scale_log2, tl.float32), 1.0
    if scale_ptr is not None:
        factor, scale = query_factors(q, scale_ptr, h)
        scale_log2 *= factor
        power = power_of_two(tl.maximum(factor, SMALLEST))
        near_q = q.to(tl.float32) * power[:, None]
        store_tile(near_q_ptr + offset, start, heads * D, end, near_q, BLOCK_Q, D, D_PADDED)
        tl.store(statistics + 2 * length, tl.div_rn(factor, power), mask=positions < end)
    dq = tl.zeros((BLOCK_Q, D_PADDED), tl.float32)
    dq = query_gradient_tiles(
        dq, q, grad, lse_log2, delta, 0, k_base, v_base, k_stride_l, v_stride_l,
        0, full_end, scale_log2, BLOCK_K, D, D_PADDED, False,
    )  # fmt: skip
    # After the first loop, throughout which they would occupy registers.
    ends = visible_end(positions, ENDS, NUM_SCALES)
    dq = query_gradient_tiles(
        dq, q, grad, lse_log2, delta, ends, k_base, v_base, k_stride_l, v_stride_l,
        full_end, last, scale_log2, BLOCK_K, D, D_PADDED, True,
    )  # fmt: skip
    dq *= softmax_scale
    if scale_ptr is not None:
        # Load q again: otherwise it would occupy registers throughout the loop.
        q = load_tile(q_base, start, q_stride_l, end, BLOCK_Q, D, D_PADDED, True).to(tl.float32)
        dq, along = unit_gradient(dq, q)
        dq *= scale
        tl.store(statistics + 3 * length, along, mask=positions < end)
    store_tile(dq_ptr + offset, start, heads * D, end, dq, BLOCK_Q, D, D_PADDED)


@triton.jit
def key_gradient_tiles(
    dk,
    dv,
    k,
    v,
    firsts,
    grad_base,
    q_base,
    statistics,
    grad_stride,
    q_stride,
    first,
    last,
    rest,
    length,
    scale_log2,
    BLOCK_Q: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    MASKED: tl.constexpr,
    QK_NORM: tl.constexpr,
):
    """dv += P^T grad and dk += dS^T q over the queries from ``first`` to ``last``.

    Without MASKED no query is past ``length``. With it, ``rest`` is the last tile's start: earlier
    tiles follow ``first``.
    """
    for start in tl.range(first, last, BLOCK_Q):
        if MASKED:
            start = tl.where(start + BLOCK_Q < last, start, rest)
        positions = start + tl.arange(0, BLOCK_Q)
        q = load_tile(q_base, start, q_stride, length, BLOCK_Q, D, D_PADDED, MASKED)
        grad = load_tile(grad_base, start, grad_stride, length, BLOCK_Q, D, D_PADDED, MASKED)
        # One tile, not vectors: Triton 3.6 would copy a vector's elements once for each thread.
        rows = positions[:, None] + tl.arange(0, 4 if QK_NORM else 2)[None, :] * length
        if MASKED:
            # Zeros serve for queries past the end, because their q and grad are zeros.
            tile = tl.load(statistics + rows, mask=(positions < length)[:, None], other=0.0)
        else:
            tile = tl.load(statistics + rows)
        factor = tl.full((BLOCK_Q,), 1.0, tl.float32)
        if QK_NORM:
            even, odd = tl.split(tl.reshape(tile, (BLOCK_Q, 2, 2)))
            delta, factor = tl.split(even)
            lse_log2, _ = tl.split(odd)
        else:
            delta, lse_log2 = tl.split(tile)
        # Transposed, (K, Q), so that the next product uses the probabilities as they are.
        scores = tl.dot(k, tl.trans(q), input_precision="ieee")
        if QK_NORM:
            scores *= factor[None, :]
        probs = probability(scores * scale_log2 - lse_log2[None, :])
        if MASKED:
            probs = tl.where(
                tl.arange(0, BLOCK_Q)[None, :] >= (firsts - start)[:, None], probs, 0.0
            )
        dv = tl.dot(probs.to(grad.dtype), grad, dv, input_precision="ieee")
        dprobs = tl.dot(v, tl.trans(grad), input_precision="ieee")
        dscores = probs * (dprobs - delta[None, :])
        if QK_NORM:
            dscores *= factor[None, :]
        dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def block_causal_attention_dkv_kernel(
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    raw_k_ptr,
    statistics_ptr,
    dk_ptr,
    dv_ptr,
    grad_stride_b,
    grad_stride_l,
    grad_stride_h,
    q_stride_b,
    q_stride_l,
    q_stride_h,
    k_stride_b,
    k_stride_l,
    k_stride_h,
    v_stride_b,
    v_stride_l,
    v_stride_h,
    raw_k_stride_b,
    raw_k_stride_l,
    raw_k_stride_h,
    length,
    heads,
    softmax_scale,
    scale_log2,
    ENDS: tl.constexpr,
    NUM_SCALES: tl.constexpr,
    RUN_ENDS: tl.constexpr,
    RUN_TILES: tl.constexpr,
    NUM_RUNS: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dK and dV of one key tile of one head, from every query that attends to one of its keys.

    Early tiles have most queries and start first. With qk_norm (raw_k_ptr is not None) q is near_q
    of the dQ kernel, k are unit vectors, and dK is the gradient of raw_k.
    """
    TILES: tl.constexpr = RUN_TILES[NUM_RUNS - 1]
    head = tl.program_id(0) // TILES
    start, end = tile_rows(tl.program_id(0) % TILES, BLOCK_K, RUN_ENDS, RUN_TILES, NUM_RUNS)
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    first = first_viewer(start, ENDS, NUM_SCALES)
    # From here on every query attends to every key of the tile.
    full_start = first_viewer(end - 1, ENDS, NUM_SCALES)
    full_start = first + tl.cdiv(full_start - first, BLOCK_Q) * BLOCK_Q
    # The last tile of queries has some past the end, and so may the masked ones.
    full_end = full_start + tl.maximum(length - full_start, 0) // BLOCK_Q * BLOCK_Q
    masked_end = full_start + tl.where(full_end < length, BLOCK_Q, 0)
    rest = tl.where(full_end < length, full_end, full_start - BLOCK_Q)

    grad_base = grad_ptr + b * grad_stride_b + h * grad_stride_h
    q_base = q_ptr + b * q_stride_b + h * q_stride_h
    k_base = k_ptr + b * k_stride_b + h * k_stride_h
    v_base = v_ptr + b * v_stride_b + h * v_stride_h
    rows_of_statistics = 2 if raw_k_ptr is None else 4
    statistics = statistics_ptr + (b * heads + h) * rows_of_statistics * length
    k = load_tile(k_base, start, k_stride_l, end, BLOCK_K, D, D_PADDED, True)
    v = load_tile(v_base, start, v_stride_l, end, BLOCK_K, D, D_PADDED, True)
    dk = tl.zeros((BLOCK_K, D_PADDED), tl.float32)
    dv = tl.zeros((BLOCK_K, D_PADDED), tl.float32)
    dk, dv = key_gradient_tiles(
        dk, dv, k, v, 0, grad_base, q_base, statistics, grad_stride_l, q_stride_l,
        full_start, full_end, 0, length, scale_log2,
        BLOCK_Q, D, D_PADDED, False, raw_k_ptr is not None,
    )  # fmt: skip
    firsts = first_viewer(start + tl.arange(0, BLOCK_K), ENDS, NUM_SCALES)
    dk, dv = key_gradient_tiles(
        dk, dv, k, v, firsts, grad_base, q_base, statistics, grad_stride_l, q_stride_l,
        first, masked_end, rest, length, scale_log2,
        BLOCK_Q, D, D_PADDED, True, raw_k_ptr is not None,
    )  # fmt: skip
    offset = (b * length * heads + h) * D
    dk *= softmax_scale
    if raw_k_ptr is not None:
        raw_base = raw_k_ptr + b * raw_k_stride_b + h * raw_k_stride_h
        raw_k = load_tile(raw_base, start, raw_k_stride_l, end, BLOCK_K, D, D_PADDED, True)
        dk, _ = unit_gradient(dk, raw_k.to(tl.float32))
    store_tile(dk_ptr + offset, start, heads * D, end, dk, BLOCK_K, D, D_PADDED)
    store_tile(dv_ptr + offset, start, heads * D, end, dv, BLOCK_K, D, D_PADDED)


# --- launcher -----------------------------------------------------------------------------------


def launch_block_causal_attention_backward(
    *,
    grad_out_BLHD: torch.Tensor,
    q_BLHD: torch.Tensor,
    k_BLHD: torch.Tensor,
    v_BLHD: torch.Tensor,
    out_BLHD: torch.Tensor,
    lse_BHL: torch.Tensor,
    scale_lengths: tuple[int, ...],
    softmax_scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of launch_block_causal_attention_forward.

    They are bitwise reproducible as long as the block sizes are the same (autotuned block sizes are
    stored on disk).

    Returns:
        dq_BLHD, dk_BLHD, dv_BLHD: contiguous, q's dtype.
    """
    dq_BLHD, dk_BLHD, dv_BLHD, _ = _launch(
        grad_out_BLHD, q_BLHD, k_BLHD, v_BLHD, None, out_BLHD, lse_BHL, scale_lengths, softmax_scale
    )
    return dq_BLHD, dk_BLHD, dv_BLHD


def launch_block_causal_attention_qk_norm_backward(
    *,
    grad_out_BLHD: torch.Tensor,
    q_BLHD: torch.Tensor,
    k_BLHD: torch.Tensor,
    v_BLHD: torch.Tensor,
    scale_mul_1H11: torch.Tensor,
    out_BLHD: torch.Tensor,
    lse_BHL: torch.Tensor,
    scale_lengths: tuple[int, ...],
    softmax_scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of launch_block_causal_attention_forward with scale_mul_1H11.

    dq and dk are those of queries and keys before qk_norm.

    Returns:
        dq_BLHD, dk_BLHD, dv_BLHD (contiguous, q's dtype), dscale_mul_1H11 (scale_mul's dtype).
    """
    dq_BLHD, dk_BLHD, dv_BLHD, terms_BHL = _launch(
        grad_out_BLHD,
        q_BLHD,
        k_BLHD,
        v_BLHD,
        scale_mul_1H11,
        out_BLHD,
        lse_BHL,
        scale_lengths,
        softmax_scale,
    )
    log_scale_1H11 = scale_mul_1H11.float()
    # The clamp passes gradient up to and including its bound.
    scale_1H11 = log_scale_1H11.exp().masked_fill(log_scale_1H11 > MAX_LOG_SCALE.value, 0)
    dscale_1H11 = terms_BHL.sum((0, 2)).view(1, -1, 1, 1) * scale_1H11
    return dq_BLHD, dk_BLHD, dv_BLHD, dscale_1H11.to(scale_mul_1H11.dtype)


def _launch(
    grad_out_BLHD: torch.Tensor,
    q_BLHD: torch.Tensor,
    k_BLHD: torch.Tensor,
    v_BLHD: torch.Tensor,
    scale_mul_1H11: torch.Tensor | None,
    out_BLHD: torch.Tensor,
    lse_BHL: torch.Tensor,
    scale_lengths: tuple[int, ...],
    softmax_scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq_BLHD, dk_BLHD, dv_BLHD and, with scale_mul, each query's term in its gradient, BHL."""
    batch, length, heads, head_dim = q_BLHD.shape
    grad_out_BLHD, lse_BHL = last_contiguous(grad_out_BLHD), lse_BHL.contiguous()
    dq_BLHD, dk_BLHD, dv_BLHD = (
        torch.empty_like(q_BLHD, memory_format=torch.contiguous_format) for _ in range(3)
    )
    qk_norm = scale_mul_1H11 is not None
    statistics_BHSL = lse_BHL.new_empty((batch, heads, 4 if qk_norm else 2, length))
    terms_BHL = statistics_BHSL[:, :, -1]
    if dq_BLHD.numel() == 0:
        return dq_BLHD, dk_BLHD, dv_BLHD, terms_BHL
    attended_q_BLHD, attended_k_BLHD = q_BLHD, k_BLHD
    near_q_BLHD = raw_k_BLHD = None
    if scale_mul_1H11 is not None:
        scale_mul_1H11 = scale_mul_1H11.contiguous()
        attended_k_BLHD, raw_k_BLHD = launch_unit_keys(k_BTHD=k_BLHD), k_BLHD
        attended_q_BLHD = near_q_BLHD = torch.empty_like(dq_BLHD)
    scales = (softmax_scale, softmax_scale * log2(e))

    def launch_dq(config: Config) -> None:
        cuts = cut_queries(scale_lengths, config.block_q, config.block_k)
        block_causal_attention_dq_kernel[(batch * heads * cuts.num_tiles,)](
            grad_out_BLHD,
            q_BLHD,
            attended_k_BLHD,
            v_BLHD,
            out_BLHD,
            lse_BHL,
            scale_mul_1H11,
            statistics_BHSL,
            near_q_BLHD,
            dq_BLHD,
            *_strides(grad_out_BLHD, q_BLHD, attended_k_BLHD, v_BLHD, out_BLHD),
            length,
            heads,
            *scales,
            **constants(scale_lengths, head_dim, config, cuts),
            enable_fp_fusion=True,
            **config.options,
        )

    def launch_dkv(config: Config) -> None:
        cuts = cut_keys(scale_lengths, config.block_q, config.block_k)
        block_causal_attention_dkv_kernel[(batch * heads * cuts.num_tiles,)](
            grad_out_BLHD,
            attended_q_BLHD,
            attended_k_BLHD,
            v_BLHD,
            raw_k_BLHD,
            statistics_BHSL,
            dk_BLHD,
            dv_BLHD,
            *_strides(grad_out_BLHD, attended_q_BLHD, attended_k_BLHD, v_BLHD, k_BLHD),
            length,
            heads,
            *scales,
            **constants(scale_lengths, head_dim, config, cuts),
            enable_fp_fusion=True,
            **config.options,
        )

    with on_device_of(q_BLHD):
        # dQ first: it writes the statistics and queries that the other kernel reads.
        for table, kernel, launch in (
            (configs.DQ, block_causal_attention_dq_kernel, launch_dq),
            (configs.DKV, block_causal_attention_dkv_kernel, launch_dkv),
        ):
            launch(choose_config(table, kernel, q_BLHD, scale_lengths, qk_norm, launch))
    return dq_BLHD, dk_BLHD, dv_BLHD, terms_BHL


def _strides(*tensors_BLHD: torch.Tensor) -> list[int]:
    return [stride for x in tensors_BLHD for stride in x.stride()[:3]]
