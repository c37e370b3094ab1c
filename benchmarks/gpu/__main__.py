"""Everything that needs a GPU, in one command of at most nine minutes.

    python -m benchmarks.gpu --out FOLDER [--seconds 530] [--var-repo PATH] [--hmar-repo PATH]
    python -m benchmarks.gpu --rehearsal --out FOLDER

It needs torch, Triton, the packages in PACKAGES and this checkout; no network. What
``python -m benchmarks.gpu.artefacts`` compiled beforehand is used if it is there and fits this
machine; else the extension is built first. FOLDER gets ``results.json``, which is complete up to
the last result at any moment, ``log.txt`` and, at the end, ``logs.tar.gz``.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.gpu.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
# Import names of what is needed besides torch and Triton.
PACKAGES = (
    *("numpy", "PIL", "pydantic", "safetensors", "huggingface_hub", "rich"),
    *("pytest", "pytest_timeout", "hypothesis"),
)
BUILD_SECONDS = 150


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 if every step succeeded, 1 if not, 2 where nothing can run."""
    started = time.time()
    options = _options(arguments)
    out = options.out.resolve()
    work = Path(tempfile.mkdtemp(prefix="variant-gpu-"))
    notes = prepare(options, work)
    # Now: some of them come with the artefacts.
    absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if absent:
        return _refuse(f"not installed: {', '.join(absent)}")
    notes += usable_extension()
    from benchmarks.gpu import runner, steps
    from benchmarks.gpu.record import Run
    from benchmarks.gpu.settings import GPU, REHEARSAL

    run = Run(out, work, started)
    settings = replace(
        REHEARSAL if options.rehearsal else GPU,
        var_repo=options.var_repo and options.var_repo.resolve(),
        hmar_repo=options.hmar_repo and options.hmar_repo.resolve(),
    )
    every = steps.steps(settings)
    names = [step.name for step in every]
    unknown = [name for name in options.step if name not in names]
    if unknown:
        return _refuse(f"no step {unknown[0]!r}; there are: {', '.join(names)}")
    chosen = [step for step in every if not options.step or step.name in options.step]
    run.begin(header(settings, notes))
    _import_everything()
    if options.rehearsal:
        from benchmarks.gpu import double

        double.install(work / "bin")
    for note in notes:
        print(note, flush=True)
    print(f"imported after {time.time() - started:.1f} s", flush=True)
    ok = runner.run_steps(run, settings, chosen, options.seconds)
    print(runner.summary(run))
    return 0 if ok else 1


def header(settings: Settings, notes: list[str]) -> dict[str, Any]:
    """What a reader of the results needs besides them."""
    from benchmarks.gpu.steps import FILTERS

    return {
        "notes": notes,
        "quick": settings.quick,
        "dtype": settings.dtype,
        "engine": {
            "model": settings.model,
            "device": settings.device,
            "weights": "random" if settings.model.startswith("var-") else "trained",
            "bridge": settings.bridge,
            "sampling": FILTERS,
        },
    }


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description="Measure everything on this GPU."
    )
    parser.add_argument("step", nargs="*", help="which steps; all by default")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu", help="for results, logs")
    parser.add_argument("--seconds", type=float, default=530, help="the run ends itself after them")
    parser.add_argument("--var-repo", type=Path, help="clone of FoundationVision/VAR to compare")
    parser.add_argument("--hmar-repo", type=Path, help="clone of NVlabs/HMAR to compare")
    parser.add_argument("--artefacts", type=Path, default=ROOT / "build" / "gpu-artefacts")
    parser.add_argument("--rehearsal", action="store_true", help="tiny sizes, without a GPU")
    return parser.parse_args(arguments)


def _refuse(reason: str) -> int:
    print(f"benchmarks.gpu: {reason}", file=sys.stderr)
    return 2


def prepare(options: argparse.Namespace, work: Path) -> list[str]:
    """Set the environment of all steps and unpack what was compiled; returns what was done."""
    from benchmarks.gpu.unpack import unpack

    packages = work / "packages"
    notes = unpack(options.artefacts, work / "triton", ROOT, packages)
    places = [str(ROOT)]
    if packages.exists():
        sys.path.insert(1, str(packages))
        places.append(str(packages))
    os.environ |= {
        "PYTHONPATH": os.pathsep.join([*places, *filter(None, [os.environ.get("PYTHONPATH")])]),
        # The first process must not touch the driver: CUDA does not survive a fork.
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        "TRITON_CACHE_DIR": str(work / "triton"),
        "VARIANT_CACHE_DIR": str(work / "variant"),
        "PYTHONUNBUFFERED": "1",
    }
    return notes


def usable_extension() -> list[str]:
    """Build the extension where there is none that this machine loads; returns what was done.

    One that was compiled elsewhere may need a later C library than the one here.
    """
    from benchmarks.gpu.unpack import extension_path

    path, notes = extension_path(ROOT), []
    if path.exists():
        error = load_error()
        if error is None:
            return []
        notes = [f"artefacts: the extension does not load here: {error}"]
        path.unlink()
    began = time.monotonic()
    environment = {**os.environ, "VARIANT_CUDA": "0", "VARIANT_CPU_ISAS": "local"}
    try:
        built = subprocess.run(
            [sys.executable, "setup.py", "build_ext", "--inplace"],
            cwd=ROOT,
            env=environment,
            timeout=BUILD_SECONDS,
            capture_output=True,
            text=True,
            check=False,
        )
        result = "built" if built.returncode == 0 else f"failed: {built.stderr[-300:]}"
    except subprocess.TimeoutExpired:
        result = f"took more than {BUILD_SECONDS} s"
    return [*notes, f"build without artefacts: {result}, {time.monotonic() - began:.0f} s"]


def load_error() -> str | None:
    """Why this process cannot load the extension; None if it can."""
    import torch  # noqa: F401  # brings the OpenMP runtime that the extension uses too

    importlib.invalidate_caches()
    try:
        importlib.import_module("variant_kernels._C")
    except ImportError as error:
        return str(error)
    return None


def _import_everything() -> None:
    """What steps import, once for all of them: a fork has it."""
    import torch

    for name in (
        *("pytest", "variant.bench.engine_bench", "variant.bench.environment"),
        *("benchmarks.harness", "benchmarks.training_step", "benchmarks.largest_batch"),
        *("benchmarks.gpu.test_counts", "torch.profiler"),
    ):
        importlib.import_module(name)
    if importlib.util.find_spec("triton") is not None:
        importlib.import_module("triton")
    assert not torch.cuda.is_initialized()


if __name__ == "__main__":
    sys.exit(main())
