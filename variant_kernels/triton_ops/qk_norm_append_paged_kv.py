"""qk_norm_append_paged_kv in Triton: the packed projection is read once.

B batch, T tokens, H heads, D head width, P pages, N tokens of a page.
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
    head_scale,
    heads_per_block,
    num_warps_for,
    unit,
)


@triton.jit(do_not_specialize=["slots_stride_b", "tokens", "num_slots"])
def qk_norm_append_paged_kv_kernel(
    qkv_ptr,
    scale_ptr,
    q_out_ptr,
    k_pages_ptr,
    v_pages_ptr,
    slots_ptr,
    qkv_stride_b,
    qkv_stride_t,
    qkv_stride_3,
    qkv_stride_h,
    k_pages_stride_p,
    k_pages_stride_n,
    k_pages_stride_h,
    v_pages_stride_p,
    v_pages_stride_n,
    v_pages_stride_h,
    scale_stride,
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
    NORM: tl.constexpr,
    KV8: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    D_PADDED: tl.constexpr,
):
    """One token's heads: with NORM normalise q (into q_out) and k; write k and v to their slot.

    Without q_out only k is normalised.

    With KV8 k and v are rounded to 8 bits, k after rounding to the tokens' dtype.
    """
    tiles: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    token = (tl.program_id(0) // tiles).to(tl.int64)
    b, t = token // tokens, token % tokens
    slot = tl.load(slots_ptr + b * slots_stride_b + t * slots_stride_t)
    # Not validated on a GPU: skip slots outside the pool, as -1, so that no write leaves the pool.
    heads = tl.where((slot >= 0) & (slot < num_slots), H, 0)
    page, offset = slot // PAGE_SIZE, slot % PAGE_SIZE
    h = tl.program_id(0) % tiles * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tl.arange(0, D_PADDED)[None, :]
    inside = (h < H)[:, None] & (d < D)
    written = (h < heads)[:, None] & (d < D)
    wide_h = h.to(tl.int64)
    q_pointers = (qkv_ptr + b * qkv_stride_b + t * qkv_stride_t + wide_h * qkv_stride_h)[
        :, None
    ] + d
    k = tl.load(q_pointers + qkv_stride_3, mask=written, other=0.0)
    v = tl.load(q_pointers + tl.cast(qkv_stride_3, tl.int64) * 2, mask=written)
    if NORM:
        if q_out_ptr is not None:
            q = tl.load(q_pointers, mask=inside, other=0.0).to(tl.float32)
            log_scale = tl.load(scale_ptr + h * scale_stride, mask=h < H, other=0.0)
            scale = head_scale(log_scale.to(tl.float32))
            unit_q, _, _ = unit(q)
            out = (unit_q * scale[:, None]).to(q_out_ptr.dtype.element_ty)
            tl.store(q_out_ptr + (token * H + h)[:, None] * D + d, out, mask=inside)
        unit_k, _, _ = unit(k.to(tl.float32))
        k = unit_k.to(qkv_ptr.dtype.element_ty)
    if KV8:
        k_scales = k_scales_ptr + page * k_scales_stride_p + offset * k_scales_stride_n
        v_scales = v_scales_ptr + page * v_scales_stride_p + offset * v_scales_stride_n
        k = quantised_into(k_scales, k, written, h, heads)
        v = quantised_into(v_scales, v, written, h, heads)
    k_slot = k_pages_ptr + page * k_pages_stride_p + offset * k_pages_stride_n
    v_slot = v_pages_ptr + page * v_pages_stride_p + offset * v_pages_stride_n
    tl.store((k_slot + wide_h * k_pages_stride_h)[:, None] + d, k, mask=written)
    tl.store((v_slot + wide_h * v_pages_stride_h)[:, None] + d, v, mask=written)


def launch_qk_norm_append_paged_kv(
    *,
    qkv_BT3HD: torch.Tensor,
    scale_mul_1H11: torch.Tensor | None,
    k_pages_PNHD: torch.Tensor,
    v_pages_PNHD: torch.Tensor,
    slots_BT: torch.Tensor,
    k_scales_PNH: torch.Tensor | None = None,
    v_scales_PNH: torch.Tensor | None = None,
    norm_queries: bool = True,
) -> torch.Tensor:
    """Normalise queries and keys, write keys and values into their slots; -1 skips the token.

    A slot is page * page_size + offset. On a GPU slots are not validated: those outside the pool
    are skipped. If two tokens have the same slot, the result is undefined. With scales, pages are
    float8_e4m3fn and k and v are quantised (``kv_quantization``).

    Args:
        norm_queries: False leaves the queries to an attention that normalises them itself.
    Returns:
        q_BTHD: new and contiguous; without scale_mul_1H11 or norm_queries the view
        qkv_BT3HD[:, :, 0].
    """
    batch, tokens, _, heads, head_dim = qkv_BT3HD.shape
    norm = scale_mul_1H11 is not None
    write_queries = norm and norm_queries
    if write_queries:
        q_BTHD = qkv_BT3HD.new_empty((batch, tokens, heads, head_dim))
    else:
        q_BTHD = qkv_BT3HD.select(2, 0)
    if qkv_BT3HD.numel() == 0:
        return q_BTHD
    num_pages, page_size = k_pages_PNHD.shape[:2]
    block_h, d_padded = heads_per_block(heads, head_dim), padded(head_dim)
    with on_device_of(qkv_BT3HD):
        qk_norm_append_paged_kv_kernel[(batch * tokens * -(-heads // block_h),)](
            qkv_BT3HD,
            scale_mul_1H11,
            q_BTHD if write_queries else None,
            *page_bytes(k_pages_PNHD, v_pages_PNHD, k_scales_PNH),
            slots_BT,
            *qkv_BT3HD.stride()[:4],
            *k_pages_PNHD.stride()[:3],
            *v_pages_PNHD.stride()[:3],
            scale_mul_1H11.stride(1) if scale_mul_1H11 is not None else 0,
            *slots_BT.stride(),
            *scale_arguments(k_scales_PNH, v_scales_PNH),
            tokens,
            num_pages * page_size,
            NORM=norm,
            KV8=k_scales_PNH is not None,
            PAGE_SIZE=page_size,
            H=heads,
            D=head_dim,
            BLOCK_H=block_h,
            D_PADDED=d_padded,
            num_warps=num_warps_for(block_h * d_padded, qkv_BT3HD.device, HEADS_PER_THREAD),
            enable_fp_fusion=True,
        )
    return q_BTHD
