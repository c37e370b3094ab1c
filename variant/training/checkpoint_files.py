"""The files of a run's checkpoints: their names, which is the newest, which are kept."""

from __future__ import annotations

import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

from variant.errors import UserError
from variant.files import atomic_write, sync
from variant.paths import path_kind
from variant.tensor_files import stored_pickle

# Digits of a step in a name: names are in the order of their steps.
DIGITS = 8


class CheckpointFiles:
    """Where the checkpoints of one task lie in a run's folder.

    ``KIND-last.pt`` is the checkpoint that one process wrote last, ``KIND-step-00000040.pt`` an
    older one of step 40 with its best weights in ``KIND-step-00000040-best.safetensors``.

    best: the best weights.  next_best: those that the next checkpoint will record.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder, self.kind = folder, kind
        self.last = folder / f"{kind}-last.pt"
        self.best = folder / f"{kind}-best.safetensors"
        self.next_best = folder / f".{kind}-best.next.safetensors"

    @property
    def patterns(self) -> tuple[str, ...]:
        """Patterns of the names of all files that are written."""
        names = (self.last.name, self.best.name, self.next_best.name)
        return (*names, f"{self.kind}-step-*")

    def older(self) -> list[Path]:
        """The checkpoints beside ``last``, oldest first."""
        pattern = re.compile(rf"{re.escape(self.kind)}-step-\d{{{DIGITS},}}\.pt")
        with suppress(OSError, ValueError):  # ValueError: a NUL byte in the path
            paths = [path for path in self.folder.iterdir() if pattern.fullmatch(path.name)]
            return sorted(paths, key=_step_in_name)
        return []

    def newest(self) -> Path | None:
        """The checkpoint of the highest step; None where there is none."""
        older = self.older()
        if path_kind(self.last) is None:
            return older[-1] if older else None
        return self.last

    def best_of(self, checkpoint: Path) -> Path:
        """Where the best weights lie that a checkpoint records."""
        if checkpoint == self.last:
            return self.best
        return checkpoint.with_name(f"{checkpoint.stem}-best.safetensors")

    def archive_last(self) -> None:
        """Give ``last``, if there is one, the name of an older checkpoint too, with its best.

        Raises:
            OSError: the folder cannot be written.
        """
        try:
            step = stored_pickle(self.last)["step"]
        except (KeyError, UserError):  # none, or a damaged one, which nobody could resume from
            return
        name = self.folder / f"{self.kind}-step-{step:0{DIGITS}d}.pt"
        if self.best.exists():
            _link(self.best, self.best_of(name))
        _link(self.last, name)

    def remove_older(self, number: int) -> None:
        """Remove the oldest, so that at most ``number`` are left besides the newest.

        Files that cannot be removed stay.
        """
        newest = self.newest()
        older = [path for path in self.older() if path != newest]
        for path in older[: max(0, len(older) - number)]:
            with suppress(OSError):
                path.unlink()
            with suppress(OSError):
                self.best_of(path).unlink()

    def restore_best(self, checkpoint: Path) -> None:
        """Make the best weights of an older checkpoint the present ones, if it has any.

        Raises:
            UserError: the file cannot be written.
        """
        kept = self.best_of(checkpoint)
        if kept != self.best and kept.is_file():
            with atomic_write(self.best, durable=True) as temporary:
                _link(kept, temporary)


def _step_in_name(path: Path) -> int:
    return int(re.findall(r"\d+", path.stem.rpartition("-step-")[2])[0])


def _link(path: Path, name: Path) -> None:
    """A second name of a file; its copy, where the file system has one name for a file.

    Raises:
        OSError: the folder cannot be written.
    """
    with suppress(FileNotFoundError):
        name.unlink()  # of a run that was killed before its next checkpoint
    try:
        os.link(os.path.realpath(path), name)
    except OSError:
        temporary = name.with_name(f".{name.name}.{os.getpid()}.tmp")
        try:
            shutil.copyfile(path, temporary)
            sync(temporary)
            os.replace(temporary, name)
        finally:
            with suppress(OSError):
                temporary.unlink()
