"""The files of a run's checkpoints: their names, which is the newest, which are kept."""

from __future__ import annotations

import math
import re
from contextlib import suppress
from pathlib import Path

from variant.errors import UserError
from variant.files import atomic_write
from variant.paths import path_kind
from variant.tensor_files import stored_pickle
from variant.training.checkpoint_folder import is_checkpoint_folder, link, remove_folder

# Digits of a step in a name: names are in the order of their steps.
DIGITS = 8
BEST_NAME = "best.safetensors"  # in a folder
BEST_SUFFIX = "-best.safetensors"  # beside a file, after its name


class CheckpointFiles:
    """Where the checkpoints of one task lie in a run's folder.

    ``KIND-last.pt`` is the checkpoint that one process wrote last, ``KIND-step-00000040.pt`` an
    older one of step 40 with its best weights in ``KIND-step-00000040-best.safetensors``. Several
    processes write the folder ``KIND-step-00000040``, with its best weights in
    ``best.safetensors``.

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
        with suppress(OSError, ValueError):  # ValueError: a NUL byte in the path
            paths = [
                path
                for path in self.folder.iterdir()
                if self._is_older(path.name)
                and (path.suffix == ".pt" or is_checkpoint_folder(path))
            ]
            return sorted(paths, key=step_in_name)
        return []

    def _is_older(self, name: str) -> bool:
        """Whether a checkpoint beside ``last`` has such a name."""
        pattern = rf"{re.escape(self.kind)}-step-\d{{{DIGITS},}}(\.pt)?"
        return re.fullmatch(pattern, name) is not None

    def path_of(self, step: int) -> Path:
        """The folder that several processes write."""
        return self.folder / f"{self.kind}-step-{step:0{DIGITS}d}"

    def newest(self) -> Path | None:
        """The checkpoint of the highest step; None where there is none."""
        older = self.older()
        if path_kind(self.last) is None:
            return older[-1] if older else None
        if older and older[-1].suffix != ".pt" and step_in_name(older[-1]) > self._last_step():
            return older[-1]
        return self.last

    def _last_step(self) -> float:
        """The step of ``last``; without one where it is damaged, so that its reader says so."""
        try:
            return int(stored_pickle(self.last)["step"])
        except (KeyError, TypeError, ValueError, UserError):
            return math.inf

    def best_of(self, checkpoint: Path) -> Path:
        """Where the best weights lie that a checkpoint records."""
        if checkpoint == self.last:
            return self.best
        if checkpoint.suffix != ".pt":
            return checkpoint / BEST_NAME
        return checkpoint.with_name(f"{checkpoint.stem}{BEST_SUFFIX}")

    def archive_last(self, best_sha256: str | None) -> None:
        """Give ``last``, if there is one, the name of an older checkpoint too, with its best.

        Not where the best weights are others than it records: a run that was killed between a newer
        folder and the renaming of the best weights leaves such a pair, and nobody could resume from
        it.

        Args:
            best_sha256: of the file ``best``; None where there are no best weights.
        Raises:
            OSError: the folder cannot be written.
        """
        try:
            saved = stored_pickle(self.last)
            step, recorded = saved["step"], saved["best_sha256"]
        except (KeyError, UserError):  # none, or a damaged one, which nobody could resume from
            return
        if recorded != best_sha256:
            return
        name = self.path_of(step).with_suffix(".pt")
        if recorded is not None:
            link(self.best, self.best_of(name))
        link(self.last, name)

    def remove_older(self, number: int) -> None:
        """Remove the oldest, so that at most ``number`` are left besides the newest.

        What cannot be removed stays.
        """
        newest = self.newest()
        older = [path for path in self.older() if path != newest]
        if newest != self.last and path_kind(self.last) is not None:
            older = sorted([*older, self.last], key=self._step_of)
        for path in older[: max(0, len(older) - number)]:
            with suppress(OSError):
                if path.suffix != ".pt":
                    remove_folder(path)
                    continue
                path.unlink()
                if path != self.last:
                    self.best_of(path).unlink()

    def remove_lone_best(self) -> None:
        """Remove the best weights of older checkpoints that are gone, when a run is resumed.

        A run that was killed between the two files of a checkpoint, as it kept or removed it,
        leaves them. What cannot be removed stays.
        """
        for path in self.folder.glob(f"{self.kind}-step-*{BEST_SUFFIX}"):
            checkpoint = path.with_name(f"{path.name.removesuffix(BEST_SUFFIX)}.pt")
            if self._is_older(checkpoint.name) and path_kind(checkpoint) is None:
                with suppress(OSError):
                    path.unlink()

    def _step_of(self, checkpoint: Path) -> float:
        return self._last_step() if checkpoint == self.last else step_in_name(checkpoint)

    def restore_best(self, checkpoint: Path) -> None:
        """Make the best weights of an older checkpoint the present ones, if it has any.

        Raises:
            UserError: the file cannot be written.
        """
        kept = self.best_of(checkpoint)
        if kept != self.best and kept.is_file():
            with atomic_write(self.best, durable=True) as temporary:
                link(kept, temporary)


def step_in_name(path: Path) -> int:
    """The step of an older checkpoint."""
    return int(re.findall(r"\d+", path.stem.rpartition("-step-")[2])[0])
