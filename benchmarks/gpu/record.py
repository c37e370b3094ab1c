"""``results.json`` of one run: everything that was measured, replaced as a whole at each addition.

A process that is killed at any moment leaves the file as it was before or after an addition.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.results import RUN as FORMAT
from variant.bench.result_file import result_text

RESULTS, LOG, ARCHIVE = "results.json", "log.txt", "logs.tar.gz"
CLOCKS = "clocks.csv"
# nvidia-smi's names of what is sampled, in the order of the columns after the time.
CLOCK_FIELDS = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", "memory.used")


@dataclass(frozen=True)
class Run:
    """Where a run writes.

    out: folder of what is brought home: results, log, archive.  work: folder of everything else,
    which goes into the archive at the end.  started: seconds since the epoch.
    """

    out: Path
    work: Path
    started: float

    def begin(self, header: dict[str, Any]) -> None:
        """Write the file with its header and without results."""
        self.out.mkdir(parents=True, exist_ok=True)
        empty = {"format": FORMAT, "complete": False, **header, "steps": [], "results": []}
        self._write(empty)

    def read(self) -> dict[str, Any]:
        """Everything so far."""
        return json.loads((self.out / RESULTS).read_text())

    def set(self, **fields: Any) -> None:
        """Set fields at the top, such as the environment."""
        self._change(lambda data: data.update(fields))

    def add_step(self, step: dict[str, Any]) -> None:
        """Append the outcome of a step."""
        self._change(lambda data: data["steps"].append(step))

    def add(self, kind: str, step: str, name: str, data: Any, began: float) -> None:
        """Append one result, with the clocks and the power since ``began`` (epoch seconds).

        An earlier result of the same kind, step and name is replaced: a measurement with few rounds
        by the one with all of them.
        """
        now = time.time()
        result = {
            "kind": kind,
            "step": step,
            "name": name,
            "at": round(now - self.started, 2),
            "seconds": round(now - began, 2),
            "clocks": clocks_between(self.work / CLOCKS, began, now),
            "data": data,
        }

        def replace(everything: dict[str, Any]) -> None:
            key = (kind, step, name)
            results = everything["results"]
            results[:] = [r for r in results if (r["kind"], r["step"], r["name"]) != key]
            results.append(result)

        self._change(replace)
        # After the file is in place: whoever reads this line finds the result.
        print(f"recorded {kind} {step} {name}", flush=True)

    def _change(self, change: Callable[[dict[str, Any]], None]) -> None:
        with self._alone():
            data = self.read()
            change(data)
            self._write(data)

    def _write(self, data: dict[str, Any]) -> None:
        temporary = self.out / f".{RESULTS}.part"
        temporary.write_text(result_text(data))
        os.replace(temporary, self.out / RESULTS)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One process at a time; the system frees the lock of a process that is killed."""
        self.work.mkdir(parents=True, exist_ok=True)
        with (self.work / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def clocks_between(path: Path, start: float, end: float) -> dict[str, list[float]]:
    """Least, median and greatest of each field of nvidia-smi's samples in a time; {} without any.

    A sample just before counts too: a short measurement may fall between two.
    """
    columns: list[list[float]] = [[] for _ in CLOCK_FIELDS]
    for at, values in clock_samples(path):
        if start - 0.5 <= at <= end:
            for column, value in zip(columns, values, strict=True):
                column.append(value)
    return {
        name: [min(column), median(column), max(column)]
        for name, column in zip(CLOCK_FIELDS, columns, strict=True)
        if column
    }


def clock_samples(path: Path) -> Iterator[tuple[float, list[float]]]:
    """(epoch seconds, values) of each complete line: ``2026/11/29 02:10:11.123, 1980, ...``."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        stamp, *values = [cell.strip() for cell in line.split(",")]
        try:
            whole, _, fraction = stamp.partition(".")
            at = time.mktime(time.strptime(whole, "%Y/%m/%d %H:%M:%S"))
            numbers = [float(value) for value in values]
        except ValueError:
            continue  # nvidia-smi's messages, and fields that a GPU does not report
        if len(numbers) == len(CLOCK_FIELDS):
            yield at + float(f"0.{fraction or 0}"), numbers
