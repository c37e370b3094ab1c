"""The file of a run's steps: JSON, one line every few steps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from variant.files import atomic_write
from variant.training.metrics import append_line


class StepsFile:
    """``KIND-steps.jsonl``: one line for every reported step, in ascending order."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.path = folder / f"{kind}-steps.jsonl"

    def keep_until(self, step: int) -> None:
        """Drop the lines after a step; a resumed run writes them again.

        A line that a killed run left incomplete is dropped too.
        """
        if not self.path.is_file():  # missing, or a device, which may have no end
            return
        lines = self.path.read_text("utf-8", "replace").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and 0 < _step(line) <= step]
        if not kept:
            self.path.unlink()
        elif kept != lines:
            with atomic_write(self.path) as temporary:
                temporary.write_text("".join(kept), "utf-8")

    def append(self, line: Mapping[str, Any]) -> None:
        """Add a line.

        Raises:
            OSError: the file cannot be written; it is then as before.
        """
        append_line(self.path, line)


def _step(line: str) -> int:
    """The line's step; 0 where the line is damaged."""
    try:
        step = json.loads(line)["step"]
    except (LookupError, TypeError, ValueError):
        return 0
    return step if type(step) is int else 0
