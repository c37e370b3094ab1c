"""Which tests coverage.py need not record, because other tests take their branches too.

Recording adds a third to two thirds to the time of a test (coverage 7.17, Python 3.11). The list in
``unrecorded.txt`` is made anew by

    rm -rf build/coverage
    python -m coverage run -m pytest -n 2 --ignore tests/robustness -p tests.recording
    python -m coverage combine
    python -m coverage json -o build/coverage/report.json
    python -m tests.recording

The first command records every test apart from the others, and its seconds. The report tells which
steps from one line to another are branches.
"""

from __future__ import annotations

import base64
import collections
import json
import os
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path

import coverage
import pytest

ROOT = Path(__file__).resolve().parents[1]
LIST = ROOT / "tests" / "unrecorded.txt"
FOLDER = ROOT / "build" / "coverage"
LEAST_SECONDS = 0.25  # of the processor, that a test takes in the list

Branch = tuple[str, int, int]  # file, line, next line


def function_of(node: str) -> str:
    """The test function of a test: ``tests/x.py::test_a[1]`` is one of ``tests/x.py::test_a``."""
    return node.partition("[")[0]


def unrecorded_functions(path: Path = LIST) -> frozenset[str]:
    return frozenset(path.read_text().split())


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Of this module as a plugin: the record of a test is apart, that of its processes too."""
    record, name = coverage.Coverage.current(), function_of(item.nodeid)
    config, start = os.environ.get("COVERAGE_PROCESS_CONFIG"), os.times()
    if record is not None:
        record.switch_context(name)
    if config is not None:
        values = json.loads(base64.b64decode(config)) | {"context": name}
        encoded = base64.b64encode(json.dumps(values).encode()).decode()
        os.environ["COVERAGE_PROCESS_CONFIG"] = encoded
    try:
        return (yield)
    finally:
        seconds = sum(os.times()[:4]) - sum(start[:4])
        FOLDER.mkdir(parents=True, exist_ok=True)
        with (FOLDER / f"seconds.{os.getpid()}").open("a") as file:
            file.write(f"{seconds:.3f} {name}\n")
        if record is not None:
            record.switch_context("")
        if config is not None:
            os.environ["COVERAGE_PROCESS_CONFIG"] = config


def superfluous(branches: dict[str, set[Branch]], seconds: dict[str, float]) -> list[str]:
    """The functions without which every branch is still taken, those that take longest first."""
    takers = collections.Counter(branch for taken in branches.values() for branch in taken)
    found = []
    for function in sorted(seconds, key=lambda name: (-seconds[name], name)):
        taken = branches.get(function, set())
        if seconds[function] >= LEAST_SECONDS and all(takers[branch] > 1 for branch in taken):
            takers.subtract(taken)
            found.append(function)
    return found


def read_records(folder: Path) -> tuple[dict[str, set[Branch]], dict[str, float]]:
    """The branches and the seconds of each function, of the combined record."""
    seconds: dict[str, float] = collections.defaultdict(float)
    for file in folder.glob("seconds.*"):
        for line in file.read_text().splitlines():
            number, _, function = line.partition(" ")
            seconds[function] += float(number)
    files = json.loads((folder / "report.json").read_text())["files"]
    every = {
        (name, first, second)
        for name, file in files.items()
        for first, second in file["executed_branches"]
    }
    branches: dict[str, set[Branch]] = collections.defaultdict(set)
    with sqlite3.connect(folder / "data") as data:
        query = (
            "select context.context, file.path, arc.fromno, arc.tono from arc "
            "join context on context.id = arc.context_id join file on file.id = arc.file_id"
        )
        for context, path, first, second in data.execute(query):
            step = os.path.relpath(path, ROOT), first, second
            if step in every:
                branches[context].add(step)
    return branches, seconds


def main() -> int:
    branches, seconds = read_records(FOLDER)
    found = superfluous(branches, seconds)
    LIST.write_text("".join(f"{function}\n" for function in sorted(found)))
    share = sum(map(seconds.__getitem__, found)) / sum(seconds.values())
    print(
        f"{LIST.relative_to(ROOT)}: {len(found)} of {len(seconds)} functions, {share:.0%} of the "
        "seconds of all tests"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
