"""Which implementation of an op runs, and why.

Each op file holds a literal ``IMPLS`` table from backend name to :class:`Impl`. ``backend="auto"``
takes the fastest that supports the arguments: in the measured order where ``winners.json`` has one
for this kind of device, op, dtype and size, else in that of ``PREFERENCE``. A backend asked for by
name (argument, :func:`use_backend` or the environment variable ``VARIANT_BACKEND``) runs or raises.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

from variant_kernels import winners
from variant_kernels.cuda_ops import library as cuda_library
from variant_kernels.dispatch.request import Request
from variant_kernels.dispatch.support import available_backends, triton_interprets
from variant_kernels.winners import ON_CPU, PREFERENCE

_override: ContextVar[str | None] = ContextVar("variant_backend", default=None)


def _no_backward(**kwargs: Any) -> Any:
    raise RuntimeError("this op is inference-only: it has no backward pass")


@dataclass(frozen=True)
class Impl:
    """One backend of one op.

    forward, backward: launchers; keyword arguments only, arguments already checked.
    unsupported: the reason why a request cannot be served, naming the argument, or None.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any] = _no_backward
    unsupported: Callable[[Request], str | None] = lambda request: None


@cache
def _load(module: str, name: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(module), name)


@dataclass(frozen=True)
class Lazy:
    """A launcher whose module is imported at its first call, so that tables stay literal."""

    module: str
    name: str

    def __call__(self, **kwargs: Any) -> Any:
        return _load(self.module, self.name)(**kwargs)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op inside on one backend, unless a call names another.

    Raises:
        ValueError: no backend of that name.
    """
    _check_name("use_backend", name)
    token = _override.set(None if name == "auto" else name)
    try:
        yield
    finally:
        _override.reset(token)


def _check_name(op: str, name: str) -> None:
    if name != "auto" and name not in PREFERENCE:
        raise ValueError(
            f'{op}: backend "{name}" is unknown; available: auto, {", ".join(available_backends())}'
        )


def _asked_for(op: str, backend: str) -> str:
    if backend != "auto":
        name = backend
    else:
        name = _override.get() or os.environ.get("VARIANT_BACKEND") or "auto"
    _check_name(op, name)
    return name


def choose(op: str, impls: Mapping[str, Impl], backend: str, request: Request) -> Impl:
    """The implementation that serves this request.

    Raises:
        ValueError: a backend asked for by name is unknown or cannot serve the arguments; the
            message says which argument is the reason.
    """
    return impls[choose_name(op, impls, backend, request)]


def choose_name(
    op: str,
    impls: Mapping[str, Impl],
    backend: str,
    request: Request,
    avoid: tuple[str, ...] = (),
) -> str:
    """Name of the backend that :func:`choose` takes; "auto" takes none of ``avoid``."""
    asked = _asked_for(op, backend)
    if asked != "auto":
        reason = _reason(impls, asked, request)
        if reason is not None:
            raise ValueError(
                f'{op}: backend "{asked}" cannot run this call: {reason}. Use backend="auto"'
            )
        return asked
    # In one place, and without calls: half a microsecond is a fortieth of a short op.
    device = request.device
    if op in winners.deciding(device):
        order = winners.order(op, request)
    else:
        order = ON_CPU if device == "cpu" else PREFERENCE
    for name in order:
        if _reason(impls, name, request) is None and not _interpreted(name) and name not in avoid:
            return name
    raise AssertionError(f"{op}: the reference backend refused {request}")


def choose_backward(
    op: str,
    impls: Mapping[str, Impl],
    backend: str,
    request: Request,
    avoid: tuple[str, ...] = (),
) -> str:
    """What a backward pass is to be asked for, so that it runs where the forward ran.

    A name; or "auto" in a graph traced for many sizes, if the size decides: forward and backward
    then both choose when they run, by the same sizes.
    """
    decided = op in winners.deciding(request.device)
    if decided and request.symbolic and _asked_for(op, backend) == "auto":
        return "auto"
    return choose_name(op, impls, backend, request, avoid)


def _interpreted(name: str) -> bool:
    """An interpreter proves kernels; nobody wants it chosen."""
    return (name == "triton" and triton_interprets()) or (
        name == "cuda" and cuda_library.is_emulated()
    )


def _reason(impls: Mapping[str, Impl], name: str, request: Request) -> str | None:
    if name not in impls:
        return "it does not implement this op"
    return impls[name].unsupported(request)
