"""Shared by the CUDA launchers: packed arguments, the device and its stream.

A launcher of the library takes one structure (csrc/cuda/<stem>.h), its size, a device and a stream.
Formats are those of :mod:`struct`, with the compiler's own alignment; the library refuses a
structure of another size. Pointers are packed as integers; strides count elements.
"""

from __future__ import annotations

import ctypes
import struct
from functools import cache
from typing import Any

import torch

from variant_kernels.cuda_ops import library

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Blocks of a grid, and rows where a kernel counts them in 32 bits.
MAX_ROWS = 2**31 - 512


def device_and_stream(x: torch.Tensor) -> tuple[int, int]:
    """The index of x's device and the stream that torch computes on there."""
    if library.is_emulated():
        return 0, 0
    return x.device.index, torch.cuda.current_stream(x.device).cuda_stream


@cache
def _function(name: str) -> Any:
    function = getattr(library.load(), f"variant_cuda_{name}")
    function.argtypes = [ctypes.c_char_p, ctypes.c_int64, ctypes.c_int, ctypes.c_void_p]
    function.restype = ctypes.c_int
    return function


def launch(op: str, name: str, layout: struct.Struct, values: tuple[Any, ...], x: torch.Tensor):
    """Run ``variant_cuda_<name>`` on x's device and stream.

    Raises:
        RuntimeError: the launch failed; the message is the CUDA runtime's.
    """
    packed = layout.pack(*values)
    library.check(op, _function(name)(packed, len(packed), *device_and_stream(x)))


def check_rows(op: str, name: str, count: int) -> None:
    """Raise ValueError if a grid cannot hold so many rows."""
    if count > MAX_ROWS:
        raise ValueError(
            f'{op}: backend "cuda" takes at most {MAX_ROWS} rows of {name}; got {count}'
        )


@cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors; a few under emulation, so that small tests share work out too."""
    if library.is_emulated():
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count
