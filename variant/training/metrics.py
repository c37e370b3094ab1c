"""The metrics file of a training run: JSON, one line per epoch.

A loss that has diverged is the text "NaN", as JSON has no such number.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from variant.files import atomic_write
from variant.paths import json_text, open_at_once


class MetricsFile:
    """``KIND-metrics.jsonl``: the history of a run, one epoch a line."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.path = folder / f"{kind}-metrics.jsonl"

    def rewrite(self, history: Iterable[Mapping[str, Any]]) -> None:
        """Make the file hold these epochs and no others.

        A resumed run repeats the epochs after its checkpoint, which the file may hold already. A
        new run has no file before its first epoch ends.
        """
        entries = list(history)
        if not entries:
            with suppress(FileNotFoundError):
                self.path.unlink()
            return
        with atomic_write(self.path) as temporary:
            temporary.write_text("".join(_line(entry) for entry in entries))

    def append(self, entry: Mapping[str, Any]) -> None:
        """Add a finished epoch.

        Raises:
            OSError: the file cannot be written; it is then as before.
        """
        append_line(self.path, entry)


def append_line(path: Path, entry: Mapping[str, Any]) -> None:
    """Add a line to a file of JSON.

    Raises:
        OSError: the file cannot be written; it is then as before.
    """
    size = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "a", opener=open_at_once) as file:
            file.write(_line(entry))
    except OSError as error:
        with suppress(OSError):
            os.truncate(path, size)
        # Errors of opening a file name it, those of writing do not.
        raise OSError(error.errno, error.strerror, str(path)) from None


def _line(entry: Mapping[str, Any]) -> str:
    return json_text(entry) + "\n"
