"""Memory-mapped tensors: converting them without holding the file and the result in memory.

The pages of a mapped tensor are loaded when they are first read, and then stay in memory beside any
converted copy. Here each tensor is converted on its own, and its pages are released right after, so
that loading a model needs at most the memory of the result and of one tensor.
"""

from __future__ import annotations

import ctypes
import mmap
import sys

import torch
from torch import Tensor


def to_device(
    tensor: Tensor, dtype: torch.dtype | None, device: torch.device | str | None, *, mmapped: bool
) -> Tensor:
    """``tensor.to(device, dtype)`` that releases the pages of a memory-mapped tensor.

    Args:
        dtype: of floating-point tensors; None keeps it. Integer tensors always keep theirs.
        device: None keeps it.
        mmapped: whether the tensor is a view of a privately mapped file that has not been written
            to since it was mapped. If a copy is made, the pages of such a tensor are released.
    Returns:
        the tensor itself where dtype and device are right already, else a copy.
    """
    new_dtype = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    converted = tensor.to(device=device or tensor.device, dtype=new_dtype)
    if mmapped and converted is not tensor:
        _release_pages(tensor)
    return converted


def _release_pages(tensor: Tensor) -> None:
    """Release the whole pages of a mapped tensor; reading it again loads them from the file."""
    if not sys.platform.startswith("linux") or not tensor.is_contiguous():
        return
    first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first:
        # A hint: if the system ignores it, more memory is used and nothing else changes.
        advise = ctypes.CDLL(None).madvise
        advise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)
