"""Autotuning of block sizes: candidates are timed once per shape, the fastest is stored on disk.

Environment: ``VARIANT_AUTOTUNE=0`` disables timing and takes the first candidate;
``VARIANT_CACHE_DIR`` is where results are stored (default: ``variant_kernels`` in the user's cache
directory).
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from variant_kernels import device_lock
from variant_kernels.dispatch.support import triton_interprets

WARM_UP_MS, REPEAT_MS = 10, 40


@dataclass(frozen=True)
class Config:
    """Queries and keys of one tile, and the compiler's options.

    maxnreg: the most registers a thread may have (NVIDIA only); None leaves it to the compiler.
    """

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """The compiler's options, as keyword arguments of a launch."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if self.maxnreg is None else {**options, "maxnreg": self.maxnreg}


# Choices of this process, by (kernel, device, key).
_chosen_configs: dict[tuple[Any, ...], Config] = {}


def cache_dir() -> Path:
    """Where choices are stored across processes."""
    directory = os.environ.get("VARIANT_CACHE_DIR")
    if directory:
        return Path(directory) / "tuning"
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "variant_kernels" / "tuning"


def best(
    kernel: Any,
    configs: Sequence[Config],
    key: tuple[Any, ...],
    launch: Callable[[Config], object],
    device: torch.device,
) -> Config:
    """The fastest of ``configs``; the first where timing is unnecessary or impossible.

    While a CUDA graph is being captured or another thread is timing, this returns an earlier choice
    or else the first config, and stores nothing. If there is not enough memory for timing, the
    first config is used for the rest of the process.

    Args:
        kernel: the Triton kernel; its source is part of the key on disk.
        key: everything else that the fastest config depends on: shape, dtype.
        launch: runs the kernel with a config; it must be safe to run many times.
    Raises:
        RuntimeError: no config fits the device.
    """
    if len(configs) == 1:
        return configs[0]
    chosen = _chosen_configs.get((kernel, device, key))
    if chosen is None:
        if not _may_time(device) or not device_lock.CAPTURE_OR_TIMING.acquire(blocking=False):
            return configs[0]
        try:
            chosen = _read_or_time(kernel, configs, key, launch, device)
        except torch.OutOfMemoryError:
            # Timing allocates 256 MB. Trying again at every call of a training that fills the GPU
            # would make torch empty its caching allocator each time.
            chosen = configs[0]
            warnings.warn(
                f"variant_kernels: no memory to time {kernel.__name__} (timing takes 256 MB): this "
                "process uses its first block sizes",
                stacklevel=2,
            )
        finally:
            device_lock.CAPTURE_OR_TIMING.release()
        _chosen_configs[kernel, device, key] = chosen
    return chosen


def clear_choices() -> None:
    """Drop the choices of this process; those on disk stay."""
    _chosen_configs.clear()


def _may_time(device: torch.device) -> bool:
    if triton_interprets() or os.environ.get("VARIANT_AUTOTUNE", "1") == "0":
        return False
    return not (device.type == "cuda" and torch.cuda.is_current_stream_capturing())


@cache
def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return torch.xpu.get_device_name(device) if device.type == "xpu" else device.type


def _read_or_time(
    kernel: Any,
    configs: Sequence[Config],
    key: tuple[Any, ...],
    launch: Callable[[Config], object],
    device: torch.device,
) -> Config:
    record = {
        "kernel": kernel.__name__,
        "source": kernel.cache_key,
        "triton": triton.__version__,
        "device": _device_name(device),
        "key": [str(part) for part in key],
        "configs": [asdict(config) for config in configs],
    }
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    path = cache_dir() / f"{kernel.__name__}-{digest[:24]}.json"
    stored = _read_config(path, configs)
    if stored is not None:
        return stored
    fastest, times = _time(kernel.__name__, configs, launch)
    record |= {"milliseconds": times, "winner": asdict(fastest)}
    _write(path, json.dumps(record, indent=1))
    return fastest


def _time(
    name: str, configs: Sequence[Config], launch: Callable[[Config], object]
) -> tuple[Config, list[float | None]]:
    """The fastest config, and the milliseconds of each; None for one that does not fit the GPU."""
    times: list[float | None] = []
    last_error: Exception | None = None
    for config in configs:
        try:
            milliseconds: Any = triton.testing.do_bench(
                lambda config=config: launch(config),
                warmup=WARM_UP_MS,
                rep=REPEAT_MS,
                return_mode="median",
            )
        except (OutOfResources, PTXASError, CompilationError) as error:
            milliseconds, last_error = None, error
        times.append(milliseconds)
    measured = [(t, index) for index, t in enumerate(times) if t is not None]
    if not measured:
        raise RuntimeError(
            f"{name}: none of its {len(configs)} block sizes fits this device"
        ) from last_error
    return configs[min(measured)[1]], times


def _read_config(path: Path, configs: Sequence[Config]) -> Config | None:
    """The stored choice; None if there is none or it is not one of ``configs``."""
    try:
        config = Config(**json.loads(path.read_text())["winner"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return config if config in configs else None


def _write(path: Path, text: str) -> None:
    """Replace the file atomically: other processes may be reading and writing it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.replace(temporary, path)
    except OSError as error:
        warnings.warn(
            f"variant_kernels: cannot store tuning results in {path.parent} ({error}); every "
            "process will time its kernels again. Set VARIANT_CACHE_DIR to a writable folder",
            stacklevel=2,
        )
