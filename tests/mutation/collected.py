"""Runs tests that were collected once: each mutant is a fork in which functions are replaced.

Importing the packages and collecting the tests takes seconds, most tests take milliseconds. So one
process imports and collects what is unchanged; a fork of it gives the functions of the module the
code of the mutant and runs the tests that reach the changed line. A change that acts while modules
are imported has no effect here: ``forked.verdict_of`` decides about those.
"""

from __future__ import annotations

import gc
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import CodeType, FunctionType
from typing import NamedTuple

import pytest

from tests.mutation.changes import Mutant
from tests.mutation.forked import PYTEST, Killer, in_child, prepare, verdict


class Job(NamedTuple):
    """A mutant, and the tests that reach its line."""

    mutant: Mutant
    tests: Sequence[str]


def verdicts_of(
    jobs: Sequence[Job], files: Sequence[str], seconds: float
) -> Iterator[tuple[int, str, str]]:
    """(index of the job, verdict, test) of the ``jobs`` of one module, as they are decided.

    There is no verdict on a change outside of the functions that exist after the import.
    """
    with tempfile.TemporaryDirectory() as folder:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            log = os.open(Path(folder) / "log", os.O_CREAT | os.O_WRONLY)
            os.dup2(log, 1)
            os.dup2(log, 2)
            try:
                prepare()
                plugin = _Forks(jobs, seconds, write)
                # Nothing is captured: all forks would share the file. Each has its own output.
                pytest.main([*PYTEST, "-s", f"--basetemp={folder}/tests", *files], plugins=[plugin])
            finally:
                os._exit(0)
        os.close(write)
        with os.fdopen(read) as lines:
            for line in lines:
                index, state, test = json.loads(line)
                yield index, state, test
        os.waitpid(child, 0)


class _Forks:
    """A pytest plugin: runs the collected tests once for each mutant, instead of once."""

    def __init__(self, jobs: Sequence[Job], seconds: float, answers: int) -> None:
        self.jobs, self.seconds, self.answers = jobs, seconds, answers

    def pytest_runtestloop(self, session) -> bool:
        items = {item.nodeid: item for item in session.items}
        functions = _functions_of(self.jobs[0].mutant.path)
        for index, (mutant, tests) in enumerate(self.jobs):
            changes = changes_of(functions, mutant)
            if not changes or not tests or not set(tests) <= set(items):
                continue

            def work(changes=changes, tests=tests) -> object:
                for function, code in changes:
                    function.__code__ = code
                return _run(session.config, [items[name] for name in tests])

            state, test = verdict(*in_child(work, self.seconds))
            os.write(self.answers, json.dumps([index, state, test]).encode() + b"\n")
        return True


def _run(config, items: Sequence[pytest.Item]) -> list[object]:
    """[exit code, the first test that fails]; the tests after it do not run."""
    killer = Killer()
    config.pluginmanager.register(killer)
    for item, after in zip(items, [*items[1:], None], strict=True):
        config.hook.pytest_runtest_protocol(item=item, nextitem=after)
        if killer.failed:
            return [1, killer.failed]
    return [0, ""]


def _functions_of(path: Path) -> list[FunctionType]:
    """All functions that the file at ``path`` has made, whoever holds them."""
    gc.unfreeze()  # frozen objects are not listed; tests/conftest.py freezes them
    functions = [
        thing
        for thing in gc.get_objects()
        if isinstance(thing, FunctionType) and thing.__code__.co_filename == str(path)
    ]
    gc.freeze()
    return functions


def changes_of(
    functions: Sequence[FunctionType], mutant: Mutant
) -> list[tuple[FunctionType, CodeType]]:
    """The functions whose code the mutant changes, with their new code.

    None where the change is in what runs during the import alone, such as a default value, or
    where two functions of one line, such as lambdas, cannot be told apart.
    """
    codes: dict[tuple[str, int], CodeType] = {}
    twice: set[tuple[str, int]] = set()

    def collect(code: CodeType) -> None:
        key = (code.co_qualname, code.co_firstlineno)
        if key in codes:
            twice.add(key)
        codes[key] = code
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                collect(constant)

    collect(compile(mutant.source, str(mutant.path), "exec", dont_inherit=True))
    changes = []
    for function in functions:
        old = function.__code__
        key = (old.co_qualname, old.co_firstlineno)
        if key in codes and codes[key] != old:
            if key in twice or codes[key].co_freevars != old.co_freevars:
                return []
            changes.append((function, codes[key]))
    return changes
