"""Everything that needs a GPU, in one command: build, tests, sanitizer, benchmarks.

    python -m benchmarks.gpu                      all parts, within --budget seconds
    python -m benchmarks.gpu build kernels        some of them

It needs torch, Triton, the packages in PACKAGES, CMake, ninja, a C++ compiler and this checkout; no
network.
Every part is a separate process with its own log and time limit; the others run even if it fails.
``summary.json`` lists the parts, the outcome of each and the files with its results.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TAIL_LINES = 25
# The most important first.
OPS = (
    "block_causal_attention",
    "paged_attention",
    "qk_norm_append_paged_kv",
    "sample_tokens",
    "adaln",
)
# In this time the bench files together start new cases.
KERNEL_SECONDS = 225
# After it: the last case is finished, and the results are written.
KERNEL_OVERTIME = 120
# Placeholder in a command for --seconds of each bench file.
FILE_SECONDS = "{file seconds}"
# Tuning compiles every block size for each shape: too long for hundreds of small cases.
UNTUNED = ("VARIANT_AUTOTUNE", "0")
# Import names of what is needed besides torch and Triton.
PACKAGES = (
    *("numpy", "pydantic", "safetensors", "huggingface_hub", "rich", "pybind11", "setuptools"),
    *("pytest", "pytest_benchmark", "pytest_timeout", "hypothesis"),
)


@dataclass(frozen=True)
class Part:
    """One process.

    seconds: its time limit.  least: it is not started if less of the budget is left.  needs: name
    of a program; without it the part is left out.  environment: variables in addition to those of
    this process.
    """

    name: str
    command: tuple[str, ...]
    seconds: int
    least: int = 5
    needs: str | None = None
    environment: tuple[tuple[str, str], ...] = ()


@dataclass
class Outcome:
    """The result of a part: ok, failed, timed out, left out (with the reason)."""

    name: str
    status: str
    seconds: float
    command: str
    log: str | None = None
    results: list[str] = field(default_factory=list)


def parts(out: Path, var_repo: Path | None, hmar_repo: Path | None = None) -> list[Part]:
    """All parts, the most important first: the budget may not suffice for all."""
    python = sys.executable
    pytest = (python, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    # Most of the time goes into compiling hundreds of small shapes on the CPU.
    parallel = ("-n", "8") if importlib.util.find_spec("xdist") else ()
    engine = (python, "-m", "benchmarks.gpu_engine")
    repo = () if var_repo is None else ("--var-repo", str(var_repo))
    hmar = () if hmar_repo is None else ("--hmar-repo", str(hmar_repo))

    def timed(name: str, seconds: int, *options: str) -> Part:
        return Part(name, (*engine, "--json", str(out / f"{name}.json"), *options, *repo), seconds)

    return [
        Part("build", (python, "setup.py", "build_ext", "--inplace"), 240),
        Part("engine-tests", (*pytest, "tests/gpu"), 150),
        Part(
            "kernel-tests",
            (*pytest, *parallel, "tests/kernels", "-k", "triton or cuda or reference"),
            150,
            environment=(("VARIANT_TEST_DEVICE", "cuda"), UNTUNED),
        ),
        timed("engine-batch-1", 120, "--batch", "1"),
        timed("engine-batch-64", 180, "--batch", "64", "--runs", "3"),
        Part(
            "kernels",
            (
                *pytest,
                *(f"benchmarks/bench_{op}.py" for op in OPS),
                # Not "cuda" alone: that is also the name of an implementation in the CPU cases.
                *("-k", "[cuda-"),
                *("--seconds", FILE_SECONDS),
                *("--json", str(out / "kernels.json")),
                *hmar,
            ),
            KERNEL_SECONDS + KERNEL_OVERTIME,
            least=KERNEL_OVERTIME + 30,
        ),
        Part(
            "training-step",
            (
                *(python, "-m", "benchmarks.training_step"),
                # At 64 the activations of VAR-d30 alone are more than 100 GB.
                *("--batch", "16", "--json", str(out / "training-step.json"), *repo),
            ),
            150,
        ),
        Part(
            "memory",
            (
                *(python, "-m", "benchmarks.largest_batch"),
                *("--json", str(out / "memory.json"), *repo),
            ),
            150,
        ),
        Part(
            "sanitizer",
            (
                # Libraries probe for features with calls that fail; those are no errors.
                *("compute-sanitizer", "--error-exitcode=1", "--report-api-errors", "no"),
                *(*pytest, "tests/gpu/test_small_cases.py"),
            ),
            120,
            needs="compute-sanitizer",
            environment=(UNTUNED,),
        ),
    ]


def run_part(part: Part, out: Path, seconds: float) -> Outcome:
    """Run one part for at most ``seconds``; its output goes to ``NAME.log``."""
    settings = [f"{name}={value}" for name, value in part.environment]
    file_seconds = str(max(5, int(seconds - KERNEL_OVERTIME) // len(OPS)))
    words = [file_seconds if word == FILE_SECONDS else word for word in part.command]
    command = [word.replace(sys.executable, "python") for word in words]
    shown = shlex.join([*settings, *command])
    if part.needs is not None and shutil.which(part.needs) is None:
        return Outcome(part.name, f"left out: {part.needs} is not installed", 0.0, shown)
    log = out / f"{part.name}.log"
    started, before = time.monotonic(), _files(out)
    # This checkout comes before the caller's PYTHONPATH.
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with log.open("w") as file:
        process = subprocess.Popen(
            words,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path, **dict(part.environment)},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=seconds)
            status = "ok" if code == 0 else f"failed with exit code {code}"
        except subprocess.TimeoutExpired:
            status = f"timed out after {seconds:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    changed = sorted(name for name, stamp in _files(out).items() if before.get(name) != stamp)
    results = [name for name in changed if name.endswith(".json")]
    return Outcome(part.name, status, time.monotonic() - started, shown, log.name, results)


def _files(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in out.iterdir()}


def run(chosen: Sequence[Part], out: Path, budget: float) -> list[Outcome]:
    """Run parts in turn while the budget lasts; the summary is written after each."""
    out.mkdir(parents=True, exist_ok=True)
    ends, outcomes = time.monotonic() + budget, []
    for part in chosen:
        left = ends - time.monotonic()
        if left < part.least:
            outcomes.append(Outcome(part.name, "left out: the budget is spent", 0.0, ""))
        else:
            print(f"== {part.name} (at most {min(part.seconds, left):.0f} s)", flush=True)
            outcome = run_part(part, out, min(part.seconds, left))
            outcomes.append(outcome)
            print(f"   {outcome.status}, {outcome.seconds:.0f} s", flush=True)
            if outcome.log is not None:
                lines = (out / outcome.log).read_text(errors="replace").splitlines()
                shown = 3 if outcome.status == "ok" else TAIL_LINES
                print("".join(f"   | {line}\n" for line in lines[-shown:]), end="", flush=True)
        _write_summary(out, outcomes)
    return outcomes


def _write_summary(out: Path, outcomes: list[Outcome]) -> None:
    temporary = out / "summary.json.part"
    temporary.write_text(json.dumps([asdict(o) for o in outcomes], indent=1) + "\n")
    temporary.replace(out / "summary.json")


def missing() -> str | None:
    """The reason why nothing can run on this machine, or None."""
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 if no part failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description="Build, test and measure on this GPU."
    )
    names = [part.name for part in parts(Path(), None)]
    parser.add_argument("part", nargs="*", help=f"which parts; all by default: {', '.join(names)}")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu", help="for results, logs")
    parser.add_argument("--budget", type=float, default=520, help="seconds for everything")
    parser.add_argument("--var-repo", type=Path, help="clone of FoundationVision/VAR to compare")
    parser.add_argument(
        "--hmar-repo", type=Path, help="clone of NVlabs/HMAR: its kernel beside ours"
    )
    options = parser.parse_args(arguments)
    unknown = [name for name in options.part if name not in names]
    if unknown:
        parser.error(f"no part {unknown[0]!r}; there are: {', '.join(names)}")
    reason = missing()
    if reason is not None:
        print(f"benchmarks.gpu: {reason}", file=sys.stderr)
        return 2
    out = options.out.resolve()
    every = parts(out, options.var_repo, options.hmar_repo)
    chosen = [part for part in every if not options.part or part.name in options.part]
    outcomes = run(chosen, out, options.budget)
    print("\n".join(_line(outcome) for outcome in outcomes))
    return int(any(o.status != "ok" and not o.status.startswith("left out") for o in outcomes))


def _line(outcome: Outcome) -> str:
    results: Any = ", ".join(outcome.results) or "-"
    return f"{outcome.name:16} {outcome.seconds:6.1f} s  {outcome.status:28} {results}"


if __name__ == "__main__":
    sys.exit(main())
