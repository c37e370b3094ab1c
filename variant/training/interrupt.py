"""Ctrl-C, SIGTERM and SIGHUP: a run stops at the end of its present step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# SIGHUP: the terminal is closed, or its connection is lost. Windows has no such signal.
SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)


class Interrupt:
    """Records the first signal, so that a run can stop at the end of its present step.

    A later Ctrl-C has its usual effect. Other signals have none: they come from programs, several
    times (Slurm and systemd send SIGTERM to every process of a job, and torchrun, which gets it
    too, sends it to its processes again; a shell repeats the SIGHUP of its terminal), and must not
    end the run while it writes its checkpoint.

    signum: of the recorded signal; None before one arrives.
    """

    signum: int | None = None

    @contextmanager
    def listening(self) -> Iterator[Interrupt]:
        """Handle the signals within the block; in other threads than the main one, do nothing.

        One that was ignored before stays so: SIGHUP under nohup, Ctrl-C in a script's background
        job.
        """
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        handlers = {number: signal.getsignal(number) or signal.SIG_DFL for number in SIGNALS}
        previous = {
            number: handler for number, handler in handlers.items() if handler is not signal.SIG_IGN
        }

        def record(signum: int, frame: FrameType | None) -> None:
            if self.signum is None:
                self.signum = signum
            if signal.SIGINT in previous:
                signal.signal(signal.SIGINT, previous[signal.SIGINT])

        for number in previous:
            signal.signal(number, record)
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
