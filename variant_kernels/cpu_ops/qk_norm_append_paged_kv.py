"""CPU launcher of qk_norm_append_paged_kv.

B batch, T tokens, H heads, D head width, P pages, N slots.
"""

from __future__ import annotations

import torch

from variant_kernels.cpu_ops.common import DTYPE_CODES, KERNELS, PAGE_DTYPE_CODES, dtype_code
from variant_kernels.tensors import address_and_strides


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

    A slot is page * page_size + offset, checked by the caller, who must not give two tokens the
    same slot. With scales the pages hold e4m3 codes (``kv_quantization.quantize_kv``).

    Returns:
        q_BTHD: new and contiguous; without scale_mul_1H11 the view qkv_BT3HD[:, :, 0].
    Raises:
        TypeError: the dtype is neither float32 nor bfloat16, nor float16 without scales.
    """
    codes = PAGE_DTYPE_CODES if k_scales_PNH is None else DTYPE_CODES
    code = dtype_code("qk_norm_append_paged_kv", "qkv_BT3HD", qkv_BT3HD, codes)
    slots_BT = slots_BT.contiguous()
    # Addresses by arithmetic: unbind would create three views, which costs more.
    batch, tokens, _, heads, head_dim = qkv_BT3HD.shape
    batch_stride, token_stride, part_stride, head_stride, _ = qkv_BT3HD.stride()
    address, part_bytes = qkv_BT3HD.data_ptr(), part_stride * qkv_BT3HD.element_size()
    strides = (batch_stride, token_stride, head_stride)
    if scale_mul_1H11 is None:
        scale_mul_H = None
        q_BTHD = qkv_BT3HD.select(2, 0)
    else:
        scale_mul_H = scale_mul_1H11.reshape(-1).float().contiguous()
        q_BTHD = torch.empty((batch, tokens, heads, head_dim), dtype=qkv_BT3HD.dtype, device="cpu")
    tokens_and_pages = (
        (batch, tokens, heads, head_dim),
        k_pages_PNHD.shape[1],
        (address, *strides),
        (address + part_bytes, *strides),
        (address + 2 * part_bytes, *strides),
        0 if scale_mul_H is None else scale_mul_H.data_ptr(),
        0 if scale_mul_H is None else q_BTHD.data_ptr(),
        address_and_strides(k_pages_PNHD),
        address_and_strides(v_pages_PNHD),
    )
    rest = slots_BT.data_ptr(), code, torch.get_num_threads()
    if k_scales_PNH is None or v_scales_PNH is None:
        KERNELS.qk_norm_append_paged_kv(*tokens_and_pages, *rest)
    else:
        scales = address_and_strides(k_scales_PNH), address_and_strides(v_scales_PNH)
        KERNELS.qk_norm_append_paged_kv8(*tokens_and_pages, *scales, *rest)
    return q_BTHD
