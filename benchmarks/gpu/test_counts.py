"""A plugin of pytest that counts outcomes while the tests run."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

# Seconds between two reports of tests that pass; a failure is reported at once.
INTERVAL = 2.0
MOST_FAILURES, MOST_TEXT = 50, 400


class Counts:
    """Reports ``{"passed": n, ..., "failures": [...], "status": pytest's, None until the end}``."""

    def __init__(self, report: Callable[[dict[str, Any]], None]) -> None:
        self._report, self._reported = report, time.monotonic()
        self._counts: Counter[str] = Counter()
        self._failures: list[dict[str, str]] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Count a test once: by its call, or by the phase that did not pass."""
        if report.when != "call" and report.outcome == "passed":
            return
        self._counts[report.outcome] += 1
        failed = report.outcome == "failed"
        if failed and len(self._failures) < MOST_FAILURES:
            crash = getattr(report.longrepr, "reprcrash", None)
            text = str(crash.message if crash is not None else report.longrepr)
            self._failures.append({"test": report.nodeid, "message": text[:MOST_TEXT]})
        if failed or time.monotonic() - self._reported > INTERVAL:
            self.finish(None)

    def pytest_collectreport(self, report: Any) -> None:
        """A file that cannot be collected."""
        if report.failed:
            self._counts["errors"] += 1
            text = str(report.longrepr)[-MOST_TEXT:]
            self._failures.append({"test": report.nodeid, "message": text})
            self.finish(None)

    def finish(self, status: int | None) -> int:
        """Report the counts so far; returns the number of failures."""
        self._reported = time.monotonic()
        failures = list(self._failures)
        self._report({**self._counts, "failures": failures, "status": status})
        return self._counts["failed"] + self._counts["errors"]
