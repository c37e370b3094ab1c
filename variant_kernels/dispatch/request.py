"""What a backend must know of a call to say whether it can serve it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from variant_kernels import winners


@dataclass(frozen=True)
class Request:
    """What a backend must know of the arguments to say whether it can serve them.

    row: entries of a row that is normalised or sampled from, where the op works on such rows.
    page_size: tokens of a page, where the op reads pages.
    kv_dtype: of pages that hold another dtype than the tokens': 8 bits with scales.
    rows: how many such rows, vectors or, in attention, heads of all sequences there are.
    queries, keys: tokens of a sequence that attend, and that they may see.
    gradient: whether a backward pass is to follow, where the op was measured with one.
    None: not known, or of no meaning to the op.
    """

    device: str
    dtypes: tuple[torch.dtype, ...]
    head_dim: int | None = None
    row: int | None = None
    page_size: int | None = None
    kv_dtype: torch.dtype | None = None
    rows: int | None = None
    queries: int | None = None
    keys: int | None = None
    gradient: bool = False

    @property
    def symbolic(self) -> bool:
        """Whether a size is a symbol of a graph that is traced for many sizes."""
        return not all(isinstance(getattr(self, name), int | None) for name in winners.SIZES)


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")
