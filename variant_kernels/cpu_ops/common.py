"""Shared by the CPU launchers: the compiled extension and its dtype codes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch  # before the extension: both use the OpenMP runtime that torch brings

from variant_kernels import _C

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}
# Of the ops that write and read pages of the tokens' dtype.
PAGE_DTYPE_CODES = {**DTYPE_CODES, torch.float16: 2}
KERNELS = _C


def dtype_code(
    op: str, name: str, x: torch.Tensor, codes: Mapping[torch.dtype, int] = DTYPE_CODES
) -> int:
    """The extension's code of x's dtype, among those that a kernel takes.

    Raises:
        TypeError: the CPU kernels have no version for this dtype.
    """
    try:
        return codes[x.dtype]
    except KeyError:
        *others, last = (str(dtype).removeprefix("torch.") for dtype in codes)
        names = f"{', '.join(others)} or {last}"
        raise TypeError(
            f"{op}: {name} must be {names} for the cpu backend; got {x.dtype}"
        ) from None


def build_info() -> dict[str, Any]:
    """What was compiled, what this machine supports and which instruction set is in use.

    Raises:
        ValueError: VARIANT_CPU_ISA names an instruction set that is unknown or missing here.
    """
    return KERNELS.build_info()
