"""What differs between a CPU and a GPU when generations are timed."""

from __future__ import annotations

import time

import torch

from variant_kernels.dispatch.request import dtype_name

# The original's demo runs under float16 autocast on a GPU; a CPU is fast in bfloat16.
AUTOCAST = {"cpu": torch.bfloat16, "cuda": torch.float16}


def autocast(device: str, enabled: bool) -> torch.autocast:
    """The 16-bit autocast that a peer runs under."""
    return torch.autocast(device, dtype=AUTOCAST[device], enabled=enabled)


def peer_settings(device: str) -> dict[str, bool]:
    """Name of each peer setting, and whether autocast is on: on a GPU nobody runs float32."""
    sixteen = {f"{dtype_name(AUTOCAST[device])} autocast": True}
    return sixteen if device == "cuda" else {"float32": False, **sixteen}


def clock(device: str) -> float:
    """Seconds; work queued on a GPU counts as done only when it is."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
