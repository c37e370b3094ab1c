"""How far a generator is, on standard error: from its first second, then every ten seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

INTERVAL = 10.0  # seconds between two lines


class Progress:
    """Lines that tell the cases that are done, those that failed, and the time.

    Args:
        what: the generator's name, which begins each line.  total: of its cases.
        clock: seconds, for tests.
    """

    def __init__(self, what: str, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.what, self.total, self._clock = what, total, clock
        self.finished = self.failed = 0
        self._started = self._shown = clock()
        self._first_case = self._started
        self._say(f"preparing {total} cases")

    def prepared(self) -> None:
        """The cases begin now."""
        self._first_case = self._clock()
        self._say(f"prepared after {self._first_case - self._started:.0f} s")

    def case(self, failed: bool = False) -> None:
        """One more case is done."""
        self.finished += 1
        self.failed += failed
        if self.finished == 1 or self._is_due():
            seconds = self._clock() - self._first_case
            # More than all where a sequence that failed is shortened.
            rest = seconds / self.finished * max(0, self.total - self.finished)
            self._say(
                f"{self.finished} of {self.total} cases, {self.failed} failures, "
                f"{seconds:.0f} s, about {rest:.0f} s left"
            )

    def waiting(self, case: int) -> None:
        """That case still runs; to be called about every second."""
        if self._is_due():
            seconds = self._clock() - self._first_case
            self._say(
                f"{self.finished} of {self.total} cases, {self.failed} failures, "
                f"{seconds:.0f} s; case {case} runs"
            )

    def _is_due(self) -> bool:
        return self._clock() - self._shown >= INTERVAL

    def _say(self, text: str) -> None:
        self._shown = self._clock()
        print(f"{self.what}: {text}", file=sys.stderr, flush=True)
