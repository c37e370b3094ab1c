"""Which requests each backend can serve on this machine, and the reason if it cannot."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Collection
from functools import cache

import torch

from variant_kernels.cuda_ops import library as cuda_library
from variant_kernels.dispatch.request import Request, dtype_name
from variant_kernels.library_ops.installed import find_flash
from variant_kernels.wording import counted

# All names, in the order of every op's table: fastest first.
BACKENDS = ("triton", "cuda", "flash", "flashinfer", "flex", "cpu", "reference")
# Devices that Triton compiles for; AMD GPUs are "cuda" to torch.
TRITON_DEVICES = ("cuda", "xpu")
# Entries of a row that one Triton program or one CUDA block takes.
MAX_ROW_WIDTH = 65536
FLASHINFER_HEAD_DIMS = (64, 128, 256)
_32_OR_16_BITS = (torch.float32, torch.bfloat16, torch.float16)


def _dtype_reason(request: Request, dtypes: Collection[torch.dtype]) -> str | None:
    for dtype in request.dtypes:
        if dtype not in dtypes:
            names = ", ".join(dtype_name(served) for served in dtypes)
            return f"dtype {dtype_name(dtype)} is not among its dtypes ({names})"
    return None


def _row_reason(request: Request) -> str | None:
    """Of the two GPU backends: rows that are too long, or another dtype."""
    if (width := request.row_width) is not None and width > MAX_ROW_WIDTH:
        return (
            f"rows of {counted(width, 'entry')} are longer than the {MAX_ROW_WIDTH:,} that it takes"
        )
    return _dtype_reason(request, _32_OR_16_BITS)


def always(request: Request) -> None:
    """No reason: plain torch serves every request."""


def cpu_unsupported(
    request: Request, dtypes: Collection[torch.dtype] = (torch.float32, torch.bfloat16)
) -> str | None:
    """Why the C++ kernels cannot serve a request."""
    if request.device != "cpu":
        return f"the tensors are on {request.device}, not on the CPU"
    return _dtype_reason(request, dtypes)


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
    return _row_reason(request)


@cache
def _least_capability() -> tuple[int, int]:
    """The least of all visible GPUs, because a request does not name one of them."""
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
    return _row_reason(request)


def _nvidia_16_bits_reason(request: Request) -> str | None:
    if request.kv_dtype is not None:
        name = dtype_name(request.kv_dtype)
        return f"pages of {name} with scales are not among those that it reads"
    if request.device != "cuda" or torch.version.hip is not None:
        return "it needs an NVIDIA GPU"
    return _dtype_reason(request, (torch.float16, torch.bfloat16))


def flash_unsupported(request: Request) -> str | None:
    """Why flash-attn cannot serve a request."""
    if reason := _nvidia_16_bits_reason(request):
        return reason
    flash = find_flash(request.device)
    if flash is None:
        return "flash-attn is not installed"
    if request.page_size is not None and request.page_size % flash.page_multiple:
        return (
            f"page_size {request.page_size} is not a multiple of the {flash.page_multiple} that "
            f"flash-attn {flash.version} reads"
        )
    return None


def flashinfer_unsupported(request: Request) -> str | None:
    """Why FlashInfer cannot serve a request."""
    if reason := _nvidia_16_bits_reason(request):
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
    return None if _has_triton() else "Triton is not installed (pip install triton)"


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
    return tuple(name for name in reversed(BACKENDS) if runs[name])
