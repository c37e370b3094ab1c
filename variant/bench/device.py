"""The differences between timing generations on a CPU and on a GPU."""

from __future__ import annotations

import time

import torch

from variant_kernels.dispatch.request import dtype_name
from variant_kernels.products import has_products

# The original's demo uses float16 autocast on a GPU; CPUs have fast products in bfloat16.
AUTOCAST = {"cpu": torch.bfloat16, "cuda": torch.float16}


def autocast(device: str, enabled: bool) -> torch.autocast:
    """The 16-bit autocast that a peer runs under."""
    return torch.autocast(device, dtype=AUTOCAST[device], enabled=enabled)


def autocast_name(device: str) -> str:
    """Name of the peer setting with 16-bit autocast."""
    return f"{dtype_name(AUTOCAST[device])} autocast"


def peer_settings(device: str) -> dict[str, bool]:
    """Name of each peer setting, and whether autocast is on. GPU peers run under autocast only.

    A CPU without bfloat16 products emulates them, several times slower than float32: its peers run
    in float32 only.
    """
    sixteen = {autocast_name(device): True}
    if not has_products(device, AUTOCAST[device]):
        return {"float32": False}
    return sixteen if device == "cuda" else {"float32": False, **sixteen}


def clock(device: str) -> float:
    """Seconds, read after the device has finished its queued work."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
