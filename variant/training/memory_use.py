"""The memory that this process has needed so far."""

from __future__ import annotations

from pathlib import Path

import torch

STATUS = Path("/proc/self/status")


def memory_use(device: torch.device) -> dict[str, int]:
    """Bytes: on a GPU the most that torch had allocated, on a CPU the resident size of the process.

    Nothing on systems other than Linux without a GPU.
    """
    if device.type == "cuda":
        return {"memory/peak_allocated_bytes": torch.cuda.max_memory_allocated(device)}
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return {}
    kilobytes = next((line.split()[1] for line in lines if line.startswith("VmRSS:")), None)
    return {} if kilobytes is None else {"memory/resident_bytes": int(kilobytes) * 1024}
