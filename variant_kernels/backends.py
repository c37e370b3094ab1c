"""Which implementation of an op runs, and why.

Each op file holds a literal ``IMPLS`` table from backend name to :class:`Impl`. ``backend="auto"``
takes the first backend of ``PREFERENCE`` that supports the arguments; a backend asked for by name
(argument, :func:`use_backend` or the environment variable ``VARIANT_BACKEND``) runs or raises.
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

import torch

from variant_kernels.cuda_ops import library as cuda_library

# Fastest first. `reference` supports everything, so that a choice always exists.
PREFERENCE = ("triton", "cuda", "flash", "flashinfer", "flex", "cpu", "reference")
# All of them that "auto" can take for CPU tensors: to hear the others' reasons costs microseconds.
ON_CPU = ("cpu", "reference")

_override: ContextVar[str | None] = ContextVar("variant_backend", default=None)


@dataclass(frozen=True)
class Request:
    """What a backend must know of the arguments to say whether it can serve them.

    row: entries of a row that is normalised or sampled from, where the op works on such rows.
    page_size: tokens of a page, where the op reads pages.
    kv_dtype: of pages that hold another dtype than the tokens': 8 bits with scales.
    """

    device: str
    dtypes: tuple[torch.dtype, ...]
    head_dim: int | None = None
    row: int | None = None
    page_size: int | None = None
    kv_dtype: torch.dtype | None = None


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


def _kv_dtype_reason(kv_dtype: torch.dtype) -> str:
    return f"pages of {dtype_name(kv_dtype)} with scales are not among those that it reads"


CPU_DTYPES = (torch.float32, torch.bfloat16)
# Devices that Triton compiles for; AMD GPUs are "cuda" to torch.
TRITON_DEVICES = ("cuda", "xpu")
# Entries of a row that one program can hold.
TRITON_ROW = 65536
CUDA_ROW = 65536


def cpu_unsupported(request: Request) -> str | None:
    """Why the C++ kernels cannot serve a request."""
    if request.device != "cpu":
        return f"the tensors are on {request.device}, not on the CPU"
    if request.kv_dtype is not None:
        return _kv_dtype_reason(request.kv_dtype)
    for dtype in request.dtypes:
        if dtype not in CPU_DTYPES:
            return f"dtype {dtype_name(dtype)} is not among its dtypes (float32, bfloat16)"
    return None


def triton_interprets() -> bool:
    """Whether Triton runs kernels on the CPU, in its interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def triton_unsupported(request: Request) -> str | None:
    """Why the Triton kernels cannot serve a request."""
    if not _has_triton():
        return "Triton is not installed (pip install triton)"
    if triton_interprets():
        if request.device != "cpu":
            return f"TRITON_INTERPRET=1 takes CPU tensors; these are on {request.device}"
        if torch.bfloat16 in request.dtypes:
            # Its products are wrong: operands are not rounded as the hardware rounds them.
            return "Triton's interpreter computes bfloat16 wrongly"
    elif request.device not in TRITON_DEVICES:
        return f"the tensors are on {request.device}, not on a GPU"
    for dtype in request.dtypes:
        if dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"dtype {dtype_name(dtype)} is not among its dtypes (float32, bfloat16, float16)"
    if request.row is not None and request.row > TRITON_ROW:
        return f"rows of {request.row} entries are longer than the {TRITON_ROW} that it can hold"
    return None


@cache
def _least_capability() -> tuple[int, int]:
    """Of the GPUs at hand: a request does not say which of them it is for."""
    count = torch.cuda.device_count()
    return min(torch.cuda.get_device_capability(index) for index in range(count))


def cuda_unsupported(request: Request) -> str | None:
    """Why the CUDA C++ kernels cannot serve a request."""
    if request.kv_dtype is not None:
        return _kv_dtype_reason(request.kv_dtype)
    if cuda_library.is_emulated():
        if request.device != "cpu":
            return f"{cuda_library.EMULATION} takes CPU tensors; these are on {request.device}"
    elif not cuda_library.is_built():
        return "it is not built; build with VARIANT_CUDA=1"
    elif request.device != "cuda" or torch.version.hip is not None:
        return f"the tensors are on {request.device}, not on an NVIDIA GPU"
    elif _least_capability() < (8, 0):
        major, minor = _least_capability()
        return f"the GPU has compute capability {major}.{minor}; it needs 8.0"
    for dtype in request.dtypes:
        if dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"dtype {dtype_name(dtype)} is not among its dtypes (float32, bfloat16, float16)"
    if request.row is not None and request.row > CUDA_ROW:
        return f"rows of {request.row} entries are longer than the {CUDA_ROW} that it takes"
    return None


@dataclass(frozen=True)
class FlashAttention:
    """An installed flash-attn: where it is, and what it calls a page table."""

    version: int
    module: str
    table_argument: str
    page_multiple: int


# Version 2 reads pages of any multiple of 256 tokens, version 3 (sm_90 only) of any number.
FLASH_VERSIONS = (
    FlashAttention(3, "flash_attn_interface", "page_table", 1),
    FlashAttention(2, "flash_attn", "block_table", 256),
)


@cache
def find_flash(device: torch.device | str) -> FlashAttention | None:
    """The newest installed flash-attn that runs on a device, or None."""
    for found in FLASH_VERSIONS:
        newest = found.version == 3
        if newest and torch.cuda.get_device_capability(device)[0] != 9:
            continue
        if importlib.util.find_spec(found.module) is not None:
            return found
    return None


def _16_bits_on_nvidia(request: Request) -> str | None:
    if request.kv_dtype is not None:
        return _kv_dtype_reason(request.kv_dtype)
    if request.device != "cuda" or torch.version.hip is not None:
        return "it needs an NVIDIA GPU"
    for dtype in request.dtypes:
        if dtype not in (torch.float16, torch.bfloat16):
            return f"dtype {dtype_name(dtype)} is not among its dtypes (float16, bfloat16)"
    return None


def flash_unsupported(request: Request) -> str | None:
    """Why flash-attn cannot serve a request."""
    reason = _16_bits_on_nvidia(request)
    if reason is not None:
        return reason
    found = find_flash(request.device)
    if found is None:
        return "flash-attn is not installed"
    if request.page_size is not None and request.page_size % found.page_multiple:
        return (
            f"page_size {request.page_size} is not a multiple of the {found.page_multiple} that "
            f"flash-attn {found.version} reads"
        )
    return None


FLASHINFER_HEAD_DIMS = (64, 128, 256)


def flashinfer_unsupported(request: Request) -> str | None:
    """Why FlashInfer cannot serve a request."""
    reason = _16_bits_on_nvidia(request)
    if reason is not None:
        return reason
    if importlib.util.find_spec("flashinfer") is None:
        return "FlashInfer is not installed"
    if request.head_dim not in FLASHINFER_HEAD_DIMS:
        return f"head_dim {request.head_dim} is not among its head_dims (64, 128, 256)"
    return None


def flex_unsupported(request: Request) -> str | None:
    """Why FlexAttention cannot serve a request."""
    if request.device not in TRITON_DEVICES:
        return f"FlexAttention has no backward pass on {request.device}"
    if not _has_triton():
        return "Triton is not installed (pip install triton)"
    return None


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def available_backends() -> tuple[str, ...]:
    """Names of the backends that this installation can run on this machine."""
    gpu = torch.cuda.is_available()
    nvidia = gpu and torch.version.hip is None
    runs = {
        "reference": True,
        "cpu": True,
        "cuda": cuda_library.is_emulated() or (cuda_library.is_built() and nvidia),
        "triton": _has_triton() and (triton_interprets() or gpu),
        "flex": _has_triton() and gpu,
        "flash": nvidia and find_flash("cuda") is not None,
        "flashinfer": nvidia and importlib.util.find_spec("flashinfer") is not None,
    }
    return tuple(name for name in reversed(PREFERENCE) if runs[name])


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


def choose_name(op: str, impls: Mapping[str, Impl], backend: str, request: Request) -> str:
    """Name of the backend that :func:`choose` takes."""
    asked = _asked_for(op, backend)
    if asked != "auto":
        reason = _reason(impls, asked, request)
        if reason is not None:
            raise ValueError(
                f'{op}: backend "{asked}" cannot run this call: {reason}. Use backend="auto"'
            )
        return asked
    for name in ON_CPU if request.device == "cpu" else PREFERENCE:
        if _reason(impls, name, request) is None and not _interpreted(name):
            return name
    raise AssertionError(f"{op}: the reference backend refused {request}")


def _interpreted(name: str) -> bool:
    """An interpreter proves kernels; nobody wants it chosen."""
    return (name == "triton" and triton_interprets()) or (
        name == "cuda" and cuda_library.is_emulated()
    )


def _reason(impls: Mapping[str, Impl], name: str, request: Request) -> str | None:
    if name not in impls:
        return "it does not implement this op"
    return impls[name].unsupported(request)


def explain(
    op: str,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    head_dim: int | None = 64,
    backend: str = "auto",
) -> str:
    """Which backend ``op`` would use for such tensors, and why the faster ones would not do.

    ``explain("adaln_modulate", dtype=torch.float16)``
    """
    chosen, others = chosen_and_others(
        op, device=device, dtype=dtype, head_dim=head_dim, backend=backend
    )
    reasons = "; ".join(f"{name}: {reason}" for name, reason in others.items())
    return chosen + (f" ({reasons})" if reasons else "")


def chosen_and_others(
    op: str,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    head_dim: int | None = 64,
    backend: str = "auto",
) -> tuple[str, dict[str, str]]:
    """The backend that ``op`` would use for such tensors, and why each faster one would not do.

    Raises:
        ValueError: no such op, or a backend asked for by name cannot serve it.
    """
    from variant_kernels import ops

    tables = ops.tables()
    if op not in tables:
        raise ValueError(f"explain: op must be one of {', '.join(tables)}; got {op!r}")
    request = Request(device, (dtype,), head_dim)
    chosen = choose_name(op, tables[op], backend, request)
    others = {}
    for name in PREFERENCE:
        if name == chosen:
            break
        reason = _reason(tables[op], name, request)
        if reason is None:
            reason = "interpreted" if _interpreted(name) else "not asked for"
        others[name] = reason
    return chosen, others
