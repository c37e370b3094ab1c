"""Stopping a run after the step that is under way."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Interrupt:
    """Ctrl-C or SIGTERM asks for a stop after the running step; a second one stops at once."""

    signum: int | None = None

    @contextmanager
    def listening(self) -> Iterator[Interrupt]:
        """Catch both signals within the block (in the main thread; elsewhere Python cannot)."""
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
