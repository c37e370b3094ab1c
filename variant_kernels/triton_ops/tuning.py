"""Block sizes: timed where that is allowed, else those of the nearest shape that is known.

Where timing is allowed (``variant_kernels.tuning_switch``) the candidates are timed once per shape
and the fastest is stored on disk. Elsewhere nothing waits: a shape takes its stored choice, or that
of the nearest shape which is stored or comes with the package (``shipped_configs.json``), or else
the first candidate.

Environment: ``VARIANT_TUNE=1`` allows timing everywhere, ``VARIANT_AUTOTUNE=0`` nowhere;
``VARIANT_CACHE_DIR`` is where results are stored (default: ``variant_kernels`` in the user's cache
directory).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from variant_kernels import device_lock, tuning_switch
from variant_kernels.dispatch.support import triton_interprets
from variant_kernels.triton_ops.common import family

WARM_UP_MS, REPEAT_MS = 10, 40
# A choice is written within milliseconds: an older file of this name is not being written.
TEMPORARY, LEFTOVER_SECONDS = ".tmp", 3600
SHIPPED = Path(__file__).parent / "shipped_configs.json"


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


class Key(NamedTuple):
    """What the fastest config of a kernel depends on, besides the device.

    same: shapes that differ in any of these share no choice.  sizes: positive numbers; the nearest
    shape is that of the smallest sum of ``|log2(size / other size)|``.  detail: what else makes a
    shape that is timed by itself.
    """

    same: tuple[Any, ...]
    sizes: tuple[int, ...] = ()
    detail: tuple[Any, ...] = ()


class Known(NamedTuple):
    """The config of one shape, from the disk or from the package."""

    same: list[str]
    sizes: list[int]
    config: Config


# Choices of this process, by (kernel, device, key): timed or read, and those of other shapes.
_chosen_configs: dict[tuple[Any, ...], Config] = {}
_nearest_configs: dict[tuple[Any, ...], Config] = {}


def power_of_two_from(number: int) -> int:
    """The least power of two that is not below a positive number: similar sizes share a choice."""
    return 1 << (number - 1).bit_length()


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
    key: Key,
    launch: Callable[[Config], object],
    device: torch.device,
) -> Config:
    """The fastest of ``configs``, where that is known or may be timed now; else the likeliest.

    While a CUDA graph is being captured or another thread is timing, nothing is timed. If there is
    not enough memory for timing, the likeliest is used for the rest of the process.

    Args:
        kernel: the Triton kernel; its source is part of the key on disk.
        launch: runs the kernel with a config; it must be safe to run many times.
    Raises:
        RuntimeError: no config fits the device.
    """
    if len(configs) == 1 or triton_interprets():
        return configs[0]
    identity = kernel, device, key
    chosen = _chosen_configs.get(identity)
    if chosen is not None:
        return chosen
    if _may_time(device) and device_lock.CAPTURE_OR_TIMING.acquire(blocking=False):
        try:
            chosen = _read_or_time(kernel, configs, key, launch, device)
        except torch.OutOfMemoryError:
            # Timing allocates 256 MB. Trying again at every call of a training that fills the GPU
            # would make torch empty its caching allocator each time.
            chosen = _nearest(kernel, configs, key, device)
            warnings.warn(
                f"variant_kernels: no memory to time {kernel.__name__} (timing takes 256 MB): this "
                "process uses the block sizes of another shape, or its first ones",
                stacklevel=2,
            )
        finally:
            device_lock.CAPTURE_OR_TIMING.release()
        _chosen_configs[identity] = chosen
        _nearest_configs.clear()
        return chosen
    nearest = _nearest_configs.get(identity)
    if nearest is None:  # another thread, whose choice is new, may drop all of them at any time
        nearest = _nearest_configs[identity] = _nearest(kernel, configs, key, device)
    return nearest


def clear_choices() -> None:
    """Drop the choices of this process; those on disk stay."""
    _chosen_configs.clear()
    _nearest_configs.clear()


def _may_time(device: torch.device) -> bool:
    if not tuning_switch.may_time():
        return False
    return not (device.type == "cuda" and torch.cuda.is_current_stream_capturing())


def _nearest(kernel: Any, configs: Sequence[Config], key: Key, device: torch.device) -> Config:
    """The stored choice, or that of the nearest shape: of equally near ones a stored one."""
    record, path = _record(kernel, configs, key, device)
    exact = _read_config(path, configs)
    if exact is not None:
        return exact
    same = [str(part) for part in key.same]
    near = [
        (_distance(key.sizes, known.sizes), order, known.config)
        for order, known in enumerate((*_stored(record), *_shipped(kernel.__name__, device)))
        if known.same == same and known.config in configs and len(known.sizes) == len(key.sizes)
    ]
    return min(near, key=itemgetter(0, 1))[2] if near else configs[0]


def _distance(sizes: Sequence[int], others: Sequence[int]) -> float:
    return sum(abs(math.log2(a / b)) for a, b in zip(sizes, others, strict=True))


def _stored(record: dict[str, Any]) -> list[Known]:
    """The choices on disk for other shapes of this kernel on this device."""
    found = []
    for path in sorted(cache_dir().glob(f"{record['kernel']}-*.json")):
        try:
            other = json.loads(path.read_text())
            if all(other[name] == record[name] for name in ("source", "triton", "device")):
                found.append(Known(other["same"], other["sizes"], Config(**other["winner"])))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found


@cache
def _shipped(kernel_name: str, device: torch.device) -> list[Known]:
    """The choices that come with the package for the device's family."""
    entries = json.loads(SHIPPED.read_text())["entries"]
    return [
        Known(entry["same"], entry["sizes"], Config(**entry["config"]))
        for entry in entries
        if (entry["kernel"], entry["family"]) == (kernel_name, family(device))
    ]


@cache
def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return torch.xpu.get_device_name(device) if device.type == "xpu" else device.type


def _record(
    kernel: Any, configs: Sequence[Config], key: Key, device: torch.device
) -> tuple[dict[str, Any], Path]:
    """What identifies a choice on disk, and its file."""
    record = {
        "kernel": kernel.__name__,
        "source": kernel.cache_key,
        "triton": triton.__version__,
        "device": _device_name(device),
        "same": [str(part) for part in key.same],
        "sizes": list(key.sizes),
        "detail": [str(part) for part in key.detail],
        "configs": [asdict(config) for config in configs],
    }
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    return record, cache_dir() / f"{kernel.__name__}-{digest[:24]}.json"


def _read_or_time(
    kernel: Any,
    configs: Sequence[Config],
    key: Key,
    launch: Callable[[Config], object],
    device: torch.device,
) -> Config:
    record, path = _record(kernel, configs, key, device)
    stored = _read_config(path, configs)
    if stored is not None:
        return stored
    fastest, times = _time(kernel.__name__, configs, launch)
    # What benchmarks.shipped_choices needs besides.
    record |= {"milliseconds": times, "winner": asdict(fastest),
               "family": family(device), "torch": torch.__version__}  # fmt: skip
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


def _clear_leftovers(folder: Path) -> None:
    """Remove the files of processes that were killed while they wrote."""
    oldest = time.time() - LEFTOVER_SECONDS
    for path in folder.glob(f"*{TEMPORARY}"):
        with suppress(FileNotFoundError):  # another process removes it too
            if path.stat().st_mtime < oldest:
                path.unlink()


def _write(path: Path, text: str) -> None:
    """Replace the file atomically: other processes may be reading and writing it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(path.parent)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=TEMPORARY)
        try:
            with os.fdopen(handle, "w") as file:
                file.write(text)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        warnings.warn(
            f"variant_kernels: cannot store tuning results in {path.parent} ({error}); every "
            "process will time its kernels again. Set VARIANT_CACHE_DIR to a writable folder",
            stacklevel=2,
        )
