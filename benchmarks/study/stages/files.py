"""The files of the stages, and what says that a stage is complete.

A stage that is complete has written a JSON file with its identity; it is not run again as long as
its settings and inputs are the same.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.study.settings import Run
from variant.bench.environment import environment
from variant.files import atomic_write

VAE = "vae"


def vae_file(out: Path) -> Path:
    """The weights of the VQ-VAE."""
    return out / VAE / "vae-best.safetensors"


def run_folder(out: Path, run: Run) -> Path:
    """The folder of a run's files."""
    return out / "runs" / run.name / f"seed{run.seed}"


def is_done(path: Path, wanted: str) -> bool:
    """Whether a stage has written its file, with this identity."""
    return done_values(path, lambda: wanted) is not None


def done_values(path: Path, wanted: Callable[[], str]) -> dict[str, Any] | None:
    """The file of a stage; None if there is none, or one of another identity."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return values if values.get("identity") == wanted() else None


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a file of a stage, whole or not at all."""
    with atomic_write(path, durable=True) as temporary:
        temporary.write_text(json.dumps(values, indent=1, allow_nan=False) + "\n")


def begin(folder: Path, wanted: str, mark: Path | None = None) -> None:
    """Keep what a stage that was killed has left in its folder; remove that of other settings.

    Args:
        mark: the file that tells whose the folder is; None is ``identity.json`` in the folder.
    """
    begun = folder / "identity.json" if mark is None else mark
    if folder.exists() and not is_done(begun, wanted):
        shutil.rmtree(folder)
    write_json(begun, {"identity": wanted})


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write an .npz; equal arrays make equal files."""
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]


def provenance() -> dict[str, Any]:
    """The commit and machine of a stage."""
    found = environment()
    return {key: found.get(key) for key in ("date", "commit", "cpu", "isa", "python", "torch")}
