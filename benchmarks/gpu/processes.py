"""Processes of a run: each is a group that is killed whole, and ends when its parent does."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_PR_SET_PDEATHSIG = 1
# A process that was killed inside the driver of a GPU that hangs may never end; then it is left.
KILL_SECONDS = 5.0


def end_with_parent() -> None:
    """Let the system kill this process when its parent ends, even by SIGKILL."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def fork(work: Callable[[], None], log: Path) -> int:
    """Run ``work`` in a copy of this process, in a group of its own; returns its id.

    The copy has imported what this process has, which saves seconds. This process must not have
    used a GPU: CUDA does not survive a fork. Output goes to the end of ``log``. The exit status is
    0, or 1 after an exception, which the log shows.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        end_with_parent()
        os.setsid()
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        work()
        status = 0
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)


def wait(child: int, until: float, expired: Callable[[], bool] = lambda: False) -> int | None:
    """The exit status of a child (negative: its signal); None if it was killed, as a group, at
    ``until`` (seconds of ``time.monotonic``) or when ``expired`` said so.

    It returns within ``KILL_SECONDS`` of the kill, even if the child does not end.
    """
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            # What it started and left behind.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(child, signal.SIGKILL)
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= until or expired():
            # The leader too, in the moment before it has made its group.
            for kill in (os.killpg, os.kill):
                with suppress(ProcessLookupError, PermissionError):
                    kill(child, signal.SIGKILL)
            _wait_for_end(child)
            return None
        time.sleep(0.02)


def _wait_for_end(child: int) -> None:
    ends = time.monotonic() + KILL_SECONDS
    while not os.waitpid(child, os.WNOHANG)[0] and time.monotonic() < ends:
        time.sleep(0.02)
