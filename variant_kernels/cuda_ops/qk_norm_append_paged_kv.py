"""CUDA launcher of qk_norm_append_paged_kv.

B batch, T tokens, H heads, D head width, P pages, N slots.
"""

from __future__ import annotations

import struct

import torch

from variant_kernels.cuda_ops import common

# QkNormAppendPagedKvCudaArgs
_ARGS = struct.Struct("@28qiiq")


def launch_qk_norm_append_paged_kv(
    *,
    qkv_BT3HD: torch.Tensor,
    scale_mul_1H11: torch.Tensor | None,
    k_pages_PNHD: torch.Tensor,
    v_pages_PNHD: torch.Tensor,
    slots_BT: torch.Tensor,
) -> torch.Tensor:
    """Normalise queries and keys, write keys and values into their slots; -1 skips the token.

    A slot is page * page_size + offset. On a GPU nobody has looked at it: one past the last page
    is skipped as well. Two tokens with one slot are the caller's mistake.

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
    common.check_rows("qk_norm_append_paged_kv", "qkv_BT3HD", batch * tokens * heads)
    common.launch(
        "qk_norm_append_paged_kv",
        "qk_norm_append_paged_kv",
        _ARGS,
        (
            *(batch, tokens, heads, head_dim, k_pages_PNHD.shape[1]),
            *(address, *strides),
            *(address + part_bytes, *strides),
            *(address + 2 * part_bytes, *strides),
            scale_address,
            out_address,
            k_pages_PNHD.data_ptr(),
            v_pages_PNHD.data_ptr(),
            *k_pages_PNHD.stride()[:3],
            *v_pages_PNHD.stride()[:3],
            slots_BT.data_ptr(),
            common.DTYPE_CODES[qkv_BT3HD.dtype],
            0,
            k_pages_PNHD.shape[0],
        ),
        qkv_BT3HD,
    )
    return q_BTHD
