"""CPU launcher of paged_attention. B batch, T queries, H heads, D head width, P pages, N slots of a
page, M page-table entries of a sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from variant_kernels.cpu_ops.common import DTYPE_CODES, KERNELS, PAGE_DTYPE_CODES, dtype_code
from variant_kernels.tensors import address_and_strides, empty_as


def launch_paged_attention_forward(
    *,
    q_BTHD: Tensor,
    k_pages_PNHD: Tensor,
    v_pages_PNHD: Tensor,
    page_table_BM: Tensor,
    kv_lens_B: Tensor,
    softmax_scale: float,
    k_scales_PNH: Tensor | None = None,
    v_scales_PNH: Tensor | None = None,
    consecutive: bool = False,
) -> Tensor:
    """softmax(softmax_scale * q k^T) v over the first kv_lens_B[b] tokens of sequence b.

    Token s lies at page page_table_BM[b, s // N], slot s % N. A length of 0 gives zeros. Neither
    page-table entries nor slots past the length are read; those before it have been checked. With
    scales the pages hold e4m3 codes (``kv_quantization.dequantize_kv``); the result is that of the
    pages that they stand for, in q's dtype, bit by bit.

    consecutive changes nothing here: pages are always found in the table.

    Returns:
        out_BTHD: contiguous, q's dtype.
    Raises:
        TypeError: the dtype is neither float32 nor bfloat16, nor float16 without scales.
    """
    codes = PAGE_DTYPE_CODES if k_scales_PNH is None else DTYPE_CODES
    dtype = dtype_code("paged_attention", "q_BTHD", q_BTHD, codes)
    page_table_BM, kv_lens_B = page_table_BM.contiguous(), kv_lens_B.contiguous()
    out_BTHD = empty_as(q_BTHD, q_BTHD.dtype)
    if k_scales_PNH is not None and v_scales_PNH is not None:
        KERNELS.paged_attention_kv8_forward(
            tuple(q_BTHD.shape),
            k_pages_PNHD.shape[1],
            address_and_strides(q_BTHD),
            address_and_strides(k_pages_PNHD),
            address_and_strides(v_pages_PNHD),
            address_and_strides(k_scales_PNH),
            address_and_strides(v_scales_PNH),
            address_and_strides(page_table_BM),
            kv_lens_B.data_ptr(),
            out_BTHD.data_ptr(),
            softmax_scale,
            dtype,
            torch.get_num_threads(),
        )
        return out_BTHD
    KERNELS.paged_attention_forward(
        tuple(q_BTHD.shape),
        k_pages_PNHD.shape[1],
        address_and_strides(q_BTHD),
        address_and_strides(k_pages_PNHD),
        address_and_strides(v_pages_PNHD),
        address_and_strides(page_table_BM),
        kv_lens_B.data_ptr(),
        out_BTHD.data_ptr(),
        softmax_scale,
        dtype,
        torch.get_num_threads(),
    )
    return out_BTHD
