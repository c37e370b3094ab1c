"""The public functions on backends."""

from __future__ import annotations

import torch

from variant_kernels.dispatch.explain import Choice, resolve
from variant_kernels.dispatch.request import Request
from variant_kernels.dispatch.select import use_backend
from variant_kernels.dispatch.support import available_backends
from variant_kernels.ops import tables

__all__ = ["available_backends", "explain", "resolve_backend", "use_backend"]


def explain(
    op: str,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    head_dim: int | None = 64,
    row_width: int | None = None,
    page_size: int | None = None,
    backend: str = "auto",
) -> str:
    """Which backend ``op`` uses for such tensors, by which rule, and why not an earlier one.

    ``explain("paged_attention", dtype=torch.bfloat16)``. ``row_width`` and ``page_size`` are those
    of :class:`~variant_kernels.dispatch.request.Request`.

    Raises:
        ValueError: no such op, or a backend asked for by name cannot serve it.
    """
    # Where two dtypes count, as those of stream and rows in adaln_modulate, both are this one.
    request = Request(device, (dtype, dtype), head_dim, row_width, page_size)
    return str(resolve_backend(op, request, backend))


def resolve_backend(op: str, request: Request, backend: str = "auto") -> Choice:
    """What :func:`explain` prints, as data."""
    if op not in tables():
        raise ValueError(f"explain: op must be one of {', '.join(tables())}; got {op!r}")
    return resolve(op, tables()[op], request, backend)
