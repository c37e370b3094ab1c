"""The properties of a call that decide which backends can serve it."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Request:
    """The properties of a call's arguments that decide which backends can serve it.

    row_width: entries of a row that is normalised or sampled from, where the op works on rows.
    page_size: tokens of a page, where the op reads pages.
    kv_dtype: dtype of pages that differs from the tokens': 8 bits with scales.
    None: unknown, or without meaning for the op.
    """

    device: str
    dtypes: tuple[torch.dtype, ...]
    head_dim: int | None = None
    row_width: int | None = None
    page_size: int | None = None
    kv_dtype: torch.dtype | None = None


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")
