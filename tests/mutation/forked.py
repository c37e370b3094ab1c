"""Runs tests in a forked process, on changed source or with a record of the lines they reach."""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

# Imported once, before the forks. None of them imports our packages.
import coverage
import hypothesis  # noqa: F401
import numpy  # noqa: F401
import pytest
import safetensors.torch  # noqa: F401
import torch

from tests.mutation.changes import Mutant, path_of
from tests.mutation.targets import ROOT

# One process, no cache folder. The tests left out take minutes and repeat others: a compiler, the
# other instruction sets, another dtype.
PYTEST = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:benchmark"]
PYTEST += ["-k", "not opcheck and not instruction_set and not compile and not bfloat16"]


class _Changed(importlib.abc.MetaPathFinder, importlib.abc.SourceLoader):
    """Imports one module from the mutant's source."""

    def __init__(self, module: str, path: Path, source: str) -> None:
        self.module, self.path, self.source = module, path, source

    def find_spec(self, fullname, path=None, target=None):
        if fullname != self.module:
            return None
        return importlib.util.spec_from_file_location(fullname, self.path, loader=self)

    def get_filename(self, fullname: str) -> str:
        return str(self.path)

    def get_data(self, path) -> bytes:
        if Path(path) == self.path:
            return self.source.encode()
        raise OSError(path)  # no bytecode of the unchanged file

    def path_stats(self, path):
        raise OSError(path)


class _Lines:
    """A pytest plugin: the lines of some files that each test executes, and the test's seconds."""

    # The plugin's name: tests/conftest.py leaves no test unrecorded where it is there.
    __name__ = "tests.mutation"

    def __init__(self, record: coverage.Coverage) -> None:
        self.record = record
        self.seconds: dict[str, float] = {}
        self.failed: list[str] = []

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item):
        self.record.switch_context(item.nodeid)
        start = time.monotonic()
        yield
        self.seconds[item.nodeid] = time.monotonic() - start
        self.record.switch_context("")

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed.append(report.nodeid)


class Killer:
    """A pytest plugin: the first test that fails."""

    def __init__(self) -> None:
        self.failed = ""

    def pytest_runtest_logreport(self, report):
        if report.failed and not self.failed:
            self.failed = report.nodeid

    def pytest_collectreport(self, report):
        if report.failed and not self.failed:
            self.failed = f"{report.nodeid} (import)"


@dataclass(frozen=True)
class Reach:
    """Which tests execute which lines of one module; ``seconds`` holds those that passed.

    ``imported``: the lines that run while modules are imported and tests collected.
    """

    seconds: dict[str, float]
    lines: dict[int, list[str]]
    imported: frozenset[int]

    def tests_of(self, mutant: Mutant) -> list[str]:
        """Tests that execute the changed line, quickest first.

        Where none does, those of the function around it (its default values run at the import),
        and where none executes that one either, all if the import does.
        """
        body = range(mutant.function[0] + 1, mutant.function[1] + 1)
        names = set(self.lines.get(mutant.line, ()))
        names = names or {name for line in body for name in self.lines.get(line, ())}
        if not names and self.imported.intersection(body):
            names = set(self.seconds)
        return sorted(names, key=self.seconds.__getitem__)


def in_child(work: Callable[[], object], seconds: float) -> tuple[str, object]:
    """("done", result), ("died", signal) or ("late", None) of a function run in a forked child."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        log = Path(folder) / "log"
        child = os.fork()
        if child == 0:
            # A group of its own, so that programs started by tests end with it.
            os.setpgid(0, 0)
            handle = os.open(log, os.O_CREAT | os.O_WRONLY)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            try:
                answer.write_text(json.dumps(work()))
            except BaseException as error:
                answer.write_text(json.dumps([f"{type(error).__name__}: {error}"]))
            os._exit(0)
        end = time.monotonic() + seconds
        status = None
        while time.monotonic() < end:
            ended, code = os.waitpid(child, os.WNOHANG)
            if ended:
                status = code
                break
            time.sleep(0.02)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        if status is None:
            os.waitpid(child, 0)
            return "late", None
        if not answer.exists():
            return "died", os.waitstatus_to_exitcode(status)
        return "done", json.loads(answer.read_text())


def prepare() -> None:
    os.chdir(ROOT)
    torch.set_num_threads(1)


def reach_of(
    modules: Sequence[str], tests: Sequence[str], seconds: float = 3600
) -> dict[str, Reach]:
    """Runs the tests once, nothing changed, and says what they reach of each module.

    Raises:
        RuntimeError: a test fails, or not all of them end within ``seconds``.
    """
    paths = {module: path_of(module) for module in modules}

    def work() -> object:
        prepare()
        files = [str(path) for path in paths.values()]
        record = coverage.Coverage(data_file=None, config_file=False, include=files)
        plugin = _Lines(record)
        record.start()
        pytest.main([*PYTEST, *tests], plugins=[plugin])
        record.stop()
        lines = {
            module: record.get_data().contexts_by_lineno(str(path))
            for module, path in paths.items()
        }
        return {"seconds": plugin.seconds, "failed": plugin.failed, "lines": lines}

    state, result = in_child(work, seconds)
    if state != "done" or not isinstance(result, dict) or not result["seconds"]:
        raise RuntimeError(f"{' '.join(tests)} do not run unchanged: {state} {result}")
    if result["failed"]:
        raise RuntimeError(f"these tests fail unchanged: {' '.join(sorted(set(result['failed'])))}")
    return {
        module: Reach(
            result["seconds"],
            {int(line): [name for name in names if name] for line, names in lines.items()},
            frozenset(int(line) for line, names in lines.items() if "" in names),
        )
        for module, lines in result["lines"].items()
    }


def verdict_of(
    module: str, mutant: Mutant, tests: Sequence[str], seconds: float
) -> tuple[str, str]:
    """("killed", test), ("survived", "") or ("undecided", ""): the tests did not end in time."""
    if not tests:
        return "survived", "(no test)"
    source = mutant.source
    compile(source, str(mutant.path), "exec")  # what is no Python would pass for killed

    # A package that was imported here would bring the unchanged module along.
    if loaded := [name for name in sys.modules if name.split(".")[0] == module.split(".")[0]]:
        raise RuntimeError(f"{', '.join(loaded)} must not be imported before the fork")

    def work() -> object:
        prepare()
        sys.meta_path.insert(0, _Changed(module, mutant.path, source))
        killer = Killer()
        code = pytest.main([*PYTEST, "-x", *tests], plugins=[killer])
        if code == pytest.ExitCode.USAGE_ERROR and not killer.failed:
            # tests/conftest.py imports our packages too, and pytest calls its failure that.
            try:
                importlib.import_module(module)
            except Exception as error:
                killer.failed = f"(import: {type(error).__name__})"
        if module not in sys.modules and not killer.failed:
            return ["the changed module was not imported"]
        return [int(code), killer.failed]

    return verdict(*in_child(work, seconds))


def verdict(state: str, result: object) -> tuple[str, str]:
    """The verdict on a mutant from what became of the process that ran its tests."""
    if state == "late":
        return "undecided", ""
    if state == "died":
        return "killed", f"(process ended: {result})"
    assert isinstance(result, list)
    if len(result) == 1:
        return "undecided", f"({result[0]})"
    code, test = result
    if code == 0:
        return "survived", ""
    # Exit 4 without a test that failed: pytest did not find a test, whatever the mutant does.
    return ("killed", test) if test else ("undecided", f"(pytest exit {code})")
