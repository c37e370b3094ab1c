"""CPU launcher of append_paged_kv. B batch, T tokens, H heads, D head width, P pages, N slots."""

from __future__ import annotations

import torch

from variant_kernels.cpu_ops.common import KERNELS, dtype_code
from variant_kernels.tensors import address_and_strides

NO_QUERIES = (0, 0, 0, 0)


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

    A slot is page * page_size + offset, checked by the caller, who must not give two tokens the
    same slot. With scales the pages hold e4m3 codes (``kv_quantization.quantize_kv``).

    Raises:
        TypeError: with scales, the tokens' dtype is neither float32 nor bfloat16.
    """
    slots_BT = slots_BT.contiguous()
    if k_scales_PNH is not None and v_scales_PNH is not None:
        # Without scale_mul the fused kernel is this op: it normalises nothing, reads no query.
        KERNELS.qk_norm_append_paged_kv8(
            tuple(k_BTHD.shape),
            k_pages_PNHD.shape[1],
            NO_QUERIES,
            address_and_strides(k_BTHD),
            address_and_strides(v_BTHD),
            0,
            0,
            address_and_strides(k_pages_PNHD),
            address_and_strides(v_pages_PNHD),
            address_and_strides(k_scales_PNH),
            address_and_strides(v_scales_PNH),
            slots_BT.data_ptr(),
            dtype_code("append_paged_kv", "k_BTHD", k_BTHD),
            torch.get_num_threads(),
        )
        return
    KERNELS.append_paged_kv(
        tuple(k_BTHD.shape),
        k_pages_PNHD.shape[1],
        address_and_strides(k_BTHD),
        address_and_strides(v_BTHD),
        address_and_strides(k_pages_PNHD),
        address_and_strides(v_pages_PNHD),
        slots_BT.data_ptr(),
        k_BTHD.element_size(),
        torch.get_num_threads(),
    )
