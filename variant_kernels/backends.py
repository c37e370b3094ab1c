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

import torch

from variant_kernels import winners
from variant_kernels.cuda_ops import library as cuda_library
from variant_kernels.winners import ON_CPU, PREFERENCE

_override: ContextVar[str | None] = ContextVar("variant_backend", default=None)


@dataclass(frozen=True)
class Request:
    """What a backend must know of the arguments to say whether it can serve them.

    row: entries of a row that is normalised or sampled from, where the op works on such rows.
    page_size: tokens of a page, where the op reads pages.
    kv_dtype: of pages that hold another dtype than the tokens': 8 bits with scales.
    rows: how many such rows, vectors or, in attention, heads of all sequences there are.
    queries, keys: tokens of a sequence that attend, and that they may see.
    gradient: whether a backward pass is to follow, where the op was measured with one.
    None: not known, or of no meaning to the op.
    """

    device: str
    dtypes: tuple[torch.dtype, ...]
    head_dim: int | None = None
    row: int | None = None
    page_size: int | None = None
    kv_dtype: torch.dtype | None = None
    rows: int | None = None
    queries: int | None = None
    keys: int | None = None
    gradient: bool = False

    @property
    def symbolic(self) -> bool:
        """Whether a size is a symbol of a graph that is traced for many sizes."""
        return not all(isinstance(getattr(self, name), int | None) for name in winners.SIZES)


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


def explain(
    op: str,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    head_dim: int | None = 64,
    backend: str = "auto",
    **sizes: int,
) -> str:
    """Which backend ``op`` would use for such tensors, from where, and why not a faster one.

    ``explain("paged_attention", dtype=torch.bfloat16, rows=32, queries=256, keys=680)``; sizes are
    those of :class:`Request`. Without any, what most of the measured cases say.
    """
    choice = explained(op, device=device, dtype=dtype, head_dim=head_dim, backend=backend, **sizes)
    reasons = (f"{name}: {reason}" for name, reason in choice.others.items())
    return f"{choice.name} ({'; '.join((choice.source, *reasons))})"


MEASURED, PREFERRED, NAMED = "measured: ", "preference order", "asked for by name"


@dataclass(frozen=True)
class Choice:
    """A backend, what says so, and why each that would have come before it is not taken."""

    name: str
    source: str
    others: dict[str, str]


def explained(
    op: str,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    head_dim: int | None = 64,
    backend: str = "auto",
    **sizes: int,
) -> Choice:
    """What ``op`` would use for such tensors; arguments as for :func:`explain`.

    source: ``"measured: FILE.json"``, "preference order" or "asked for by name".
    Raises:
        ValueError: no such op or size, or a backend asked for by name cannot serve it.
    """
    from variant_kernels import ops

    tables = ops.tables()
    if op not in tables:
        raise ValueError(f"explain: op must be one of {', '.join(tables)}; got {op!r}")
    unknown = sorted(set(sizes) - set(winners.SIZES))
    if unknown:
        raise ValueError(
            f"explain: sizes must be among {', '.join(winners.SIZES)}; got {unknown[0]!r}"
        )
    # Where two dtypes count, as those of stream and rows in adaln_modulate, both are this one.
    request = Request(
        device,
        (dtype, dtype),
        head_dim,
        row=sizes.get("row"),
        page_size=sizes.get("page_size"),
        rows=sizes.get("rows"),
        queries=sizes.get("queries"),
        keys=sizes.get("keys"),
    )
    impls = tables[op]
    name = choose_name(op, impls, backend, request)
    case = winners.find(op, request)
    measured = case is not None and name in case.ranking
    if _asked_for(op, backend) != "auto":
        source, order = NAMED, ()
    elif case is not None and measured:
        source, order = MEASURED + ", ".join(case.sources), winners.order(op, request)
    else:
        source, order = PREFERRED, winners.preference(device)
    # Those of PREFERENCE too, some of which are not even asked on a CPU.
    others = {}
    for other in dict.fromkeys((*_before(order, name), *_before(PREFERENCE, name))):
        reason = _reason(impls, other, request)
        if reason is None:
            slower = case is not None and measured and other in case.ranking
            reason = "measured slower" if slower else "not asked for"
        others[other] = "interpreted" if _interpreted(other) else reason
    return Choice(name, source, others)


def _before(order: tuple[str, ...], name: str) -> tuple[str, ...]:
    return order[: order.index(name)] if name in order else ()
