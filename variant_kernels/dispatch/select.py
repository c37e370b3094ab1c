"""Which backend of an op runs a call.

Each op file holds a literal table of :class:`Backend`, fastest first. ``backend="auto"`` takes the
first that can serve the call. A backend asked for by name (argument, :func:`use_backend` or the
environment variable ``VARIANT_BACKEND``) runs or raises.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property
from importlib import import_module
from typing import Any

import torch

from variant_kernels.arguments import instance, shown
from variant_kernels.cuda_ops import library as cuda_library
from variant_kernels.dispatch.request import Request
from variant_kernels.dispatch.support import BACKENDS, available_backends, triton_interprets

_override: ContextVar[str | None] = ContextVar("variant_backend", default=None)
Launcher = Callable[..., Any]


class Backend:
    """One backend of one op.

    Args:
        unsupported: the reason why it cannot serve a request, naming the argument; or None.
        forward, backward: launchers, called with keyword arguments that have been checked; or
            where they are: ``"triton_ops.adaln.launch_adaln_forward"`` is imported at first use.
    """

    def __init__(
        self,
        unsupported: Callable[[Request], str | None],
        forward: Launcher | str,
        backward: Launcher | str | None = None,
    ) -> None:
        self.unsupported = unsupported
        self._forward, self._backward = forward, backward

    @cached_property
    def forward(self) -> Launcher:
        return _imported(self._forward)

    @cached_property
    def backward(self) -> Launcher:
        if self._backward is None:
            raise RuntimeError("this op is inference-only: it has no backward pass")
        return _imported(self._backward)


def _imported(launcher: Launcher | str) -> Launcher:
    if not isinstance(launcher, str):
        return launcher
    module, _, name = launcher.rpartition(".")
    return getattr(import_module(f"variant_kernels.{module}"), name)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op inside on one backend, unless a call names another.

    Raises:
        ValueError: no backend of that name.
    """
    check_name("use_backend", name)
    token = _override.set(None if name == "auto" else name)
    try:
        yield
    finally:
        _override.reset(token)


def check_name(op: str, name: str) -> None:
    """Raise unless the name is "auto" or that of a backend."""
    instance(op, "backend", name, str, 'Use "auto"')
    if name != "auto" and name not in BACKENDS:
        known, text = ", ".join(available_backends()), shown(" ".join(name.split()))[1:-1]
        raise ValueError(f'{op}: backend "{text}" is unknown; available: auto, {known}')


def requested_name(backend: str) -> str:
    """The argument unless it is "auto"; then use_backend's, VARIANT_BACKEND's, or "auto".

    Raises:
        ValueError: VARIANT_BACKEND names no backend.
    """
    if not isinstance(backend, str) or backend != "auto":
        return backend  # check_name refuses what is no name
    if (name := _override.get()) is not None:
        return name
    name = os.environ.get("VARIANT_BACKEND") or "auto"
    check_name("the environment variable VARIANT_BACKEND", name)
    return name


def choose_name(
    op: str,
    backends: Mapping[str, Backend],
    backend: str,
    request: Request,
    exclude: Collection[str] = (),
) -> str:
    """Name of the backend that serves a request; "auto" takes none of ``exclude``.

    Raises:
        ValueError: a backend asked for by name is unknown or cannot serve the arguments; the
            message says which argument is the reason.
        TypeError: float64, which the reference alone takes, and only if asked for.
    """
    name = requested_name(backend)
    check_name(op, name)
    if torch.float64 in request.dtypes and name != "reference":
        raise TypeError(
            f'{op}: float64 runs with backend="reference" only; got backend="{name}". Convert the '
            'tensors to float32, or pass backend="reference"'
        )
    if name != "auto":
        if reason := reason_against(backends, name, request):
            raise ValueError(
                f'{op}: backend "{name}" cannot run this call: {reason}. Use backend="auto"'
            )
        return name
    for name, candidate in backends.items():
        if name not in exclude and candidate.unsupported(request) is None and not for_tests(name):
            return name
    raise AssertionError(f"{op}: the reference backend refused {request}")


def reason_against(backends: Mapping[str, Backend], name: str, request: Request) -> str | None:
    """Why a backend cannot serve a request, or None."""
    if name not in backends:
        return "it does not implement this op"
    return backends[name].unsupported(request)


def for_tests(name: str) -> bool:
    """Interpreted and emulated kernels are for tests: "auto" never selects them."""
    return (name == "triton" and triton_interprets()) or (
        name == "cuda" and cuda_library.is_emulated()
    )
