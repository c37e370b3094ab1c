"""The differences between timing generations on a CPU and on a GPU."""

from __future__ import annotations

import time

import torch

from variant_kernels.dispatch.request import dtype_name

# The original's demo uses float16 autocast on a GPU; CPUs have fast products in bfloat16.
AUTOCAST = {"cpu": torch.bfloat16, "cuda": torch.float16}


def autocast(device: str, enabled: bool) -> torch.autocast:
    """The 16-bit autocast that a peer runs under."""
    return torch.autocast(device, dtype=AUTOCAST[device], enabled=enabled)


def peer_settings(device: str) -> dict[str, bool]:
    """Name of each peer setting, and whether autocast is on. GPU peers run under autocast only."""
    sixteen = {f"{dtype_name(AUTOCAST[device])} autocast": True}
    return sixteen if device == "cuda" else {"float32": False, **sixteen}


def clock(device: str) -> float:
    """Seconds, read after the device has finished its queued work."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
