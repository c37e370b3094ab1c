"""Rows and pairs of result files that a folder of runs lacks: a study goes on in a new folder.

A number is kept if it is of the same settings, the same VQ-VAE and classifiers (the figures of real
images are equal), and, where the folder holds the base run of its seed, of an equal base run.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.study.settings import BASE, Run, Study, identity
from variant.errors import UserError

Values = dict[str, Any]
# Values of a study that change which runs there are, or when they save, and no number of a run.
FREE = ("seeds", "parts", "runs", "checkpoint_minutes")


def settings_identity(study: Study) -> str:
    """SHA-256 of everything that all runs share."""
    values = {key: value for key, value in study.values.items() if key not in FREE}
    return identity(values, study.recipe)


class Kept:
    """The numbers of result files that still count beside those of a folder.

    Args:
        study: the settings.
        results: folder of the result files.
        data: the ``data`` of the result files that the folder makes; None if it makes none.
        base_row: the folder's row of the base run of a seed; None as long as it is not complete.
        rounded: rounds numbers as the result files do.
    Raises:
        UserError: a result file cannot be read.
    """

    def __init__(
        self,
        study: Study,
        results: Path,
        data: Values,
        base_row: Callable[[int], Values | None],
        rounded: Callable[[Any], Any],
    ) -> None:
        self._rounded = rounded
        self._wanted = {"settings": settings_identity(study), "data": rounded(data)}
        self._parts: dict[str, Values] = {}
        for part in study.parts:
            path = results / f"{part.name}.json"
            found = _read(path) if path.exists() else {}
            if all(found.get(key) == value for key, value in self._wanted.items()):
                self._parts[part.name] = found
        self._seeds = {
            seed
            for seed in study.values["seeds"]
            if self._is_same_base(self._row(BASE, BASE, seed), base_row(seed))
        }

    def row(self, part: str, run: Run) -> Values | None:
        """The row of a run; None if there is none that counts."""
        row = self._row(part, run.name, run.seed) if run.seed in self._seeds else None
        settings = self._rounded(run.overrides())
        return row if row is not None and row["settings"] == settings else None

    def pair(
        self, part: str, run: Run, against: Run, schedule: str
    ) -> tuple[float, float | None] | None:
        """The mean difference of two runs of a seed, and its standard error; None if not known."""
        for one in (run, against):
            if not any(self.row(name, one) for name in self._parts):
                return None
        wanted = (run.name, against.name, schedule)
        for pair in self._parts.get(part, {}).get("pairs", ()):
            is_wanted = (pair["run"], pair["against"], pair["schedule"]) == wanted
            if is_wanted and run.seed in pair["seeds"]:
                place = pair["seeds"].index(run.seed)
                return pair["by_seed"][place], pair["se_by_seed"][place]
        return None

    def _row(self, part: str, name: str, seed: int) -> Values | None:
        for row in self._parts.get(part, {}).get("runs", ()):
            if (row["name"], row["seed"]) == (name, seed):
                return row
        return None

    def _is_same_base(self, kept: Values | None, own: Values | None) -> bool:
        if own is None:
            return True
        return kept is not None and kept["losses"] == self._rounded(own)["losses"]


def _read(path: Path) -> Values:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"study: {path} cannot be read: {error}") from error
