"""Tensors in the form that kernels take: addresses, strides, a contiguous last dimension."""

from __future__ import annotations

import torch


def address_and_strides(x: torch.Tensor) -> tuple[int, ...]:
    """(address, strides in elements) without the stride of the last dimension, which is 1."""
    return (x.data_ptr(), *x.stride()[:-1])


def last_contiguous(x: torch.Tensor) -> torch.Tensor:
    """x, copied only if its last dimension is not contiguous (a gradient may be expanded)."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def empty_as(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A new contiguous tensor of x's shape: 1.1 us where torch.empty(x.shape, ...) takes 2.3."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
