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


def _group_limit(
    root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> float:
    """What the control groups (version 2) of this process still allow; infinite without a limit."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        lines = []
    # "0::/a/b" is the version 2 line; every group on the way up may set a limit of its own.
    own = next((line[3:].strip("/") for line in lines if line.startswith("0::")), "")
    folders = [root.joinpath(*own.split("/")[:n]) for n in range(len(own.split("/")) + 1)]
    return min((_room(folder) for folder in folders), default=float("inf"))


def _room(folder: Path) -> float:
    """Bytes that one group leaves; file cache that the kernel would drop counts as free."""
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return float("inf")
    if limit == "max":
        return float("inf")
    reclaimable = int(stat.get("inactive_file", 0)) + int(stat.get("slab_reclaimable", 0))
    return max(int(limit) - used + reclaimable, 0)
