"""CUDA launcher of qk_norm_append_paged_kv.

B batch, T tokens, H heads, D head width, P pages, N slots.
"""

from __future__ import annotations

import struct

import torch

from variant_kernels.cuda_ops import common

# QkNormAppendPagedKvCudaArgs
_ARGS = struct.Struct("@28qiiq")
# QkNormAppendPagedKv8Args: the same and the scales' addresses and strides.
_KV8_ARGS = struct.Struct("@28qiiq6q")


def launch_rows(
    *,
    op: str,
    q: tuple[int, ...],
    k: tuple[int, ...],
    v: tuple[int, ...],
    like_BTHD: torch.Tensor,
    scale_mul_address: int,
    out_address: int,
    k_pages_PNHD: torch.Tensor,
    v_pages_PNHD: torch.Tensor,
    slots_BT: torch.Tensor,
    k_scales_PNH: torch.Tensor | None,
    v_scales_PNH: torch.Tensor | None,
) -> None:
    """The kernel: q, k and v are (address, strides) of tensors of ``like_BTHD``'s shape and dtype.

    Raises:
        RuntimeError: the launch failed.  ValueError: too many rows.
    """
    batch, tokens, heads, head_dim = like_BTHD.shape
    common.check_rows(op, "tokens and heads", batch * tokens * heads)
    if k_scales_PNH is None or v_scales_PNH is None:
        name, layout, scales = "qk_norm_append_paged_kv", _ARGS, ()
    else:
        name, layout = "qk_norm_append_paged_kv8", _KV8_ARGS
        scales = (
            k_scales_PNH.data_ptr(),
            v_scales_PNH.data_ptr(),
            *k_scales_PNH.stride()[:2],
            *v_scales_PNH.stride()[:2],
        )
    common.launch(
        op,
        name,
        layout,
        (
            *(batch, tokens, heads, head_dim, k_pages_PNHD.shape[1]),
            *q,
            *k,
            *v,
            scale_mul_address,
            out_address,
            k_pages_PNHD.data_ptr(),
            v_pages_PNHD.data_ptr(),
            *k_pages_PNHD.stride()[:3],
            *v_pages_PNHD.stride()[:3],
            slots_BT.data_ptr(),
            common.DTYPE_CODES[like_BTHD.dtype],
            0,
            k_pages_PNHD.shape[0],
            *scales,
        ),
        like_BTHD,
    )


def launch_qk_norm_append_paged_kv(
    *,
    qkv_BT3HD: torch.Tensor,
    scale_mul_1H11: torch.Tensor | None,
    k_pages_PNHD: torch.Tensor,
    v_pages_PNHD: torch.Tensor,
    slots_BT: torch.Tensor,
    k_scales_PNH: torch.Tensor | None = None,
    v_scales_PNH: torch.Tensor | None = None,
) -> torch.Tensor:
    """Normalise queries and keys, write keys and values into their slots; -1 skips the token.

    A slot is page * page_size + offset. Slots are not checked on a GPU: one past the last page is
    skipped as well. The caller must not give two tokens the same slot. With scales the pages
    are float8_e4m3fn; the rounded keys and values of a (token, head) and their scales are written.

    Returns:
        q_BTHD: new and contiguous; without scale_mul_1H11 the view qkv_BT3HD[:, :, 0].
    Raises:
        RuntimeError: the launch failed.
    """
    slots_BT = slots_BT.contiguous()
    batch, tokens, _, heads, head_dim = qkv_BT3HD.shape
    batch_stride, token_stride, part_stride, head_stride, _ = qkv_BT3HD.stride()
    address, part_bytes = qkv_BT3HD.data_ptr(), part_stride * qkv_BT3HD.element_size()
    strides = (batch_stride, token_stride, head_stride)
    scale_address = out_address = 0
    if scale_mul_1H11 is None:
        q_BTHD = qkv_BT3HD.select(2, 0)
    else:
        scale_mul_H = scale_mul_1H11.reshape(-1).float().contiguous()
        q_BTHD = qkv_BT3HD.new_empty((batch, tokens, heads, head_dim))
        scale_address, out_address = scale_mul_H.data_ptr(), q_BTHD.data_ptr()
    if q_BTHD.numel() == 0:
        return q_BTHD
    launch_rows(
        op="qk_norm_append_paged_kv",
        q=(address, *strides),
        k=(address + part_bytes, *strides),
        v=(address + 2 * part_bytes, *strides),
        like_BTHD=q_BTHD,
        scale_mul_address=scale_address,
        out_address=out_address,
        k_pages_PNHD=k_pages_PNHD,
        v_pages_PNHD=v_pages_PNHD,
        slots_BT=slots_BT,
        k_scales_PNH=k_scales_PNH,
        v_scales_PNH=v_scales_PNH,
    )
    return q_BTHD
