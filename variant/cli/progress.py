"""Progress: a bar on standard error, or lines where that is no terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from variant.cli.output import console

# advance(steps, what): ``steps`` more are done, ``what`` was the last of them.
Advance = Callable[[float, str], None]
# Between two lines where standard error is no terminal.
LINE_SECONDS = 10.0


@contextmanager
def progress(
    command: str, doing: str, total: float, json_file: Path | None = None
) -> Iterator[Advance]:
    """Progress within the block, from its start on.

    Args:
        command: begins every line, as in ``bench: 12 of 40: ours, depth 8``.
        doing: what the bar says first.
        total: steps of the whole.
        json_file: that of ``--json``: lines go where the first line of the command went.
    """
    if not sys.stderr.isatty():
        yield _Lines(command, total, console(json_file, stderr=True, command=command))
        return
    bar = Progress(*Progress.get_default_columns(), console=Console(stderr=True), transient=True)
    with bar:
        task = bar.add_task(doing, total=total)

        def advance(steps: float, what: str) -> None:
            bar.update(task, advance=steps, description=what)

        yield advance


class _Lines:
    """Prints a line at most every ``LINE_SECONDS``."""

    def __init__(self, command: str, total: float, out: Console) -> None:
        self.command, self.total, self.out, self.done = command, total, out, 0.0
        self.printed = time.monotonic()

    def __call__(self, steps: float, what: str) -> None:
        self.done += steps
        now = time.monotonic()
        if now - self.printed >= LINE_SECONDS:
            self.printed = now
            self.out.print(f"{self.command}: {self.done:,.0f} of {self.total:,.0f}: {what}")
