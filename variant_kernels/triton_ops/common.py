"""Shared by the Triton launchers: the current device, its family and number of processors."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch

from variant_kernels.dispatch.support import triton_interprets

__all__ = ["family", "num_processors", "on_device_of", "padded"]

# The interpreter has no processors; tests replace num_processors.
INTERPRETED_PROCESSORS = 1


def on_device_of(x: torch.Tensor) -> AbstractContextManager[object]:
    """A context in which x's device is the current one, on which Triton launches."""
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
    """The device family that selects block sizes: interpreter, sm90, nvidia, amd or other.

    sm90 includes capability 10. Consumer GPUs after sm90 have as little shared memory as sm86, so
    capability 12 is "nvidia".
    """
    if triton_interprets():
        return "interpreter"
    if device.type != "cuda":
        return "other"
    if torch.version.hip is not None:
        return "amd"
    return "sm90" if torch.cuda.get_device_capability(device)[0] in (9, 10) else "nvidia"


def padded(head_dim: int) -> int:
    """The next power of two, which is the width of a block of head_dim columns."""
    return 1 << (head_dim - 1).bit_length()
