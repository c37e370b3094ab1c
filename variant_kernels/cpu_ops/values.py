"""Checks of index values in CPU tensors: one pass in C++, 1 us where all are in range.

B batch, T tokens, M page-table entries.
"""

from __future__ import annotations

import torch

from variant_kernels.cpu_ops.common import KERNELS


def fits_page_table(
    page_table_BM: torch.Tensor, kv_lens_B: torch.Tensor, num_pages: int, page_size: int
) -> bool:
    """Whether every length fits the table and every entry that a length uses is a page.

    Args:
        page_table_BM, kv_lens_B: int32, on the CPU, any strides.
    """
    return KERNELS.fits_page_table(
        page_table_BM.shape,
        (page_table_BM.data_ptr(), *page_table_BM.stride()),
        (kv_lens_B.data_ptr(), *kv_lens_B.stride()),
        num_pages,
        page_size,
    )


def fits_slots(slots_BT: torch.Tensor, num_slots: int) -> bool:
    """Whether every slot is -1 or in [0, num_slots); int64, on the CPU, any strides."""
    return KERNELS.fits_slots(slots_BT.shape, (slots_BT.data_ptr(), *slots_BT.stride()), num_slots)


def raise_bad_row(op: str, image: int, token: int) -> None:
    """Raise ValueError for a row of logits from which no token can be sampled."""
    raise ValueError(
        f"{op}: logits_2BTV of image {image}, token {token} must be free of NaN and +inf and hold "
        "a finite value after guidance; got a row that does not. Check the model's weights and "
        "dtype"
    )
