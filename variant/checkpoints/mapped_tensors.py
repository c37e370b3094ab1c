"""Tensors that are mapped from a file: put where they are wanted without holding both copies.

A mapped tensor costs nothing until it is read; then its pages stay in memory, beside any converted
copy. Here each is converted on its own and its pages are handed back at once, so that loading
never needs more than the result and one tensor.
"""

from __future__ import annotations

import ctypes
import mmap
import sys

import torch
from torch import Tensor


def place(
    tensor: Tensor, dtype: torch.dtype | None, device: torch.device | str | None, *, mapped: bool
) -> Tensor:
    """``tensor`` in that dtype on that device; the same object where it already is.

    Args:
        dtype: of floating-point tensors; None keeps it, and integers always keep theirs.
        device: None keeps it.
        mapped: the tensor lies in a private mapping of a file, unchanged since it was mapped; where
            a copy is made, the memory behind the original is then handed back.
    """
    wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    placed = tensor.to(device=device or tensor.device, dtype=wanted)
    if mapped and placed is not tensor:
        _release_pages(tensor)
    return placed


def _release_pages(tensor: Tensor) -> None:
    """Let the system take back the whole pages of a mapped tensor; if read again, they reload."""
    if not sys.platform.startswith("linux") or not tensor.is_contiguous():
        return
    first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first:
        # A hint: whether the system takes it changes how much memory is used and nothing else.
        advise = ctypes.CDLL(None).madvise
        advise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)
