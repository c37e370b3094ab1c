"""Checks of arguments; the messages name the op, the argument, the rule and the value.

They take 14 us for five tensors, so :class:`~variant_kernels.ops.registry.Op` runs an op's checks
once for each signature of shapes, strides, dtypes and devices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from variant_kernels.dispatch.request import dtype_name
from variant_kernels.kv_quantization import KV8_DTYPE

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_tensor(op: str, name: str, value: object) -> None:
    """A tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor; got {type(value).__name__}")


def check_float(
    op: str, name: str, tensor: Tensor, dtypes: Sequence[torch.dtype] = FLOAT_DTYPES
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


def check_softmax_scale(op: str, softmax_scale: float | None) -> None:
    """A finite number, or None."""
    if softmax_scale is not None and not math.isfinite(softmax_scale):
        raise ValueError(f"{op}: softmax_scale must be finite; got {softmax_scale}")


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


def check_pages(
    op: str,
    k_pages_PNHD: Tensor,
    v_pages_PNHD: Tensor,
    name: str,
    like_BTHD: Tensor,
    k_scales_PNH: Tensor | None,
    v_scales_PNH: Tensor | None,
) -> None:
    """Pages are two tensors (P, page_size, H, D) of the heads, dtype and device of ``name``.

    With scales, (P, page_size, H) uint8, they are float8_e4m3fn.
    """
    if (k_scales_PNH is None) != (v_scales_PNH is None):
        missing = "k_scales_PNH" if k_scales_PNH is None else "v_scales_PNH"
        raise ValueError(f"{op}: {missing} must be given where the other scales are; got None")
    eight_bits = k_scales_PNH is not None
    for pages_name, pages in (("k_pages_PNHD", k_pages_PNHD), ("v_pages_PNHD", v_pages_PNHD)):
        check_float(op, pages_name, pages, (*FLOAT_DTYPES, KV8_DTYPE))
        check_ndim(op, pages_name, pages, "(P, page_size, H, D)")
        if eight_bits != (pages.dtype == KV8_DTYPE):
            raise TypeError(
                f"{op}: {pages_name} must be float8_e4m3fn where k_scales_PNH and v_scales_PNH "
                f"are given, and only there; got {dtype_name(pages.dtype)} "
                f"{'with' if eight_bits else 'without'} scales"
            )
        if eight_bits:
            check_device(op, pages_name, pages, name, like_BTHD)
        else:
            check_same(op, pages_name, pages, name, like_BTHD)
        if pages.shape[2:] != like_BTHD.shape[2:]:
            raise ValueError(
                f"{op}: {pages_name} must end in (H, D) = {tuple(like_BTHD.shape[2:])} to match "
                f"{name}; got {tuple(pages.shape)}"
            )
        if pages.shape[1] < 1:
            raise ValueError(
                f"{op}: {pages_name} must have page_size >= 1; got {tuple(pages.shape)}"
            )
        _check_not_expanded(op, pages_name, pages)
    check_shape(
        op, "v_pages_PNHD", v_pages_PNHD, tuple(k_pages_PNHD.shape), "to match k_pages_PNHD"
    )
    for scales_name, scales in (("k_scales_PNH", k_scales_PNH), ("v_scales_PNH", v_scales_PNH)):
        if scales is None:
            continue
        check_tensor(op, scales_name, scales)
        shape = tuple(k_pages_PNHD.shape[:3])
        check_shape(op, scales_name, scales, shape, "to match k_pages_PNHD")
        if scales.dtype != torch.uint8:
            raise TypeError(f"{op}: {scales_name} must be uint8; got {dtype_name(scales.dtype)}")
        check_device(op, scales_name, scales, name, like_BTHD)
        check_last_contiguous(op, scales_name, scales)
        _check_not_expanded(op, scales_name, scales)


def _check_not_expanded(op: str, name: str, pool: Tensor) -> None:
    if any(n > 1 and step == 0 for n, step in zip(pool.shape, pool.stride(), strict=True)):
        raise ValueError(
            f"{op}: {name} must not be expanded: several slots would share one address; "
            f"got strides {pool.stride()}"
        )
