"""adaln_modulate and gated_residual_adaln in Triton. B batch, T tokens, C width; N parts of the
tokens of an image, S sums over tokens (scale, shift, gate).

Forward: one pass over the tokens. Backward: each program loops over some tokens of one image and
accumulates their sums in registers; a second kernel adds the parts in a fixed order.
"""

# Triton's compiler gives a kernel's arguments other types than Python's checker sees.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportAssignmentType=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

from variant_kernels.tensors import last_contiguous
from variant_kernels.triton_ops import common
from variant_kernels.triton_ops.common import on_device_of, padded
from variant_kernels.triton_ops.rows import (
    num_warps_for,
    reciprocal_root,
    rows_per_block,
    rows_per_part,
)


@triton.jit(do_not_specialize=["tokens"])
def adaln_forward_kernel(
    x_ptr,
    y_ptr,
    gate_ptr,
    earlier_y_ptr,
    earlier_gate_ptr,
    scale_ptr,
    shift_ptr,
    x_out_ptr,
    h_ptr,
    mean_ptr,
    rstd_ptr,
    x_stride_b,
    x_stride_t,
    y_stride_b,
    y_stride_t,
    gate_stride,
    earlier_y_stride_b,
    earlier_y_stride_t,
    earlier_gate_stride,
    scale_stride,
    shift_stride,
    tokens,
    eps,
    GATED: tl.constexpr,
    EARLIER: tl.constexpr,
    STORED: tl.constexpr,
    C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """h = (x - mean) * rstd * (1 + scale) + shift; with GATED x is x_out = x + gate * y.

    x_out is written with STORED. With EARLIER x is first the sum that an earlier launch left out,
    x + earlier_gate * earlier_y.
    """
    tiles = tl.cdiv(tokens, BLOCK_T)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    t = tl.program_id(0) % tiles * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.arange(0, BLOCK_C)[None, :]
    inside = (t < tokens)[:, None] & (c < C)
    token = b * tokens + t
    x_rows = x_ptr + b * x_stride_b + t.to(tl.int64) * x_stride_t
    x = tl.load(x_rows[:, None] + c, mask=inside, other=0.0).to(tl.float32)
    if EARLIER:
        y_rows = earlier_y_ptr + b * earlier_y_stride_b + t.to(tl.int64) * earlier_y_stride_t
        y = tl.load(y_rows[:, None] + c, mask=inside, other=0.0).to(tl.float32)
        gates = earlier_gate_ptr + b * earlier_gate_stride
        gate = tl.load(gates + c, mask=c < C, other=0.0).to(tl.float32)
        x = (x + gate * y).to(x_ptr.dtype.element_ty).to(tl.float32)
    if GATED:
        y_rows = y_ptr + b * y_stride_b + t.to(tl.int64) * y_stride_t
        y = tl.load(y_rows[:, None] + c, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptr + b * gate_stride + c, mask=c < C, other=0.0).to(tl.float32)
        rounded = (x + gate * y).to(x_ptr.dtype.element_ty)
        if STORED:
            tl.store(x_out_ptr + token[:, None] * C + c, rounded, mask=inside)
        # Statistics of the rounded values, which the next branch reads.
        x = rounded.to(tl.float32)
    scale = tl.load(scale_ptr + b * scale_stride + c, mask=c < C, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + b * shift_stride + c, mask=c < C, other=0.0).to(tl.float32)
    # Two passes over registers: E[x^2] - mean^2 would cancel for a large mean.
    mean = tl.sum(x, 1) / C
    centred = tl.where(inside, x - mean[:, None], 0.0)
    rstd = reciprocal_root(tl.sum(centred * centred, 1) / C + eps)
    h = centred * rstd[:, None] * (1.0 + scale) + shift
    tl.store(h_ptr + token[:, None] * C + c, h.to(h_ptr.dtype.element_ty), mask=inside)
    tl.store(mean_ptr + token, mean, mask=t < tokens)
    tl.store(rstd_ptr + token, rstd, mask=t < tokens)


@triton.jit(do_not_specialize=["tokens", "parts", "tokens_per_part"])
def adaln_backward_kernel(
    grad_x_out_ptr,
    grad_h_ptr,
    x_ptr,
    y_ptr,
    gate_ptr,
    scale_ptr,
    mean_ptr,
    rstd_ptr,
    grad_x_ptr,
    grad_y_ptr,
    sums_ptr,
    grad_x_out_stride_b,
    grad_x_out_stride_t,
    grad_h_stride_b,
    grad_h_stride_t,
    x_stride_b,
    x_stride_t,
    y_stride_b,
    y_stride_t,
    gate_stride,
    scale_stride,
    tokens,
    parts,
    tokens_per_part,
    GATED: tl.constexpr,
    C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    """With n = (x - mean) * rstd and g = grad_h * (1 + scale), for one part of an image's tokens:

    grad_x = rstd * (g - mean_C(g) - n * mean_C(g * n)) (+ grad_x_out);  grad_y = grad_x * gate
    sums over tokens of grad_h * n, grad_h and grad_x * y: sums (B, N, S, C)
    """
    b = (tl.program_id(0) // parts).to(tl.int64)
    first = tl.program_id(0) % parts * tokens_per_part
    last = tl.minimum(first + tokens_per_part, tokens)
    c = tl.arange(0, BLOCK_C)[None, :]
    scale = tl.load(scale_ptr + b * scale_stride + c, mask=c < C, other=0.0).to(tl.float32)
    if GATED:
        gate = tl.load(gate_ptr + b * gate_stride + c, mask=c < C, other=0.0).to(tl.float32)
    grad_scale = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    grad_shift = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    grad_gate = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for start in tl.range(first, last, BLOCK_T, num_stages=STAGES):
        t = start + tl.arange(0, BLOCK_T)
        wide_t = t.to(tl.int64)
        inside = (t < last)[:, None] & (c < C)
        x_rows = x_ptr + b * x_stride_b + wide_t * x_stride_t
        grad_h_rows = grad_h_ptr + b * grad_h_stride_b + wide_t * grad_h_stride_t
        x = tl.load(x_rows[:, None] + c, mask=inside, other=0.0).to(tl.float32)
        grad_h = tl.load(grad_h_rows[:, None] + c, mask=inside, other=0.0).to(tl.float32)
        token = b * tokens + t
        mean = tl.load(mean_ptr + token, mask=t < last, other=0.0)
        rstd = tl.load(rstd_ptr + token, mask=t < last, other=0.0)
        # Zero outside, where grad_h is.
        normed = (x - mean[:, None]) * rstd[:, None]
        grad_scale += grad_h * normed
        grad_shift += grad_h
        g = grad_h * (1.0 + scale)
        along = tl.sum(g * normed, 1) / C
        grad_x = rstd[:, None] * (g - (tl.sum(g, 1) / C)[:, None] - normed * along[:, None])
        if GATED:
            out_rows = grad_x_out_ptr + b * grad_x_out_stride_b + wide_t * grad_x_out_stride_t
            grad_x += tl.load(out_rows[:, None] + c, mask=inside, other=0.0).to(tl.float32)
            y_rows = y_ptr + b * y_stride_b + wide_t * y_stride_t
            y = tl.load(y_rows[:, None] + c, mask=inside, other=0.0).to(tl.float32)
            grad_gate += grad_x * y
            grad_y = (grad_x * gate).to(grad_y_ptr.dtype.element_ty)
            tl.store(grad_y_ptr + token[:, None] * C + c, grad_y, mask=inside)
        grad_x = grad_x.to(grad_x_ptr.dtype.element_ty)
        tl.store(grad_x_ptr + token[:, None] * C + c, grad_x, mask=inside)
    SUMS: tl.constexpr = 3 if GATED else 2
    columns = tl.arange(0, BLOCK_C)
    row = sums_ptr + tl.program_id(0).to(tl.int64) * (SUMS * C) + columns
    tl.store(row, tl.sum(grad_scale, 0), mask=columns < C)
    tl.store(row + C, tl.sum(grad_shift, 0), mask=columns < C)
    if GATED:
        tl.store(row + 2 * C, tl.sum(grad_gate, 0), mask=columns < C)


@triton.jit(do_not_specialize=["parts"])
def adaln_sums_kernel(
    sums_ptr,
    grad_scale_ptr,
    grad_shift_ptr,
    grad_gate_ptr,
    parts,
    GATED: tl.constexpr,
    C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Add the parts of one image in a fixed order: sums (B, N, S, C) to S times (B, C)."""
    tiles: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    SUMS: tl.constexpr = 3 if GATED else 2
    b = (tl.program_id(0) // tiles).to(tl.int64)
    c = tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    n = tl.arange(0, BLOCK_N)
    out = b * C + c
    for which in tl.static_range(SUMS):
        total = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
        for start in range(0, parts, BLOCK_N):
            row = (b * parts + start + n) * SUMS + which
            inside = (start + n < parts)[:, None] & (c < C)[None, :]
            total += tl.load(sums_ptr + row[:, None] * C + c[None, :], mask=inside, other=0.0)
        if which == 0:
            target = grad_scale_ptr + out
        elif which == 1:
            target = grad_shift_ptr + out
        else:
            target = grad_gate_ptr + out
        tl.store(target, tl.sum(total, 0).to(grad_scale_ptr.dtype.element_ty), mask=c < C)


# --- launchers ----------------------------------------------------------------------------------

# The sums of a part with fewer tokens would be about as large as its inputs.
MIN_TOKENS_PER_PART = 8
STAGES = 2
BLOCK_PARTS, BLOCK_COLUMNS = 16, 64


def launch_adaln_forward(
    *, x_BTC: torch.Tensor, scale_BC: torch.Tensor, shift_BC: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y = (x - mean) * rstd * (1 + scale) + shift; biased variance, float32 statistics.

    Returns:
        y_BTC (scale's dtype), mean_BT and rstd_BT (float32), all contiguous.
    """
    _, h_BTC, mean_BT, rstd_BT = _forward(x_BTC, None, None, scale_BC, shift_BC, eps)
    return h_BTC, mean_BT, rstd_BT


def launch_gated_adaln_forward(
    *,
    x_BTC: torch.Tensor,
    y_BTC: torch.Tensor,
    gate_BC: torch.Tensor,
    scale_BC: torch.Tensor,
    shift_BC: torch.Tensor,
    eps: float,
    store_sum: bool = True,
    earlier: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x_out = x + gate * y, rounded to x's dtype; h = adaLN(x_out) from the rounded values.

    Args:
        store_sum: False does not write x_out; the x_BTC that came is returned in its place.
        earlier: y_BTC and gate_BC of a call with the same x_BTC that did not: their sum, rounded
            likewise, takes the place of x_BTC. Both together move 22 bytes for each entry of a
            float32 x and a 16-bit y; two calls that write their sums move 24.
    Returns:
        x_out_BTC (x's dtype), h_BTC (y's dtype), mean_BT and rstd_BT (float32), all contiguous.
    """
    x_out_BTC, h_BTC, mean_BT, rstd_BT = _forward(
        x_BTC, y_BTC, gate_BC, scale_BC, shift_BC, eps, store_sum=store_sum, earlier=earlier
    )
    return x_BTC if x_out_BTC is None else x_out_BTC, h_BTC, mean_BT, rstd_BT


def _empty_as(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def _row_strides(x: torch.Tensor | None) -> tuple[int, ...]:
    """All strides but the last, which is 1; of an absent (B, T, C) tensor: zeros."""
    return (0, 0) if x is None else x.stride()[:-1]


def _forward(
    x_BTC: torch.Tensor,
    y_BTC: torch.Tensor | None,
    gate_BC: torch.Tensor | None,
    scale_BC: torch.Tensor,
    shift_BC: torch.Tensor,
    eps: float,
    *,
    store_sum: bool = True,
    earlier: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, tokens, width = x_BTC.shape
    h_BTC = _empty_as(x_BTC, scale_BC.dtype)
    stored = y_BTC is not None and store_sum
    x_out_BTC = _empty_as(x_BTC, x_BTC.dtype) if stored else None
    earlier_y_BTC, earlier_gate_BC = (None, None) if earlier is None else earlier
    mean_BT = x_BTC.new_empty((batch, tokens), dtype=torch.float32)
    rstd_BT = x_BTC.new_empty((batch, tokens), dtype=torch.float32)
    if x_BTC.numel() == 0:
        return x_out_BTC, h_BTC, mean_BT, rstd_BT
    block_c = padded(width)
    block_t = rows_per_block(block_c, tokens)
    with on_device_of(x_BTC):
        adaln_forward_kernel[(batch * -(-tokens // block_t),)](
            x_BTC,
            y_BTC,
            gate_BC,
            earlier_y_BTC,
            earlier_gate_BC,
            scale_BC,
            shift_BC,
            x_out_BTC,
            h_BTC,
            mean_BT,
            rstd_BT,
            *_row_strides(x_BTC),
            *_row_strides(y_BTC),
            0 if gate_BC is None else gate_BC.stride(0),
            *_row_strides(earlier_y_BTC),
            0 if earlier_gate_BC is None else earlier_gate_BC.stride(0),
            scale_BC.stride(0),
            shift_BC.stride(0),
            tokens,
            eps,
            GATED=y_BTC is not None,
            EARLIER=earlier is not None,
            STORED=stored,
            C=width,
            BLOCK_T=block_t,
            BLOCK_C=block_c,
            num_warps=num_warps_for(block_t * block_c, x_BTC.device),
            enable_fp_fusion=True,
        )
    return x_out_BTC, h_BTC, mean_BT, rstd_BT


def launch_adaln_backward(
    *,
    grad_y_BTC: torch.Tensor,
    x_BTC: torch.Tensor,
    scale_BC: torch.Tensor,
    mean_BT: torch.Tensor,
    rstd_BT: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of launch_adaln_forward, from its inputs and statistics.

    Returns:
        grad_x_BTC (x's dtype), grad_scale_BC and grad_shift_BC (scale's dtype), all contiguous.
    """
    grads = _backward(None, grad_y_BTC, x_BTC, None, None, scale_BC, mean_BT, rstd_BT)
    return grads[0], grads[2], grads[3]


def launch_gated_adaln_backward(
    *,
    grad_x_out_BTC: torch.Tensor,
    grad_h_BTC: torch.Tensor,
    x_out_BTC: torch.Tensor,
    y_BTC: torch.Tensor,
    gate_BC: torch.Tensor,
    scale_BC: torch.Tensor,
    mean_BT: torch.Tensor,
    rstd_BT: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of launch_gated_adaln_forward.

    Returns:
        grad_x_BTC (x's dtype), grad_y_BTC, grad_gate_BC, grad_scale_BC, grad_shift_BC (y's dtype),
        all contiguous.
    """
    grad_x_BTC, grad_y_BTC, grad_scale_BC, grad_shift_BC, grad_gate_BC = _backward(
        grad_x_out_BTC, grad_h_BTC, x_out_BTC, y_BTC, gate_BC, scale_BC, mean_BT, rstd_BT
    )
    assert grad_y_BTC is not None
    assert grad_gate_BC is not None
    return grad_x_BTC, grad_y_BTC, grad_gate_BC, grad_scale_BC, grad_shift_BC


def _backward(
    grad_x_out_BTC: torch.Tensor | None,
    grad_h_BTC: torch.Tensor,
    x_BTC: torch.Tensor,
    y_BTC: torch.Tensor | None,
    gate_BC: torch.Tensor | None,
    scale_BC: torch.Tensor,
    mean_BT: torch.Tensor,
    rstd_BT: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    gated = y_BTC is not None
    grad_x_BTC = _empty_as(x_BTC, x_BTC.dtype)
    grad_y_BTC = _empty_as(x_BTC, scale_BC.dtype) if gated else None
    grad_scale_BC = _empty_as(scale_BC, scale_BC.dtype)
    grad_shift_BC = _empty_as(scale_BC, scale_BC.dtype)
    grad_gate_BC = _empty_as(scale_BC, scale_BC.dtype) if gated else None
    if x_BTC.numel() == 0:
        for grad_BC in (grad_scale_BC, grad_shift_BC, grad_gate_BC):
            if grad_BC is not None:
                grad_BC.zero_()
    else:
        with on_device_of(x_BTC):
            sums_BNSC = _launch_backward(
                None if grad_x_out_BTC is None else last_contiguous(grad_x_out_BTC),
                last_contiguous(grad_h_BTC),
                x_BTC,
                y_BTC,
                gate_BC,
                scale_BC,
                mean_BT,
                rstd_BT,
                grad_x_BTC,
                grad_y_BTC,
            )
            _launch_sums(sums_BNSC, grad_scale_BC, grad_shift_BC, grad_gate_BC)
    return grad_x_BTC, grad_y_BTC, grad_scale_BC, grad_shift_BC, grad_gate_BC


def _launch_backward(
    grad_x_out_BTC: torch.Tensor | None,
    grad_h_BTC: torch.Tensor,
    x_BTC: torch.Tensor,
    y_BTC: torch.Tensor | None,
    gate_BC: torch.Tensor | None,
    scale_BC: torch.Tensor,
    mean_BT: torch.Tensor,
    rstd_BT: torch.Tensor,
    grad_x_BTC: torch.Tensor,
    grad_y_BTC: torch.Tensor | None,
) -> torch.Tensor:
    """Write grad_x_BTC and grad_y_BTC; return the sums over each part's tokens, sums_BNSC."""
    batch, tokens, width = x_BTC.shape
    gated = y_BTC is not None
    block_c = padded(width)
    block_t = rows_per_block(block_c, tokens)
    num_warps = num_warps_for(block_t * block_c, x_BTC.device)
    tokens_per_part = rows_per_part(
        tokens,
        batch,
        common.num_processors(x_BTC.device),
        num_warps,
        minimum=max(block_t, MIN_TOKENS_PER_PART),
    )
    parts = -(-tokens // tokens_per_part)
    shape = (batch, parts, 3 if gated else 2, width)
    sums_BNSC = x_BTC.new_empty(shape, dtype=torch.float32)
    adaln_backward_kernel[(batch * parts,)](
        grad_x_out_BTC,
        grad_h_BTC,
        x_BTC,
        y_BTC,
        gate_BC,
        scale_BC,
        mean_BT,
        rstd_BT,
        grad_x_BTC,
        grad_y_BTC,
        sums_BNSC,
        *_row_strides(grad_x_out_BTC),
        *_row_strides(grad_h_BTC),
        *_row_strides(x_BTC),
        *_row_strides(y_BTC),
        0 if gate_BC is None else gate_BC.stride(0),
        scale_BC.stride(0),
        tokens,
        parts,
        tokens_per_part,
        GATED=gated,
        C=width,
        BLOCK_T=block_t,
        BLOCK_C=block_c,
        STAGES=STAGES,
        num_warps=num_warps,
        enable_fp_fusion=True,
    )
    return sums_BNSC


def _launch_sums(
    sums_BNSC: torch.Tensor,
    grad_scale_BC: torch.Tensor,
    grad_shift_BC: torch.Tensor,
    grad_gate_BC: torch.Tensor | None,
) -> None:
    batch, parts, _, width = sums_BNSC.shape
    adaln_sums_kernel[(batch * -(-width // BLOCK_COLUMNS),)](
        sums_BNSC,
        grad_scale_BC,
        grad_shift_BC,
        grad_gate_BC,
        parts,
        GATED=grad_gate_BC is not None,
        C=width,
        BLOCK_N=BLOCK_PARTS,
        BLOCK_C=BLOCK_COLUMNS,
        num_warps=4,
        enable_fp_fusion=True,
    )
