"""append_paged_kv in Triton. B batch, T tokens, H heads, D head width, P pages, N tokens of a page.

A program copies the keys and values of one token.
"""

# Triton's compiler gives a kernel's arguments other types than Python's checker sees.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

from variant_kernels.triton_ops.common import on_device_of, padded
from variant_kernels.triton_ops.e4m3 import (
    page_bytes,
    quantised_into,
    scale_arguments,
)
from variant_kernels.triton_ops.rows import (
    HEADS_PER_THREAD,
    heads_per_block,
    num_warps_for,
)


@triton.jit(do_not_specialize=["slots_stride_b", "tokens", "num_slots"])
def append_paged_kv_kernel(
    k_ptr,
    v_ptr,
    k_pages_ptr,
    v_pages_ptr,
    slots_ptr,
    k_stride_b,
    k_stride_t,
    k_stride_h,
    v_stride_b,
    v_stride_t,
    v_stride_h,
    k_pages_stride_p,
    k_pages_stride_n,
    k_pages_stride_h,
    v_pages_stride_p,
    v_pages_stride_n,
    v_pages_stride_h,
    slots_stride_b,
    slots_stride_t,
    k_scales_ptr,
    v_scales_ptr,
    k_scales_stride_p,
    k_scales_stride_n,
    v_scales_stride_p,
    v_scales_stride_n,
    tokens,
    num_slots,
    KV8: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    D_PADDED: tl.constexpr,
):
    """Copy keys and values of one token to its slot; with KV8 round them to 8 bits with scales."""
    tiles: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    token = (tl.program_id(0) // tiles).to(tl.int64)
    b, t = token // tokens, token % tokens
    slot = tl.load(slots_ptr + b * slots_stride_b + t * slots_stride_t)
    # Not validated on a GPU: skip slots outside the pool, as -1, so that no write leaves the pool.
    heads = tl.where((slot >= 0) & (slot < num_slots), H, 0)
    page, offset = slot // PAGE_SIZE, slot % PAGE_SIZE
    h = tl.program_id(0) % tiles * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tl.arange(0, D_PADDED)[None, :]
    inside = (h < heads)[:, None] & (d < D)
    wide_h = h.to(tl.int64)
    k_rows = k_ptr + b * k_stride_b + t * k_stride_t + wide_h * k_stride_h
    v_rows = v_ptr + b * v_stride_b + t * v_stride_t + wide_h * v_stride_h
    k_slot = k_pages_ptr + page * k_pages_stride_p + offset * k_pages_stride_n
    v_slot = v_pages_ptr + page * v_pages_stride_p + offset * v_pages_stride_n
    k = tl.load(k_rows[:, None] + d, mask=inside)
    v = tl.load(v_rows[:, None] + d, mask=inside)
    if KV8:
        k_scales = k_scales_ptr + page * k_scales_stride_p + offset * k_scales_stride_n
        v_scales = v_scales_ptr + page * v_scales_stride_p + offset * v_scales_stride_n
        k = quantised_into(k_scales, k, inside, h, heads)
        v = quantised_into(v_scales, v, inside, h, heads)
    tl.store((k_slot + wide_h * k_pages_stride_h)[:, None] + d, k, mask=inside)
    tl.store((v_slot + wide_h * v_pages_stride_h)[:, None] + d, v, mask=inside)


def launch_append_paged_kv(
    *,
    k_BTHD: torch.Tensor,
    v_BTHD: torch.Tensor,
    k_pages_PNHD: torch.Tensor,
    v_pages_PNHD: torch.Tensor,
    slots_BT: torch.Tensor,
    k_scales_PNH: torch.Tensor | None = None,
    v_scales_PNH: torch.Tensor | None = None,
) -> None:
    """Write the keys and values of token (b, t) into slot slots_BT[b, t]; -1 skips the token.

    A slot is page * page_size + offset. On a GPU slots are not validated: those outside the pool
    are skipped. If two tokens have the same slot, the result is undefined. With scales, pages are
    float8_e4m3fn and k and v are quantised (``kv_quantization``).
    """
    if k_BTHD.numel() == 0:
        return
    batch, tokens, heads, head_dim = k_BTHD.shape
    num_pages, page_size = k_pages_PNHD.shape[:2]
    block_h, d_padded = heads_per_block(heads, head_dim), padded(head_dim)
    with on_device_of(k_BTHD):
        append_paged_kv_kernel[(batch * tokens * -(-heads // block_h),)](
            k_BTHD,
            v_BTHD,
            *page_bytes(k_pages_PNHD, v_pages_PNHD, k_scales_PNH),
            slots_BT,
            *k_BTHD.stride()[:3],
            *v_BTHD.stride()[:3],
            *k_pages_PNHD.stride()[:3],
            *v_pages_PNHD.stride()[:3],
            *slots_BT.stride(),
            *scale_arguments(k_scales_PNH, v_scales_PNH),
            tokens,
            num_pages * page_size,
            KV8=k_scales_PNH is not None,
            PAGE_SIZE=page_size,
            H=heads,
            D=head_dim,
            BLOCK_H=block_h,
            D_PADDED=d_padded,
            num_warps=num_warps_for(block_h * d_padded, k_BTHD.device, HEADS_PER_THREAD),
            enable_fp_fusion=True,
        )
