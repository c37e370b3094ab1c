"""qk_norm in Triton. B batch, T tokens, H heads, D head width; N parts of the tokens.

Forward: a program processes the queries and keys of one token. Backward: each program loops over
some tokens and accumulates a sum per head; a second kernel adds the parts in a fixed order.
"""

# Triton's compiler gives a kernel's arguments other types than Python's checker sees.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

from variant_kernels.tensors import last_contiguous
from variant_kernels.triton_ops import common
from variant_kernels.triton_ops.common import on_device_of, padded
from variant_kernels.triton_ops.rows import (
    HEADS_PER_THREAD,
    MAX_LOG_SCALE,
    head_scale,
    heads_per_block,
    num_warps_for,
    rows_per_part,
    unit,
    unit_gradient,
)


@triton.jit(do_not_specialize=["tokens"])
def qk_norm_forward_kernel(
    q_ptr,
    k_ptr,
    scale_ptr,
    q_out_ptr,
    k_out_ptr,
    q_stride_b,
    q_stride_t,
    q_stride_h,
    k_stride_b,
    k_stride_t,
    k_stride_h,
    scale_stride,
    tokens,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    D_PADDED: tl.constexpr,
):
    """q / max(|q|, 1e-12) * exp(min(scale, log 100)), k / max(|k|, 1e-12), for heads of a token.

    Without queries, q_ptr, scale_ptr and q_out_ptr are None.
    """
    tiles: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    token = (tl.program_id(0) // tiles).to(tl.int64)
    b, t = token // tokens, token % tokens
    h = tl.program_id(0) % tiles * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tl.arange(0, D_PADDED)[None, :]
    inside = (h < H)[:, None] & (d < D)
    k_rows = k_ptr + b * k_stride_b + t * k_stride_t + h * k_stride_h
    k = tl.load(k_rows[:, None] + d, mask=inside, other=0.0).to(tl.float32)
    out = (token * H + h)[:, None] * D + d
    element = k_out_ptr.dtype.element_ty
    if q_ptr is not None:
        q_rows = q_ptr + b * q_stride_b + t * q_stride_t + h * q_stride_h
        q = tl.load(q_rows[:, None] + d, mask=inside, other=0.0).to(tl.float32)
        log_scale = tl.load(scale_ptr + h * scale_stride, mask=h < H, other=0.0)
        scale = head_scale(log_scale.to(tl.float32))
        unit_q, _, _ = unit(q)
        tl.store(q_out_ptr + out, (unit_q * scale[:, None]).to(element), mask=inside)
    unit_k, _, _ = unit(k)
    tl.store(k_out_ptr + out, unit_k.to(element), mask=inside)


@triton.jit(do_not_specialize=["tokens", "num_tokens", "tokens_per_part"])
def qk_norm_backward_kernel(
    grad_q_ptr,
    grad_k_ptr,
    q_ptr,
    k_ptr,
    scale_ptr,
    dq_ptr,
    dk_ptr,
    sums_ptr,
    grad_q_stride_b,
    grad_q_stride_t,
    grad_q_stride_h,
    grad_k_stride_b,
    grad_k_stride_t,
    grad_k_stride_h,
    q_stride_b,
    q_stride_t,
    q_stride_h,
    k_stride_b,
    k_stride_t,
    k_stride_h,
    scale_stride,
    tokens,
    num_tokens,
    tokens_per_part,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    D_PADDED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dQ and dK of the tokens of one part, and the sums (N, H) for scale_mul's gradient.

    The sum of a head is that of g . n over the tokens; g is the gradient, n the unit query.
    """
    tiles: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    part = tl.program_id(0) // tiles
    first = part * tokens_per_part
    last = tl.minimum(first + tokens_per_part, num_tokens)
    h = tl.program_id(0) % tiles * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tl.arange(0, D_PADDED)[None, :]
    inside = (h < H)[:, None] & (d < D)
    scale = head_scale(tl.load(scale_ptr + h * scale_stride, mask=h < H, other=0.0).to(tl.float32))
    total = tl.zeros((BLOCK_H,), tl.float32)
    element = dq_ptr.dtype.element_ty
    for token in tl.range(first, last, num_stages=STAGES):
        b, t = (token // tokens).to(tl.int64), (token % tokens).to(tl.int64)
        q_rows = q_ptr + b * q_stride_b + t * q_stride_t + h * q_stride_h
        k_rows = k_ptr + b * k_stride_b + t * k_stride_t + h * k_stride_h
        dq_rows = grad_q_ptr + b * grad_q_stride_b + t * grad_q_stride_t + h * grad_q_stride_h
        dk_rows = grad_k_ptr + b * grad_k_stride_b + t * grad_k_stride_t + h * grad_k_stride_h
        q = tl.load(q_rows[:, None] + d, mask=inside, other=0.0).to(tl.float32)
        k = tl.load(k_rows[:, None] + d, mask=inside, other=0.0).to(tl.float32)
        grad_q = tl.load(dq_rows[:, None] + d, mask=inside, other=0.0).to(tl.float32)
        grad_k = tl.load(dk_rows[:, None] + d, mask=inside, other=0.0).to(tl.float32)
        out = (tl.cast(token, tl.int64) * H + h)[:, None] * D + d

        dq, along = unit_gradient(grad_q, q)
        total += along
        tl.store(dq_ptr + out, (dq * scale[:, None]).to(element), mask=inside)
        dk, _ = unit_gradient(grad_k, k)
        tl.store(dk_ptr + out, dk.to(element), mask=inside)
    tl.store(sums_ptr + part.to(tl.int64) * H + h, total, mask=h < H)


@triton.jit(do_not_specialize=["parts"])
def qk_norm_sums_kernel(
    sums_ptr,
    scale_ptr,
    dscale_ptr,
    scale_stride,
    parts,
    H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Add the parts in a fixed order; the clamp passes gradient up to and including its bound."""
    h = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    n = tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
    for start in range(0, parts, BLOCK_N):
        inside = (start + n < parts)[:, None] & (h < H)[None, :]
        total += tl.load(sums_ptr + (start + n)[:, None] * H + h, mask=inside, other=0.0)
    log_scale = tl.load(scale_ptr + h * scale_stride, mask=h < H, other=0.0).to(tl.float32)
    dscale = tl.where(log_scale > MAX_LOG_SCALE, 0.0, tl.sum(total, 0) * head_scale(log_scale))
    tl.store(dscale_ptr + h, dscale.to(dscale_ptr.dtype.element_ty), mask=h < H)


# --- launchers ----------------------------------------------------------------------------------

STAGES = 2
BLOCK_PARTS, BLOCK_SUMS = 64, 16


def launch_qk_norm_forward(
    *, q_BTHD: torch.Tensor, k_BTHD: torch.Tensor, scale_mul_1H11: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """q / max(|q|, 1e-12) * exp(min(scale_mul, log 100)) and k / max(|k|, 1e-12).

    Returns:
        q_out_BTHD, k_out_BTHD: contiguous, the inputs' dtype.
    """
    q_out_BTHD = torch.empty_like(q_BTHD, memory_format=torch.contiguous_format)
    return q_out_BTHD, _launch_forward(q_BTHD, k_BTHD, scale_mul_1H11, q_out_BTHD)


def launch_unit_keys(*, k_BTHD: torch.Tensor) -> torch.Tensor:
    """k / max(|k|, 1e-12), as launch_qk_norm_forward computes it: contiguous, k's dtype."""
    return _launch_forward(None, k_BTHD, None, None)


def _launch_forward(
    q_BTHD: torch.Tensor | None,
    k_BTHD: torch.Tensor,
    scale_mul_1H11: torch.Tensor | None,
    q_out_BTHD: torch.Tensor | None,
) -> torch.Tensor:
    """Write q_out_BTHD if there are queries; return the normalised keys."""
    batch, tokens, heads, head_dim = k_BTHD.shape
    k_out_BTHD = torch.empty_like(k_BTHD, memory_format=torch.contiguous_format)
    if k_BTHD.numel() == 0:
        return k_out_BTHD
    block_h, d_padded = heads_per_block(heads, head_dim), padded(head_dim)
    with on_device_of(k_BTHD):
        qk_norm_forward_kernel[(batch * tokens * -(-heads // block_h),)](
            q_BTHD,
            k_BTHD,
            scale_mul_1H11,
            q_out_BTHD,
            k_out_BTHD,
            *(q_BTHD if q_BTHD is not None else k_BTHD).stride()[:3],
            *k_BTHD.stride()[:3],
            scale_mul_1H11.stride(1) if scale_mul_1H11 is not None else 1,
            tokens,
            H=heads,
            D=head_dim,
            BLOCK_H=block_h,
            D_PADDED=d_padded,
            num_warps=num_warps_for(block_h * d_padded, k_BTHD.device, HEADS_PER_THREAD),
            enable_fp_fusion=True,
        )
    return k_out_BTHD


def launch_qk_norm_backward(
    *,
    grad_q_BTHD: torch.Tensor,
    grad_k_BTHD: torch.Tensor,
    q_BTHD: torch.Tensor,
    k_BTHD: torch.Tensor,
    scale_mul_1H11: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of launch_qk_norm_forward.

    The gradient of scale_mul is 0 for heads above log 100. Where a norm was clamped, the gradient
    is that of a division by 1e-12.

    Returns:
        dq_BTHD, dk_BTHD (contiguous, the inputs' dtype), dscale_mul_1H11 (scale_mul's dtype).
    """
    batch, tokens, heads, head_dim = q_BTHD.shape
    grad_q_BTHD, grad_k_BTHD = last_contiguous(grad_q_BTHD), last_contiguous(grad_k_BTHD)
    dq_BTHD = torch.empty_like(q_BTHD, memory_format=torch.contiguous_format)
    dk_BTHD = torch.empty_like(k_BTHD, memory_format=torch.contiguous_format)
    dscale_mul_1H11 = torch.empty_like(scale_mul_1H11, memory_format=torch.contiguous_format)
    if q_BTHD.numel() == 0:
        return dq_BTHD, dk_BTHD, dscale_mul_1H11.zero_()
    block_h, d_padded = heads_per_block(heads, head_dim), padded(head_dim)
    num_tokens, tiles = batch * tokens, -(-heads // block_h)
    num_warps = num_warps_for(block_h * d_padded, q_BTHD.device)
    processors = common.num_processors(q_BTHD.device)
    tokens_per_part = rows_per_part(num_tokens, tiles, processors, num_warps, 1)
    parts = -(-num_tokens // tokens_per_part)
    sums_NH = q_BTHD.new_empty((parts, heads), dtype=torch.float32)
    with on_device_of(q_BTHD):
        qk_norm_backward_kernel[(parts * tiles,)](
            grad_q_BTHD,
            grad_k_BTHD,
            q_BTHD,
            k_BTHD,
            scale_mul_1H11,
            dq_BTHD,
            dk_BTHD,
            sums_NH,
            *grad_q_BTHD.stride()[:3],
            *grad_k_BTHD.stride()[:3],
            *q_BTHD.stride()[:3],
            *k_BTHD.stride()[:3],
            scale_mul_1H11.stride(1),
            tokens,
            num_tokens,
            tokens_per_part,
            H=heads,
            D=head_dim,
            BLOCK_H=block_h,
            D_PADDED=d_padded,
            STAGES=STAGES,
            num_warps=num_warps,
            enable_fp_fusion=True,
        )
        qk_norm_sums_kernel[(-(-heads // BLOCK_SUMS),)](
            sums_NH,
            scale_mul_1H11,
            dscale_mul_1H11,
            scale_mul_1H11.stride(1),
            parts,
            H=heads,
            BLOCK_N=BLOCK_PARTS,
            BLOCK_H=BLOCK_SUMS,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return dq_BTHD, dk_BTHD, dscale_mul_1H11
