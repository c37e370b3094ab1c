"""Runs a generator's command as users do: a process of its own, one thread."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def run_generator(name: str, *words: object) -> None:
    """Raises: AssertionError with the command's output, if a case fails."""
    command = [sys.executable, "-m", f"tests.robustness.{name}", *map(str, words)]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise AssertionError(f"{' '.join(command[1:])}\n{done.stdout}{done.stderr[-3000:]}")


def part(total: int, index: int, parts: int) -> list[str]:
    """``--first`` and ``--cases`` of one of several parts of a run."""
    first = total * index // parts
    return ["--first", str(first), "--cases", str(total * (index + 1) // parts - first)]
