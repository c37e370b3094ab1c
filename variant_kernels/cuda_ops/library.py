"""The library of CUDA kernels, ``variant_kernels/_cuda.so``: the first call that needs it loads it.

It is a plain shared library of C functions (csrc/cuda), compiled where a GPU was visible and
nvcc works, or on request. Importing this module loads nothing, so that a machine without a GPU pays
nothing and cannot fail here.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

PATH = Path(__file__).resolve().parent.parent / "_cuda.so"
# Names a library of the same kernels compiled for the CPU (csrc/cuda/EMULATION.md): launchers then
# take CPU tensors. It tests kernels and launchers where there is no GPU; "auto" never
# selects it.
EMULATION = "VARIANT_CUDA_EMULATION"


def is_emulated() -> bool:
    """Whether the kernels run on the CPU, in the emulation."""
    return EMULATION in os.environ


def is_built() -> bool:
    """Whether this installation has the CUDA kernels; says nothing about a GPU."""
    return PATH.exists()


@cache
def load() -> ctypes.CDLL:
    """The library.

    Raises:
        RuntimeError: it was not built, or the system's loader refuses it.
    """
    if is_emulated():
        return ctypes.CDLL(os.environ[EMULATION])
    if not is_built():
        raise RuntimeError(
            "the CUDA kernels are not built: install nvcc (CUDA 12 or newer) and build again with "
            "VARIANT_CUDA=1, which says what is missing"
        )
    try:
        cuda = ctypes.CDLL(str(PATH))
    except OSError as error:
        raise RuntimeError(f"the CUDA kernels cannot be loaded: {error}") from error
    cuda.variant_cuda_architectures.restype = ctypes.c_char_p
    cuda.variant_cuda_error_text.restype = ctypes.c_char_p
    cuda.variant_cuda_error_text.argtypes = [ctypes.c_int]
    return cuda


def architectures() -> tuple[str, ...]:
    """What the kernels were compiled for, such as ``("80", "90a")``.

    Raises:
        RuntimeError: see :func:`load`.
    """
    return tuple(load().variant_cuda_architectures().decode().split(","))


def check(op: str, status: int) -> None:
    """Do nothing for the status 0 of a launcher.

    Raises:
        RuntimeError: the launch failed; the message is the CUDA runtime's.
    """
    if status and is_emulated():
        raise RuntimeError(f"{op}: the emulated CUDA kernel refused its arguments ({status})")
    if status:
        reason = load().variant_cuda_error_text(status).decode()
        raise RuntimeError(f"{op}: the CUDA kernel could not be launched: {reason} ({status})")


def describe() -> str:
    """One line: whether the library is built, for which architectures and with which toolkit."""
    if not is_built():
        return "not built (no GPU was visible, nvcc did not work, or VARIANT_CUDA=0)"
    try:
        cuda = load()
    except RuntimeError as error:
        return f"built, but {error}"
    version = cuda.variant_cuda_runtime_version()
    archs = ", ".join(f"sm_{arch}" for arch in architectures())
    return f"built for {archs} with CUDA {version // 1000}.{version % 1000 // 10}"
