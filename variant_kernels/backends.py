"""The public functions on backends."""

from __future__ import annotations

import torch

from variant_kernels.arguments import choice, instance, integer, typed
from variant_kernels.dispatch.explain import Choice, resolve
from variant_kernels.dispatch.request import Request
from variant_kernels.dispatch.select import check_name, use_backend
from variant_kernels.dispatch.support import available_backends
from variant_kernels.ops import tables

__all__ = ["available_backends", "explain", "resolve_backend", "use_backend"]


def explain(
    op: str,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    head_dim: int | None = 64,
    row_width: int | None = None,
    page_size: int | None = None,
    backend: str = "auto",
) -> str:
    """Which backend ``op`` uses for such tensors, by which rule, and why not an earlier one.

    ``explain("paged_attention", dtype=torch.bfloat16)``. ``row_width`` and ``page_size`` are those
    of :class:`~variant_kernels.dispatch.request.Request`.

    Args:
        device: its type, or one device: "cuda" and "cuda:0" are the same here.
    Raises:
        ValueError: no such op, or a backend asked for by name cannot serve it.
        TypeError: an argument of another type; float64 without backend="reference".
    """
    if not isinstance(device, str | torch.device):
        raise TypeError(f"explain: device must be text or a torch.device; got {typed(device)}")
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise ValueError(f"explain: device must be one of torch's; got {typed(device)}") from None
    instance("explain", "dtype", dtype, torch.dtype, "Pass torch.float32, for example")
    sizes = {"head_dim": head_dim, "row_width": row_width, "page_size": page_size}
    head_dim, row_width, page_size = (
        None if n is None else integer("explain", name, n, 1) for name, n in sizes.items()
    )
    # Where two dtypes count, as those of stream and rows in adaln_modulate, both are this one.
    request = Request(kind, (dtype, dtype), head_dim, row_width, page_size)
    return str(resolve_backend(op, request, backend))


def resolve_backend(op: str, request: Request, backend: str = "auto") -> Choice:
    """What :func:`explain` prints, as data."""
    choice("explain", "op", op, tuple(tables()))
    check_name(op, backend)
    return resolve(op, tables()[op], request, backend)
