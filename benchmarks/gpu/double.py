"""A double of the GPU for the rehearsal: ``torch.cuda`` and ``nvidia-smi`` replaced."""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# Memory that one more image seems to take.
IMAGE_BYTES = 150 * 2**20
_NVIDIA_SMI = """\
#!{python} -IS
import sys, time
assert any(word.startswith("--query-gpu=") for word in sys.argv), sys.argv
while True:
    stamp = time.strftime("%Y/%m/%d %H:%M:%S") + f".{{int(time.time() * 1000) % 1000:03d}}"
    print(stamp, 1980, 3201, 612.5, 54, 1024, sep=", ", flush=True)
    time.sleep(0.05)
"""


def install(folder: Path) -> None:
    """Replace names of ``torch.cuda`` in this process and its forks, and ``nvidia-smi`` on PATH."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "nvidia-smi"
    program.write_text(_NVIDIA_SMI.format(python=sys.executable))
    program.chmod(0o755)
    os.environ["PATH"] = os.pathsep.join((str(folder), os.environ.get("PATH", "")))
    peaks = itertools.count(1)
    replaced: dict[str, Any] = {
        "empty_cache": lambda: None,
        "get_device_properties": lambda device=None: SimpleNamespace(total_memory=2**34),
        # Memory grows from one measurement to the next, as batches do.
        "max_memory_allocated": lambda device=None: IMAGE_BYTES * next(peaks),
        "reset_peak_memory_stats": lambda device=None: None,
        "set_per_process_memory_fraction": lambda fraction, device=None: None,
    }
    for name, value in replaced.items():
        setattr(torch.cuda, name, value)
