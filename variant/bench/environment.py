"""The environment of a measurement: machine, versions, commit and command.

``python -m variant.bench.environment`` prints the machine's name as it stands in file names.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from variant_kernels import _C

CPUS = Path("/sys/devices/system/cpu")


def environment(command: Sequence[str] | None = None) -> dict[str, Any]:
    """Everything needed to repeat a measurement, as plain values.

    Args:
        command: program and arguments; None is this process's own.
    """
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command_line(sys.argv if command is None else command),
        **commit_of_package(),
        "cpu": cpu_name(),
        "isa": _C.build_info()["isa"],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "caches": caches(),
        "memory_bytes": _memory(),
        "load_average": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        **_gpu(),
    }


def machine_slug(machine: dict[str, Any]) -> str:
    """A file name for a machine's results: ``amd-epyc-avx512-2-threads``, or its GPU's name."""
    words = machine["gpu"] or (f"{machine['cpu']} {machine['isa']} {machine['threads']} threads")
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def command_line(words: Sequence[str]) -> str:
    """The command as one line, without the folders of absolute paths.

    ``--option=/a/b`` counts as a path too. Other machines do not have these folders.
    """
    relative = []
    for position, word in enumerate(words):
        option, equals, value = word.rpartition("=")
        if os.path.isabs(value):
            name = Path(value).name
            value = name if position == 0 else f"PATH/{name}"
        relative.append(f"{option}{equals}{value}")
    forced = [f"{key}={os.environ[key]}" for key in ENVIRONMENT if key in os.environ]
    return " ".join([*forced, *relative])


# Variables that change what runs; the command names those that are set.
ENVIRONMENT = ("VARIANT_CPU_ISA", "VARIANT_BACKEND", "OMP_NUM_THREADS", "ONEDNN_MAX_CPU_ISA")


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match.group(1).strip() if match else platform.processor() or platform.machine()


def caches(root: Path = CPUS) -> dict[str, str]:
    """``{"L1 data": "32K", "L2": "1024K", "L3": "32768K"}`` of the first core; empty if unknown."""
    sizes = {}
    for folder in sorted((root / "cpu0" / "cache").glob("index*")):
        try:
            level, kind, size = (
                (folder / name).read_text().strip() for name in ("level", "type", "size")
            )
        except OSError:
            continue
        if kind != "Instruction":
            sizes[f"L{level}" + (" data" if kind == "Data" else "")] = size
    return sizes


def last_level_bytes(root: Path = CPUS) -> int:
    """Size of the largest cache; 32 MiB if the system does not report it."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    sizes = [int(size[:-1]) * units[size[-1]] for size in caches(root).values()]
    return max(sizes, default=32 * 2**20)


def cache_bytes(device: str) -> int:
    """Size of the largest cache of a device, bytes."""
    if device == "cuda":
        return torch.cuda.get_device_properties().L2_cache_size
    return last_level_bytes()


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _run(*words: str) -> str | None:
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, check=False, cwd=Path(__file__).parent
        )
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def commit_of_package() -> dict[str, Any]:
    """commit: None outside a clone.  dirty: whether tracked files differ from it."""
    changed = _run("git", "status", "--porcelain", "--untracked-files=no")
    return {
        "commit": _run("git", "rev-parse", "HEAD"),
        "dirty": None if changed is None else bool(changed),
    }


def _gpu() -> dict[str, Any]:
    if not torch.cuda.is_available():
        return {"gpu": None, "gpu_driver": None}
    driver = _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "gpu": torch.cuda.get_device_name(),
        "gpu_driver": driver.splitlines()[0] if driver else None,
    }


if __name__ == "__main__":
    print(machine_slug(environment()))
