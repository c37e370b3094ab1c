"""Checking arguments: who, what should hold, what came, what helps.

The checks take their time (14 us for five tensors): ops called once per layer and scale have a
``_fits`` beside them that accepts what is usual in one expression. It may refuse what the contract
allows, never the reverse; only what it refuses goes through the checks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch

from variant_kernels.dispatch.request import Request, dtype_name
from variant_kernels.winners import MOST_REQUESTS

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_tensor(op: str, name: str, value: object) -> None:
    """A tensor at all."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor; got {type(value).__name__}")


def check_float(
    op: str, name: str, tensor: torch.Tensor, dtypes: Sequence[torch.dtype] = FLOAT_DTYPES
) -> None:
    """One of the listed dtypes, last dimension contiguous."""
    check_tensor(op, name, tensor)
    if tensor.dtype not in dtypes:
        names = ", ".join(dtype_name(dtype) for dtype in dtypes)
        raise TypeError(f"{op}: {name} must be one of {names}; got {dtype_name(tensor.dtype)}")
    check_last_contiguous(op, name, tensor)


def check_last_contiguous(op: str, name: str, tensor: torch.Tensor) -> None:
    """Strides are free but for the last dimension."""
    if tensor.ndim and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(
            f"{op}: {name} must have a contiguous last dimension (stride 1); got stride "
            f"{tensor.stride(-1)}. Call .contiguous()"
        )


def check_ndim(op: str, name: str, tensor: torch.Tensor, axes: str) -> None:
    """As many dimensions as ``axes`` has words, e.g. ``"(B, T, C)"``."""
    expected = axes.count(",") + 1
    if tensor.ndim != expected:
        raise ValueError(
            f"{op}: {name} must have {expected} dimensions {axes}; got shape {tuple(tensor.shape)}"
        )


def check_shape(
    op: str, name: str, tensor: torch.Tensor, shape: tuple[int, ...], reason: str
) -> None:
    """Exactly this shape; ``reason`` says what it must match."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{op}: {name} must be {shape} {reason}; got {tuple(tensor.shape)}")


def check_same(op: str, name: str, tensor: torch.Tensor, other: str, like: torch.Tensor) -> None:
    """Same dtype and device as another argument."""
    if tensor.dtype != like.dtype:
        raise TypeError(
            f"{op}: {name} must have the dtype of {other} ({dtype_name(like.dtype)}); "
            f"got {dtype_name(tensor.dtype)}"
        )
    check_device(op, name, tensor, other, like)


def check_device(op: str, name: str, tensor: torch.Tensor, other: str, like: torch.Tensor) -> None:
    """Same device as another argument."""
    if tensor.device != like.device:
        raise ValueError(
            f"{op}: {name} must be on the device of {other} ({like.device}); got {tensor.device}"
        )


def softmax_scale(op: str, given: float | None, head_dim: int) -> float:
    """The factor on the scores: 1/sqrt(D) where none is given; finite."""
    scale = 1 / math.sqrt(head_dim) if given is None else float(given)
    if not math.isfinite(scale):
        raise ValueError(f"{op}: softmax_scale must be finite; got {given}")
    return scale


def check_head_dim(op: str, name: str, head_dim: int) -> None:
    """A multiple of 8 from 16 to 256."""
    if head_dim % 8 or not 16 <= head_dim <= 256:
        raise ValueError(
            f"{op}: the last dimension of {name} (head_dim) must be a multiple of 8 from 16 to "
            f"256; got {head_dim}"
        )


@lru_cache(maxsize=MOST_REQUESTS)
def request(
    device: str,
    dtypes: tuple[torch.dtype, ...],
    head_dim: int | None = None,
    row: int | None = None,
    page_size: int | None = None,
    kv_dtype: torch.dtype | None = None,
    rows: int | None = None,
    queries: int | None = None,
    keys: int | None = None,
) -> Request:
    """A :class:`Request`, built once: building one takes a microsecond, finding it 0.2.

    For implementations of ops: where sizes may be symbols (``setup_context``), nothing is hashed.
    """
    return Request(device, dtypes, head_dim, row, page_size, kv_dtype, rows, queries, keys)


def all_tensors(*values: object) -> bool:
    """Whether every argument is a tensor."""
    return all(isinstance(value, torch.Tensor) for value in values)
