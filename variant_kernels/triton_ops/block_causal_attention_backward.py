"""The backward pass of block_causal_attention in Triton. B batch, L tokens of all scales, H heads,
D width; inside the kernels Q queries and K keys of one tile.

Two kernels: dQ, a program for each query tile, and dK and dV, a program for each key tile. Each
result is added up by one program in one order, so that runs agree bit for bit; the price is that
both compute the probabilities: seven products instead of five.
"""

# Triton's compiler gives a kernel's arguments other types than Python's checker sees.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

from math import e, log2

import torch
import triton
import triton.language as tl

from variant_kernels.triton_ops import block_causal_attention_configs as configs
from variant_kernels.triton_ops.block_causal_attention import (
    chosen,
    compile_cases,
    constants,
    first_viewer,
    load_tile,
    store_tile,
    visible_end,
)
from variant_kernels.triton_ops.common import last_contiguous, on_device_of
from variant_kernels.triton_ops.tuning import Config

LOG2_E = tl.constexpr(1.4426950408889634)


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
    for start in tl.range(first, last, BLOCK_K):
        k = load_tile(k_base, start, k_stride, last, BLOCK_K, D, D_PADDED, MASKED)
        v = load_tile(v_base, start, v_stride, last, BLOCK_K, D, D_PADDED, MASKED)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        probs = tl.exp2(scores * scale_log2 - lse_log2[:, None])
        if MASKED:
            seen = (start + tl.arange(0, BLOCK_K))[None, :] < ends[:, None]
            probs = tl.where(seen, probs, 0.0)
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
    statistics_ptr,
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
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dQ of one query tile of one head.

    Its statistics, (B, H, 2, L), are what dK and dV need of each query: delta = rowsum(grad_out *
    out) and lse in base 2 (made once here: the other kernel would do it for every key tile).
    """
    tiles = tl.cdiv(length, BLOCK_Q)
    head = tl.program_id(0) // tiles
    start = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_Q
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    rows = start + tl.arange(0, BLOCK_Q)
    ends = visible_end(rows, ENDS, NUM_SCALES)
    whole = visible_end(start, ENDS, NUM_SCALES) // BLOCK_K * BLOCK_K
    last = visible_end(tl.minimum(start + BLOCK_Q, length) - 1, ENDS, NUM_SCALES)

    grad_base = grad_ptr + b * grad_stride_b + h * grad_stride_h
    out_base = out_ptr + b * out_stride_b + h * out_stride_h
    grad = load_tile(grad_base, start, grad_stride_l, length, BLOCK_Q, D, D_PADDED, True)
    out = load_tile(out_base, start, out_stride_l, length, BLOCK_Q, D, D_PADDED, True)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    # Rows past the end: a probability of exp2(-inf) = 0.
    lse = tl.load(lse_ptr + (b * heads + h) * length + rows, mask=rows < length, other=float("inf"))
    lse_log2 = lse * LOG2_E
    statistics = statistics_ptr + (b * heads + h) * 2 * length + rows
    tl.store(statistics, delta, mask=rows < length)
    tl.store(statistics + length, lse_log2, mask=rows < length)

    q_base = q_ptr + b * q_stride_b + h * q_stride_h
    k_base = k_ptr + b * k_stride_b + h * k_stride_h
    v_base = v_ptr + b * v_stride_b + h * v_stride_h
    q = load_tile(q_base, start, q_stride_l, length, BLOCK_Q, D, D_PADDED, True)
    dq = tl.zeros((BLOCK_Q, D_PADDED), tl.float32)
    dq = query_gradient_tiles(
        dq, q, grad, lse_log2, delta, ends, k_base, v_base, k_stride_l, v_stride_l,
        0, whole, scale_log2, BLOCK_K, D, D_PADDED, False,
    )  # fmt: skip
    dq = query_gradient_tiles(
        dq, q, grad, lse_log2, delta, ends, k_base, v_base, k_stride_l, v_stride_l,
        whole, last, scale_log2, BLOCK_K, D, D_PADDED, True,
    )  # fmt: skip
    dq_base = dq_ptr + (b * length * heads + h) * D
    store_tile(dq_base, start, heads * D, length, dq * softmax_scale, BLOCK_Q, D, D_PADDED)


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
    length,
    scale_log2,
    BLOCK_Q: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """dv += P^T grad and dk += dS^T q over the queries from ``first`` to ``last``."""
    for start in tl.range(first, last, BLOCK_Q):
        rows = start + tl.arange(0, BLOCK_Q)
        q = load_tile(q_base, start, q_stride, length, BLOCK_Q, D, D_PADDED, True)
        grad = load_tile(grad_base, start, grad_stride, length, BLOCK_Q, D, D_PADDED, True)
        # Rows past the end: a probability of exp2(-inf) = 0.
        delta = tl.load(statistics + rows, mask=rows < length, other=0.0)
        lse_log2 = tl.load(statistics + length + rows, mask=rows < length, other=float("inf"))
        # Transposed, (K, Q): the probabilities go into the next product as they are.
        scores = tl.dot(k, tl.trans(q), input_precision="ieee")
        probs = tl.exp2(scores * scale_log2 - lse_log2[None, :])
        if MASKED:
            probs = tl.where(rows[None, :] >= firsts[:, None], probs, 0.0)
        dv = tl.dot(probs.to(grad.dtype), grad, dv, input_precision="ieee")
        dprobs = tl.dot(v, tl.trans(grad), input_precision="ieee")
        dscores = probs * (dprobs - delta[None, :])
        dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def block_causal_attention_dkv_kernel(
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
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
    length,
    heads,
    softmax_scale,
    scale_log2,
    ENDS: tl.constexpr,
    NUM_SCALES: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dK and dV of one key tile of one head, from every query that sees one of its keys.

    Early tiles are seen by most queries and start first.
    """
    tiles = tl.cdiv(length, BLOCK_K)
    head = tl.program_id(0) // tiles
    start = tl.program_id(0) % tiles * BLOCK_K
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    firsts = first_viewer(start + tl.arange(0, BLOCK_K), ENDS, NUM_SCALES)
    first = first_viewer(start, ENDS, NUM_SCALES) // BLOCK_Q * BLOCK_Q
    # From here on every query sees every key of the tile.
    whole = first_viewer(tl.minimum(start + BLOCK_K, length) - 1, ENDS, NUM_SCALES)
    whole = tl.cdiv(whole, BLOCK_Q) * BLOCK_Q

    grad_base = grad_ptr + b * grad_stride_b + h * grad_stride_h
    q_base = q_ptr + b * q_stride_b + h * q_stride_h
    k_base = k_ptr + b * k_stride_b + h * k_stride_h
    v_base = v_ptr + b * v_stride_b + h * v_stride_h
    statistics = statistics_ptr + (b * heads + h) * 2 * length
    k = load_tile(k_base, start, k_stride_l, length, BLOCK_K, D, D_PADDED, True)
    v = load_tile(v_base, start, v_stride_l, length, BLOCK_K, D, D_PADDED, True)
    dk = tl.zeros((BLOCK_K, D_PADDED), tl.float32)
    dv = tl.zeros((BLOCK_K, D_PADDED), tl.float32)
    dk, dv = key_gradient_tiles(
        dk, dv, k, v, firsts, grad_base, q_base, statistics, grad_stride_l, q_stride_l,
        whole, length, length, scale_log2, BLOCK_Q, D, D_PADDED, False,
    )  # fmt: skip
    dk, dv = key_gradient_tiles(
        dk, dv, k, v, firsts, grad_base, q_base, statistics, grad_stride_l, q_stride_l,
        first, whole, length, scale_log2, BLOCK_Q, D, D_PADDED, True,
    )  # fmt: skip
    place = (b * length * heads + h) * D
    store_tile(dk_ptr + place, start, heads * D, length, dk * softmax_scale, BLOCK_K, D, D_PADDED)
    store_tile(dv_ptr + place, start, heads * D, length, dv, BLOCK_K, D, D_PADDED)


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
    """The gradients of launch_block_causal_attention_forward; the same bits on every run.

    Returns:
        dq_BLHD, dk_BLHD, dv_BLHD: contiguous, q's dtype.
    """
    batch, length, heads, head_dim = q_BLHD.shape
    grad_out_BLHD, lse_BHL = last_contiguous(grad_out_BLHD), lse_BHL.contiguous()
    dq_BLHD, dk_BLHD, dv_BLHD = (
        torch.empty_like(q_BLHD, memory_format=torch.contiguous_format) for _ in range(3)
    )
    if dq_BLHD.numel() == 0:
        return dq_BLHD, dk_BLHD, dv_BLHD
    statistics_BH2L = lse_BHL.new_empty((batch, heads, 2, length))
    strides = [s for x in (grad_out_BLHD, q_BLHD, k_BLHD, v_BLHD) for s in x.stride()[:3]]
    scales = (softmax_scale, softmax_scale * log2(e))

    def launch_dq(config: Config) -> None:
        block_causal_attention_dq_kernel[(batch * heads * -(-length // config.block_q),)](
            grad_out_BLHD,
            q_BLHD,
            k_BLHD,
            v_BLHD,
            out_BLHD,
            lse_BHL,
            statistics_BH2L,
            dq_BLHD,
            *strides,
            *out_BLHD.stride()[:3],
            length,
            heads,
            *scales,
            **constants(scale_lengths, head_dim, config),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )

    def launch_dkv(config: Config) -> None:
        block_causal_attention_dkv_kernel[(batch * heads * -(-length // config.block_k),)](
            grad_out_BLHD,
            q_BLHD,
            k_BLHD,
            v_BLHD,
            statistics_BH2L,
            dk_BLHD,
            dv_BLHD,
            *strides,
            length,
            heads,
            *scales,
            **constants(scale_lengths, head_dim, config),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )

    with on_device_of(q_BLHD):
        # dQ first: it writes the statistics that the other reads.
        for table, kernel, launch in (
            (configs.DQ, block_causal_attention_dq_kernel, launch_dq),
            (configs.DKV, block_causal_attention_dkv_kernel, launch_dkv),
        ):
            launch(chosen(table, kernel, q_BLHD, scale_lengths, launch))
    return dq_BLHD, dk_BLHD, dv_BLHD


COMPILE_CASES = (
    *compile_cases(configs.DQ, block_causal_attention_dq_kernel),
    *compile_cases(configs.DKV, block_causal_attention_dkv_kernel),
)
