"""What the Triton launchers share: the device they launch on and what that device is."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch

from variant_kernels.dispatch.support import triton_interprets

__all__ = ["family", "num_processors", "on_device_of", "padded"]

# One stands for the interpreter: there, a test says how many processors there should be.
INTERPRETED_PROCESSORS = 1


def on_device_of(x: torch.Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device: make it x's."""
    if x.device.type == "cuda" and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    if x.device.type == "xpu" and x.device.index != torch.xpu.current_device():
        return torch.xpu.device(x.device)
    return nullcontext()


@cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors (compute units, Xe cores) of a GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    if device.type == "xpu":
        return torch.xpu.get_device_properties(device).gpu_subslice_count
    return INTERPRETED_PROCESSORS


@cache
def family(device: torch.device) -> str:
    """Which list of block sizes suits a device: interpreter, sm90 (and later), nvidia, amd, other.

    Consumer GPUs after sm90 have the shared memory of sm86, so that capability 12 is "nvidia".
    """
    if triton_interprets():
        return "interpreter"
    if device.type != "cuda":
        return "other"
    if torch.version.hip is not None:
        return "amd"
    return "sm90" if torch.cuda.get_device_capability(device)[0] in (9, 10) else "nvidia"


def padded(head_dim: int) -> int:
    """The power of two that a block of head_dim columns takes."""
    return 1 << (head_dim - 1).bit_length()
