"""How much memory a machine can still give."""

from __future__ import annotations

from pathlib import Path

import torch

# Left to everything else: the allocator's rounding, other processes, the operating system.
USABLE_SHARE = 0.8


def free_bytes(device: torch.device) -> int:
    """Bytes that a large allocation may take on ``device``.

    On a GPU what the driver reports free plus what torch's allocator caches; on the CPU what the
    kernel calls available, within the limit of the control group.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int((free + cached) * USABLE_SHARE)
    return int(min(_available(), _group_limit()) * USABLE_SHARE)


def _available() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo names no MemAvailable")


def _group_limit(root: Path = Path("/sys/fs/cgroup")) -> float:
    """What the control group (version 2) still allows; infinite where none sets a limit."""
    try:
        limit = (root / "memory.max").read_text().strip()
        used = int((root / "memory.current").read_text())
    except OSError:
        return float("inf")
    return float("inf") if limit == "max" else max(int(limit) - used, 0)
