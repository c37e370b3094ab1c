"""Shared by the CPU launchers: the compiled extension and its dtype codes."""

from __future__ import annotations

from typing import Any

import torch  # before the extension: both use the OpenMP runtime that torch brings

from variant_kernels import _C

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}
KERNELS = _C


def dtype_code(op: str, name: str, x: torch.Tensor) -> int:
    """The extension's code of x's dtype.

    Raises:
        TypeError: the CPU kernels have no version for this dtype.
    """
    try:
        return DTYPE_CODES[x.dtype]
    except KeyError:
        raise TypeError(
            f"{op}: {name} must be float32 or bfloat16 for the cpu backend; got {x.dtype}"
        ) from None


def build_info() -> dict[str, Any]:
    """What was compiled, what this machine supports and which instruction set is in use.

    Raises:
        ValueError: VARIANT_CPU_ISA names an instruction set that is unknown or missing here.
    """
    return KERNELS.build_info()
