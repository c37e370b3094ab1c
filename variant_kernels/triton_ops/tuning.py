"""Choosing block sizes: a short list is timed once for each shape, and the winner kept on disk.

Environment: ``VARIANT_AUTOTUNE=0`` takes the first of every list; ``VARIANT_CACHE_DIR`` is where
winners are kept (default: ``variant_kernels`` in the user's cache directory).
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
    """Queries and keys of one tile, and how the compiler spreads the work."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


# Winners of this process, by (kernel, device, key).
_winners: dict[tuple[Any, ...], Config] = {}


def cache_dir() -> Path:
    """Where winners are kept across processes."""
    given = os.environ.get("VARIANT_CACHE_DIR")
    if given:
        return Path(given) / "tuning"
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "variant_kernels" / "tuning"


def best(
    kernel: Any,
    configs: Sequence[Config],
    key: tuple[Any, ...],
    launch: Callable[[Config], object],
    device: torch.device,
) -> Config:
    """The fastest of ``configs``; the first where nothing may be or need be timed.

    While a CUDA graph is captured or another thread times, an earlier winner or the first is taken,
    and the choice is left open. Where no memory is left to time with, the first serves for the
    rest of the process.

    Args:
        kernel: the Triton kernel; its source is part of the key on disk.
        key: what else the winner depends on: shape, dtype.
        launch: runs the kernel with a config; it must be free to run many times.
    Raises:
        RuntimeError: no config fits the device.
    """
    if len(configs) == 1:
        return configs[0]
    place = (kernel, device, key)
    winner = _winners.get(place)
    if winner is None:
        if not _may_time(device) or not device_lock.CAPTURE_OR_TIMING.acquire(blocking=False):
            return configs[0]
        try:
            winner = _kept_or_timed(kernel, configs, key, launch, device)
        except torch.OutOfMemoryError:
            # The stopwatch wants 256 MB. To ask again at every call would, in a training that fills
            # the GPU, make torch give back all that it keeps, each time.
            winner = configs[0]
            warnings.warn(
                f"variant_kernels: no memory to time {kernel.__name__} with (it takes 256 MB): its "
                "first block sizes serve this process",
                stacklevel=2,
            )
        finally:
            device_lock.CAPTURE_OR_TIMING.release()
        _winners[place] = winner
    return winner


def forget() -> None:
    """Drop the winners of this process (those on disk stay)."""
    _winners.clear()


def _may_time(device: torch.device) -> bool:
    if triton_interprets() or os.environ.get("VARIANT_AUTOTUNE", "1") == "0":
        return False
    return not (device.type == "cuda" and torch.cuda.is_current_stream_capturing())


@cache
def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return torch.xpu.get_device_name(device) if device.type == "xpu" else device.type


def _kept_or_timed(
    kernel: Any,
    configs: Sequence[Config],
    key: tuple[Any, ...],
    launch: Callable[[Config], object],
    device: torch.device,
) -> Config:
    described = {
        "kernel": kernel.__name__,
        "source": kernel.cache_key,
        "triton": triton.__version__,
        "device": _device_name(device),
        "key": [str(part) for part in key],
        "configs": [asdict(config) for config in configs],
    }
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
    path = cache_dir() / f"{kernel.__name__}-{digest[:24]}.json"
    kept = _read(path, configs)
    if kept is not None:
        return kept
    winner, times = _timed(kernel.__name__, configs, launch)
    described |= {"milliseconds": times, "winner": asdict(winner)}
    _write(path, json.dumps(described, indent=1))
    return winner


def _timed(
    name: str, configs: Sequence[Config], launch: Callable[[Config], object]
) -> tuple[Config, list[float | None]]:
    times: list[float | None] = []
    refused: Exception | None = None
    for config in configs:
        try:
            milliseconds: Any = triton.testing.do_bench(
                lambda config=config: launch(config),
                warmup=WARM_UP_MS,
                rep=REPEAT_MS,
                return_mode="median",
            )
        except (OutOfResources, PTXASError, CompilationError) as error:  # not for this GPU
            milliseconds, refused = None, error
        times.append(milliseconds)
    fits = [(t, index) for index, t in enumerate(times) if t is not None]
    if not fits:
        count = len(configs)
        raise RuntimeError(f"{name}: none of its {count} block sizes fits this device") from refused
    return configs[min(fits)[1]], times


def _read(path: Path, configs: Sequence[Config]) -> Config | None:
    """The winner on file; None if there is none or it is not one of ``configs``."""
    try:
        winner = Config(**json.loads(path.read_text())["winner"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return winner if winner in configs else None


def _write(path: Path, text: str) -> None:
    """Whole or not at all: other processes may be reading and writing the same file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.replace(temporary, path)
    except OSError as error:
        warnings.warn(
            f"variant_kernels: cannot keep tuning results in {path.parent} ({error}); every "
            "process will time its kernels again. Set VARIANT_CACHE_DIR to a writable folder",
            stacklevel=2,
        )
