"""CPU launcher of paged_attention. B batch, T queries, H heads, D head width, P pages, N slots of a
page, M page-table entries of a sequence.
"""

from __future__ import annotations

import torch

from variant_kernels.cpu_ops.common import KERNELS, dtype_code, empty_as, rows


def launch_paged_attention_forward(
    *,
    q_BTHD: torch.Tensor,
    k_pages_PNHD: torch.Tensor,
    v_pages_PNHD: torch.Tensor,
    page_table_BM: torch.Tensor,
    kv_lens_B: torch.Tensor,
    softmax_scale: float,
) -> torch.Tensor:
    """softmax(softmax_scale * q k^T) v over the first kv_lens_B[b] tokens of sequence b.

    Token s lies at page page_table_BM[b, s // N], slot s % N. A length of 0 gives zeros. Neither
    page-table entries nor slots past the length are read.

    Returns:
        out_BTHD: contiguous, q's dtype.
    Raises:
        ValueError: a length or a page index that would be used is out of range.
        TypeError: the dtype is neither float32 nor bfloat16.
    """
    dtype = dtype_code("paged_attention", "q_BTHD", q_BTHD)
    num_pages, page_size = k_pages_PNHD.shape[:2]
    if kv_lens_B.numel():
        _check_pages(page_table_BM, kv_lens_B, num_pages, page_size)
    page_table_BM, kv_lens_B = page_table_BM.contiguous(), kv_lens_B.contiguous()
    out_BTHD = empty_as(q_BTHD, q_BTHD.dtype)
    KERNELS.paged_attention_forward(
        tuple(q_BTHD.shape),
        page_size,
        rows(q_BTHD),
        rows(k_pages_PNHD),
        rows(v_pages_PNHD),
        rows(page_table_BM),
        kv_lens_B.data_ptr(),
        out_BTHD.data_ptr(),
        softmax_scale,
        dtype,
        torch.get_num_threads(),
    )
    return out_BTHD


def _check_pages(
    page_table_BM: torch.Tensor, kv_lens_B: torch.Tensor, num_pages: int, page_size: int
) -> None:
    """Every length fits the page table, and every entry that it makes visible is a page."""
    table_BM, lens_B = page_table_BM.numpy(), kv_lens_B.numpy()
    capacity = table_BM.shape[1] * page_size
    if lens_B.min() < 0 or lens_B.max() > capacity:
        b = int(((lens_B < 0) | (lens_B > capacity)).argmax())
        raise ValueError(
            f"paged_attention: kv_lens_B[{b}] must be in [0, {capacity}]; got {lens_B[b]}. "
            f"page_table_BM holds {table_BM.shape[1]} pages of {page_size} tokens"
        )
    used_B1 = (lens_B[:, None] + (page_size - 1)) // page_size
    used_BM = torch.arange(table_BM.shape[1]).numpy() < used_B1
    wrong_BM = used_BM & ((table_BM < 0) | (table_BM >= num_pages))
    if wrong_BM.any():
        b, m = (int(i) for i in divmod(int(wrong_BM.argmax()), table_BM.shape[1]))
        raise ValueError(
            f"paged_attention: page_table_BM[{b}, {m}] must be in [0, {num_pages}); got "
            f"{table_BM[b, m]}. kv_lens_B[{b}] = {lens_B[b]} makes {int(used_B1[b, 0])} pages of "
            f"{page_size} tokens visible"
        )
