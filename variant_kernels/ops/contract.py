"""Checks of arguments; the messages name the op, the argument, the rule and the value.

They take 14 us for five tensors, so :class:`~variant_kernels.ops.registry.Op` runs an op's checks
once for each signature of shapes, strides, dtypes and devices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from variant_kernels.arguments import real
from variant_kernels.dispatch.request import dtype_name

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# float64 is for the reference alone: dispatch/select.py refuses it for every other backend.
REFERENCE_DTYPES = (*FLOAT_DTYPES, torch.float64)
# Beyond it the scores of ordinary queries leave the range in which float32 has digits for exp.
MAX_SOFTMAX_SCALE = float(2**20)


def check_tensor(op: str, name: str, value: object) -> None:
    """A tensor with strides and plain values: neither sparse nor nested nor quantized."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor; got {type(value).__name__}")
    if value.layout is not torch.strided or value.is_nested or value.is_quantized:
        kinds = ((value.is_nested, "a nested tensor"), (value.is_quantized, "a quantized tensor"))
        layout = next((kind for holds, kind in kinds if holds), value.layout)
        raise TypeError(f"{op}: {name} must be a dense tensor with strides; got {layout}")


def check_float(
    op: str, name: str, tensor: Tensor, dtypes: Sequence[torch.dtype] = REFERENCE_DTYPES
) -> None:
    """One of the listed dtypes, last dimension contiguous."""
    check_tensor(op, name, tensor)
    if tensor.dtype not in dtypes:
        names = ", ".join(dtype_name(dtype) for dtype in dtypes)
        raise TypeError(f"{op}: {name} must be one of {names}; got {dtype_name(tensor.dtype)}")
    check_last_contiguous(op, name, tensor)


def check_last_contiguous(op: str, name: str, tensor: Tensor) -> None:
    """The last dimension has stride 1; the other strides are free."""
    if tensor.ndim and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(
            f"{op}: {name} must have a contiguous last dimension (stride 1); got stride "
            f"{tensor.stride(-1)}. Call .contiguous()"
        )


def check_ndim(op: str, name: str, tensor: Tensor, axes: str) -> None:
    """As many dimensions as ``axes`` has words, e.g. ``"(B, T, C)"``."""
    expected = axes.count(",") + 1
    if tensor.ndim != expected:
        raise ValueError(
            f"{op}: {name} must have {expected} dimensions {axes}; got shape {tuple(tensor.shape)}"
        )


def check_shape(op: str, name: str, tensor: Tensor, shape: tuple[int, ...], reason: str) -> None:
    """Exactly this shape; ``reason`` says what it must match."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{op}: {name} must be {shape} {reason}; got {tuple(tensor.shape)}")


def check_same(op: str, name: str, tensor: Tensor, other: str, like: Tensor) -> None:
    """Same dtype and device as another argument."""
    if tensor.dtype != like.dtype:
        raise TypeError(
            f"{op}: {name} must have the dtype of {other} ({dtype_name(like.dtype)}); "
            f"got {dtype_name(tensor.dtype)}"
        )
    check_device(op, name, tensor, other, like)


def check_device(op: str, name: str, tensor: Tensor, other: str, like: Tensor) -> None:
    """Same device as another argument."""
    if tensor.device != like.device:
        raise ValueError(
            f"{op}: {name} must be on the device of {other} ({like.device}); got {tensor.device}"
        )


def softmax_scale(op: str, value: float | None) -> float | None:
    """A number in [-2^20, 2^20], as a float; or None."""
    if value is None:
        return None
    return real(op, "softmax_scale", value, -MAX_SOFTMAX_SCALE, MAX_SOFTMAX_SCALE)


def default_softmax_scale(q: Tensor) -> float:
    """1/sqrt(D)."""
    return 1 / math.sqrt(q.shape[-1])


def check_head_dim(op: str, name: str, head_dim: int) -> None:
    """A multiple of 8 from 16 to 256."""
    if head_dim % 8 or not 16 <= head_dim <= 256:
        raise ValueError(
            f"{op}: the last dimension of {name} (head_dim) must be a multiple of 8 from 16 to "
            f"256; got {head_dim}"
        )
