"""Which process of a run is lost: each one says every second that it lives.

A collective operation on a lost process fails on the CPU with the address of a socket, and on the
GPU it waits. The heartbeat gives the number, the machine and, where it had one, the error.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

EVERY = 1.0  # seconds between two signs of life
# Seconds without one after which a process is lost, if a collective operation has failed ...
LOST_AFTER_FAILURE = 5.0
# ... and if none has: long enough for a machine that swaps, short enough to stop within a minute.
LOST_AFTER = 40.0
# Seconds that a process has to leave by itself after another one ended with an error.
LEAVE_WITHIN = 15.0
STORE_TIMEOUT = timedelta(seconds=10)


@dataclass
class _Sign:
    """The last sign of life of a process: its value, and when this process first saw it."""

    value: bytes
    since: float


class Heartbeat:
    """Signs of life of all processes in a key-value store, watched by a thread.

    If another process is lost while this one waits for it, this one prints a line and ends with
    exit code 1.

    Args:
        store: a connection of its own, e.g. a ``torch.distributed.TCPStore``.
        leave: ends this process; another function in tests.
    """

    def __init__(
        self, store: Any, rank: int, size: int, leave: Callable[[int], Any] = os._exit
    ) -> None:
        self.rank, self.size = rank, size
        self._store, self._leave = store, leave
        self._store.set_timeout(STORE_TIMEOUT)
        self._count, self._error, self._ended = 0, "", False
        self._signs: dict[int, _Sign] = {}
        self._heard = time.monotonic()  # of the store
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._leave_at: float | None = None
        self._last_words = ""
        self._beat()
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Begin to watch; every process has given its first sign of life."""
        self._thread.start()

    def end(self, error: str = "") -> None:
        """Tell the others that this process ends.  Args: error: the reason, which they report."""
        self._error, self._ended = error, True
        with suppress(Exception):
            self._beat()

    def stop(self) -> None:
        """Stop watching."""
        self._stopping.set()
        self._thread.join(timeout=2 * STORE_TIMEOUT.total_seconds())

    def reason(self, patience: float = 2 * LOST_AFTER_FAILURE) -> str | None:
        """Which other process is lost, and why, after a collective operation failed.

        Args:
            patience: seconds until every process is taken to live; then the result is None.
        """
        until = time.monotonic() + patience
        while time.monotonic() < until:
            with suppress(Exception):
                self._read()
            lost = self._lost(LOST_AFTER_FAILURE)
            if lost is not None:
                return lost[0]
            time.sleep(EVERY / 5)
        return None

    def leave_soon(self, message: str) -> None:
        """End the process with this message, should it not end by itself within 15 seconds."""
        self._last_words = message
        self._leave_at = time.monotonic() + LEAVE_WITHIN

    def _watch(self) -> None:
        while not self._stopping.wait(EVERY):
            with suppress(Exception):  # the store does not answer: _lost notices it
                self._beat()
                self._read()
            lost = self._lost(LOST_AFTER)
            if lost is not None and self._leave_at is None:
                reason, grace = lost
                self._last_words, self._leave_at = reason, time.monotonic() + grace
            if self._leave_at is not None and time.monotonic() >= self._leave_at:
                line = f"variant: error: rank {self.rank}: {self._last_words}\n"
                with suppress(OSError):
                    os.write(sys.stderr.fileno() if sys.stderr else 2, line.encode())
                self._leave(1)
                return

    def _beat(self) -> None:
        self._count += 1
        with self._lock:
            self._store.set(self._key(self.rank), self._sign())

    def _read(self) -> None:
        with self._lock:
            values = self._store.multi_get([self._key(rank) for rank in range(self.size)])
        self._heard = now = time.monotonic()
        for rank, value in enumerate(values):
            if rank not in self._signs or self._signs[rank].value != bytes(value):
                self._signs[rank] = _Sign(bytes(value), now)

    def _lost(self, after: float) -> tuple[str, float] | None:
        """(which process is lost and why, seconds until this one must end); None if none is.

        Args:
            after: seconds without a sign of life.
        """
        now = time.monotonic()
        silent: list[tuple[float, str]] = []
        for rank, sign in self._signs.items():
            if rank == self.rank:
                continue
            values = json.loads(sign.value)
            if values["error"]:
                return f"rank {rank} has ended: {values['error']}", LEAVE_WITHIN
            if not values["ended"] and now - sign.since > after:
                silent.append((sign.since, f"rank {rank} (process {values['process']})"))
        if silent and now - self._heard <= after:
            _, name = min(silent)
            return f"{name} is lost: no sign of life for {after:.0f} s; continue with --resume", 0.0
        if now - self._heard > after:
            return (
                f"the process that the others meet at (MASTER_ADDR {_master()}, rank 0 or "
                f"torchrun) is lost: no answer for {after:.0f} s; continue with --resume",
                0.0,
            )
        return None

    def _sign(self) -> str:
        return json.dumps(
            {
                "count": self._count,
                "process": f"{os.getpid()} on {socket.gethostname()}",
                "ended": self._ended,
                "error": self._error,
            }
        )

    @staticmethod
    def _key(rank: int) -> str:
        return f"heartbeat/{rank}"


def _master() -> str:
    return os.environ.get("MASTER_ADDR", "unknown")
