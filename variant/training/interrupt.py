"""Ctrl-C and SIGTERM: a run stops at the end of its present step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Interrupt:
    """Records Ctrl-C or SIGTERM, so that a run can stop at the end of its present step.

    A second signal has its usual effect.

    signum: of the recorded signal; None before one arrives.
    """

    signum: int | None = None

    @contextmanager
    def listening(self) -> Iterator[Interrupt]:
        """Handle both signals within the block; in other threads than the main one, do nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        previous = {
            number: signal.getsignal(number) or signal.SIG_DFL
            for number in (signal.SIGINT, signal.SIGTERM)
        }

        def restore() -> None:
            for number, handler in previous.items():
                signal.signal(number, handler)

        def request(signum: int, frame: object) -> None:
            self.signum = signum
            restore()

        for number in previous:
            signal.signal(number, request)
        try:
            yield self
        finally:
            restore()
