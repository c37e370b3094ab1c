"""``python -m tests.nightly``, which ``make nightly`` calls: every test, in parts.

A part that fails stops no other. Parts that passed are written down for the state of the sources
(commit and changes): started again, the command goes on with the others. The folder of the state
holds the seed of the random tests and the output of each part.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "nightly"

# What CI tries a part of.
SETTINGS = {
    "VARIANT_NIGHTLY": "1",
    "EMULATED_ORDERS": "0123",
    "RACE_ORDERS": "0123",
    "SANITIZED_ISAS": "all",
    "VARIANT_TRAINING_STOPS": "all",
    "VARIANT_SAMPLER_KILLS": "10",
    "VARIANT_VAE_MINUTES": "15",
    "VARIANT_SEARCH_IMAGES": "90",
    **{
        f"VARIANT_ROBUSTNESS_{name}": str(count)
        for name, count in {
            "CALLS": 100_000,
            "CASES": 20_000,
            "FILES": 8000,
            "SEQUENCES": 2000,
            "SIGNALS": 60,
            "KILLS": 60,
            "GPU_KILLS": 20,
            "PRESSURE": 400,
            "TOKENIZE_STRIDE": 1,
            "KILLED_STRIDE": 1,
            "TRITON_DTYPES": 1,
            "LARGE_DRAWS": 1,
        }.items()
    },
}


def all_parts(tests: Path = ROOT / "tests") -> list[str]:
    """Arguments of ``make``, one line a part: Python's tests by folder, random ones by file."""
    files = sorted(tests.rglob("test_*.py"))
    robustness = [file for file in files if file.parent.name == "robustness"]
    folders = sorted({file.parent for file in files} - {tests, tests / "robustness"})
    single = [file for file in files if file.parent == tests]

    def chosen(paths: list[Path]) -> str:
        return " ".join(path.relative_to(tests.parent).as_posix() for path in paths)

    return [
        "test-cpp",
        "coverage-cpp",
        "test-cuda",
        "test-cuda-python",
        *(f"test-python TESTS={chosen([folder])}" for folder in folders),
        f"test-python 'TESTS={chosen(single)}'",
        *(f"test-robustness RANDOM_TESTS={chosen([file])}" for file in robustness),
        "test-triton",
        "test-isas",
        "test-tsan",
        "sass",
        *(["cuda"] if shutil.which(os.environ.get("CUDACXX", "nvcc")) else []),
        "mutants",
    ]


def state_of_sources() -> str:
    """Name of the commit; with changes in the tracked files, also of these."""

    def git(*arguments: str) -> bytes:
        return subprocess.run(("git", *arguments), cwd=ROOT, check=True, capture_output=True).stdout

    commit = git("rev-parse", "--short=12", "HEAD").decode().strip()
    changes = git("diff", "HEAD")
    return f"{commit}-{hashlib.sha256(changes).hexdigest()[:12]}" if changes else commit


def duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min"


class Records:
    """Seconds of each part that passed: of this state, and the latest of any state for the ETA."""

    def __init__(self, folder: Path, state: str) -> None:
        self.folder = folder / state
        self.folder.mkdir(parents=True, exist_ok=True)
        self._passed, self._before = self.folder / "passed.json", folder / "seconds.json"
        self.passed: dict[str, float] = _read(self._passed)
        self.before: dict[str, float] = _read(self._before)
        seed = self.folder / "seed"
        if not seed.exists():
            seed.write_text(time.strftime("%Y%m%d"))
        self.seed = seed.read_text()

    def add(self, part: str, seconds: float) -> None:
        self.passed[part] = self.before[part] = round(seconds, 1)
        _write(self._passed, self.passed)
        _write(self._before, self.before)


def _read(path: Path) -> dict[str, float]:
    return json.loads(path.read_text()) if path.exists() else {}


def _write(path: Path, values: dict[str, float]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(values, indent=1) + "\n")
    temporary.replace(path)


def run_part(command: list[str], log: Path, environment: dict[str, str]) -> int:
    """Exit status of ``command``; its output goes to the terminal and to ``log``."""
    with (
        log.open("wb") as file,
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                sys.stdout.buffer.write(line)
                sys.stdout.flush()
                file.write(line)
            return process.wait()
        except BaseException:
            # The group: make starts pytest, which starts workers.
            os.killpg(process.pid, signal.SIGTERM)
            raise


def run(parts: list[str], records: Records, make: str = "make") -> list[str]:
    """The parts that failed. Those that passed before for this state are left out."""
    failed: list[str] = []
    environment = {**SETTINGS, "VARIANT_ROBUSTNESS_SEED": records.seed}
    waiting = [part for part in parts if part not in records.passed]
    print(f"{len(waiting)} of {len(parts)} parts, seed {records.seed}, in {records.folder}")
    for number, part in enumerate(waiting):
        known = [records.before[rest] for rest in waiting[number:] if rest in records.before]
        left = f"{duration(sum(known))} for {len(known)} of {len(waiting) - number}"
        now = time.strftime("%H:%M")
        print(f"\n== {now} part {number + 1} of {len(waiting)}: {part} (known: {left})", flush=True)
        start = time.monotonic()
        log = records.folder / f"{parts.index(part):02}-{part.split()[0]}.log"
        status = run_part([make, "--no-print-directory", *shlex.split(part)], log, environment)
        if status == 0:
            records.add(part, time.monotonic() - start)
        else:
            failed.append(part)
            print(f"== FAILED with status {status}: make {part}; its output: {log}", flush=True)
    return failed


def table(parts: list[str], records: Records, failed: list[str]) -> str:
    def state(part: str) -> str:
        if part in records.passed:
            return f"{records.passed[part]:7.0f}"
        return " failed" if part in failed else "not run"

    return "\n".join(["seconds  part", *(f"{state(part)}  {part}" for part in parts)])


def _stop(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(prog="make nightly", description=__doc__)
    parser.add_argument("--list", action="store_true", help="show the parts and which passed")
    options = parser.parse_args()
    parts, records = all_parts(), Records(FOLDER, state_of_sources())
    if options.list:
        print(table(parts, records, []))
        return 0
    signal.signal(signal.SIGTERM, _stop)
    try:
        failed = run(parts, records)
    except KeyboardInterrupt:
        print(f"\n{table(parts, records, [])}\nstopped; make nightly goes on with the rest")
        return 130
    print(f"\n{table(parts, records, failed)}\n{len(failed)} of {len(parts)} parts failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
