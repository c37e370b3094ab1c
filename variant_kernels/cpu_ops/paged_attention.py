"""CPU launcher of paged_attention. B batch, T queries, H heads, D head width, P pages, N slots of a
page, M page-table entries of a sequence.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from variant_kernels.cpu_ops.common import KERNELS, dtype_code
from variant_kernels.tensors import address_and_strides, empty_as, float32_copy

# Elements of K, and of V, that are copied to float32 at once, unless one sequence has more.
MAX_COPIED = 2**20


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
    if q_BTHD.dtype == torch.float16 and k_scales_PNH is None:
        pages = k_pages_PNHD, v_pages_PNHD
        return _float16_attention(q_BTHD, *pages, page_table_BM, kv_lens_B, softmax_scale)
    dtype = dtype_code("paged_attention", "q_BTHD", q_BTHD)
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


def _float16_attention(
    q_BTHD: Tensor,
    k_pages_PNHD: Tensor,
    v_pages_PNHD: Tensor,
    page_table_BM: Tensor,
    kv_lens_B: Tensor,
    softmax_scale: float,
) -> Tensor:
    """The float32 kernel over float32 copies of the pages in use; the result is rounded once.

    A few sequences at a time, so that the copies stay small.
    """
    batch, page_size = q_BTHD.shape[0], k_pages_PNHD.shape[1]
    num_copied = max(1, page_table_BM.shape[1] * k_pages_PNHD[:1].numel())
    group = max(1, MAX_COPIED // num_copied)
    if group < batch:
        out_BTHD = empty_as(q_BTHD, torch.float16)
        for first in range(0, batch, group):
            rows = slice(first, first + group)
            tables = page_table_BM[rows], kv_lens_B[rows]
            out_BTHD[rows] = _float16_attention(
                q_BTHD[rows], k_pages_PNHD, v_pages_PNHD, *tables, softmax_scale
            )
        return out_BTHD
    pages_S, table_BM = _pages_in_use(page_table_BM, kv_lens_B, page_size)
    return launch_paged_attention_forward(
        q_BTHD=float32_copy(q_BTHD),
        k_pages_PNHD=float32_copy(k_pages_PNHD.index_select(0, pages_S)),
        v_pages_PNHD=float32_copy(v_pages_PNHD.index_select(0, pages_S)),
        page_table_BM=table_BM,
        kv_lens_B=kv_lens_B,
        softmax_scale=softmax_scale,
    ).half()


def _pages_in_use(
    page_table_BM: Tensor, kv_lens_B: Tensor, page_size: int
) -> tuple[Tensor, Tensor]:
    """The pages that hold visible tokens, one after another, and the table of their copies."""
    batch, entries = page_table_BM.shape
    if min(kv_lens_B.tolist(), default=0) > (entries - 1) * page_size:
        return page_table_BM.reshape(-1), _numbered(batch, entries)
    used_BM = torch.arange(entries, device="cpu") * page_size < kv_lens_B.unsqueeze(1)
    # Of entries that are not in use the number is that of another page; they are not read.
    table_BM = used_BM.flatten().cumsum(0).sub(1).view_as(page_table_BM).to(torch.int32)
    return page_table_BM[used_BM], table_BM


@lru_cache(maxsize=64)
def _numbered(batch: int, entries: int) -> Tensor:
    """The table of pages that lie in its order."""
    return torch.arange(batch * entries, dtype=torch.int32, device="cpu").view(batch, entries)
