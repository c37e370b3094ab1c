"""Runs tasks in processes of one thread each, so that results do not depend on how many run.

A process that is killed loses what its stage did since the last checkpoint. The processes end when
the one that started them ends, however that happens.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from benchmarks.study.tasks import Task
from variant.errors import UserError

POLL = 0.2
EVERY = 60.0  # seconds between lines of progress
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def run_tasks(
    tasks: Sequence[Task], command: Callable[[Task], list[str]], out: Path, jobs: int,
    say: Callable[[str], None],
) -> None:  # fmt: skip
    """Run every task that is not complete.

    Args:
        command: of the process of a task.
        jobs: processes at once.
        say: prints a line.
    Raises:
        UserError: a task failed; the others that run are ended.
    """
    done, running = set[str](), dict[str, subprocess.Popen[bytes]]()
    asked = set[str]()  # whether it is complete: that takes as long as to read its inputs
    pace = _Pace(tasks, jobs)
    (out / "logs").mkdir(parents=True, exist_ok=True)
    say(pace.line(done))
    said = time.monotonic()
    try:
        while len(done) < len(tasks):
            for task in tasks:
                ready = task.name not in done and task.name not in running
                if not ready or not done.issuperset(task.needs):
                    continue
                if task.name not in asked and task.is_done():
                    done.add(task.name)
                    pace.skip(task)
                    continue
                asked.add(task.name)
                if len(running) < jobs:
                    log = _log(out, task)
                    pace.start(task, was_begun=log.exists())
                    running[task.name] = _start(command(task), log)
                    say(f"{task.name}: started ({pace.line(done)})")
            for name, process in list(running.items()):
                code = process.poll()
                if code is None:
                    continue
                del running[name]
                log = _log(out, next(task for task in tasks if task.name == name))
                if code:
                    raise UserError(f"study: {name} failed with {code}; the end of {log} says why")
                done.add(name)
                pace.end(name)
                say(f"{name}: done ({pace.line(done)})")
            if time.monotonic() - said > EVERY:
                said = time.monotonic()
                say(f"running {', '.join(sorted(running))} ({pace.line(done)})")
            if running:
                time.sleep(POLL)
    finally:
        for process in running.values():
            _kill_group(process.pid)
            process.wait()


class _Pace:
    """How much of the predicted work is done, and how long the rest will take."""

    def __init__(self, tasks: Sequence[Task], jobs: int) -> None:
        self.tasks, self.jobs = {task.name: task for task in tasks}, jobs
        self.left = sum(task.seconds for task in tasks)
        self.total = self.left
        self._started: dict[str, float] = {}
        self._resumed = set[str]()
        self._predicted, self._taken = 0.0, 0.0

    def start(self, task: Task, *, was_begun: bool) -> None:
        """The process of a task has started; ``was_begun``: an earlier one did part of it."""
        self._started[task.name] = time.monotonic()
        if was_begun:
            self._resumed.add(task.name)

    def skip(self, task: Task) -> None:
        self.left -= task.seconds

    def end(self, name: str) -> None:
        task = self.tasks[name]
        self.left -= task.seconds
        taken = time.monotonic() - self._started.pop(name)
        if name not in self._resumed:  # what is left of a task says nothing about the machine
            self._predicted += task.seconds
            self._taken += taken

    def line(self, done: set[str]) -> str:
        """One line of progress."""
        now = time.monotonic()
        gone = sum(
            min(now - started, self.tasks[name].seconds) for name, started in self._started.items()
        )
        # The machine is slower than it was when its speed was measured if others use it too.
        ratio = max(1.0, self._taken / self._predicted) if self._predicted else 1.0
        hours = max(0.0, self.left - gone) * ratio / 3600
        return (
            f"{len(done)} of {len(self.tasks)} tasks; {self.total / 3600:.1f} core hours planned, "
            f"{hours:.1f} left, about {60 * hours / self.jobs:.0f} minutes at {self.jobs} at once"
        )


def _log(out: Path, task: Task) -> Path:
    return out / "logs" / f"{task.name.replace('/', '-')}.txt"


def _start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, **dict.fromkeys(THREADS, "1")}
    with log.open("ab") as file:
        # The pipe ends with this process, and then the other one ends: see `end_with_parent`.
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=file,
            env=environment,
            start_new_session=True,
        )


def _kill_group(leader: int) -> None:
    """Kill a process and those that it started, which read samples for it."""
    with suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def end_with_parent() -> None:
    """End this process, and those that it started, as soon as the one that started it has ended."""

    def wait() -> None:
        while os.read(sys.stdin.fileno(), 1):  # not sys.stdin, whose lock outlives the thread
            pass
        _kill_group(os.getpid())

    threading.Thread(target=wait, daemon=True).start()
