"""Read the study's result files.

A file holds the runs of one part of the study. A run that a file does not hold has not been made
yet; nothing here invents a value for it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from variant.errors import UserError

FULL = "full"
# The parts of the study, in the page's order.
PARTS = (
    "base", "zones", "training-free", "bridges", "ratios", "extras", "augmentation", "kv8",
    "search", "control",
)  # fmt: skip


@dataclass(frozen=True)
class Metric:
    """A measured number of a run at a depth schedule.

    name: as the page writes it.  key: in the files' "generated"; "loss" lies in "losses".
    sign: 1 if lower is better, -1 if higher is.  digits: after the point.  percent: printed as one.
    """

    name: str
    key: str
    sign: int
    digits: int = 3
    percent: bool = False

    def text(self, value: float, *, signed: bool = False) -> str:
        """The value as the page writes it."""
        plus = "+" if signed else ""
        return f"{100 * value if self.percent else value:{plus}.{self.digits}f}" + (
            " %" if self.percent else ""
        )


LOSS = Metric("held-out loss", "loss", 1, 4)
FASHION_FD = Metric("fashion-FD", "fashion_fd", 1, 4)
PRECISION = Metric("precision", "precision", -1, 1, percent=True)
RECALL = Metric("recall", "recall", -1, 1, percent=True)
ACCURACY = Metric("accuracy", "accuracy", -1, 1, percent=True)
METRICS = (LOSS, FASHION_FD, PRECISION, RECALL, ACCURACY)
# Derived from the loss: it is checked with it.
LOSS_PER_TOKEN = Metric("loss per layer-token saved", "loss_per_layer_token", 1, 7)


@dataclass(frozen=True)
class Run:
    """One run of one seed. data: its entry in the file of ``part``."""

    part: str
    name: str
    seed: int
    data: Mapping[str, Any]

    @property
    def schedules(self) -> list[str]:
        """The depth schedules whose held-out loss was measured, in the file's order."""
        return list(self.data.get("losses") or {})

    def value(self, metric: Metric, schedule: str, at: float | None = None) -> float | None:
        """The metric at ``schedule``; None if it was not measured.

        Args:
            at: part of the training steps (0 to 1) at which the loss is read from the curve; None:
                after the training.
        """
        if at is not None:
            return self._curve(schedule, at) if metric is LOSS else None
        if metric is LOSS:
            return ((self.data.get("losses") or {}).get(schedule) or {}).get("mean")
        if metric is LOSS_PER_TOKEN:
            return self._loss_per_layer_token(schedule)
        return ((self.data.get("generated") or {}).get(schedule) or {}).get(metric.key)

    def _loss_per_layer_token(self, schedule: str) -> float | None:
        here, full = self.value(LOSS, schedule), self.value(LOSS, FULL)
        tokens = self.data.get("layer_tokens") or {}
        if None in (here, full, tokens.get(schedule), tokens.get(FULL)):
            return None
        saved = tokens[FULL] - tokens[schedule]
        return None if saved <= 0 else (here - full) / saved

    def _curve(self, schedule: str, at: float) -> float | None:
        """The point of the curve that is nearest to ``at``, within a tenth of the training."""
        curve = [
            (step, losses[schedule])
            for step, losses in self.data.get("curve") or ()
            if losses.get(schedule) is not None
        ]
        if not curve:
            return None
        last = self.data.get("steps") or curve[-1][0]
        step, value = min(curve, key=lambda point: abs(point[0] - at * last))
        return value if abs(step - at * last) <= last / 10 else None


@dataclass(frozen=True)
class Part:
    """One result file."""

    name: str
    data: Mapping[str, Any]
    runs: tuple[Run, ...]

    @property
    def names(self) -> list[str]:
        """The names of the runs, in the file's order."""
        return list(dict.fromkeys(run.name for run in self.runs))


@dataclass(frozen=True)
class Study:
    """All result files that exist."""

    parts: Mapping[str, Part] = field(default_factory=dict)

    def runs(self, name: str, part: str | None = None) -> dict[int, Run]:
        """The runs of that name by seed: those of ``part``, or of the first part that has any."""
        for found in (part,) if part else self.parts:
            if found in self.parts:
                by_seed = {run.seed: run for run in self.parts[found].runs if run.name == name}
                if by_seed:
                    return by_seed
        return {}

    def values(
        self, metric: Metric, name: str, schedule: str, part: str | None = None
    ) -> dict[int, float]:
        """The metric by seed, of the seeds that measured it."""
        found = {s: run.value(metric, schedule) for s, run in self.runs(name, part).items()}
        return {seed: value for seed, value in found.items() if value is not None}


def read_study(folder: Path) -> Study:
    """Read every ``*.json`` of a folder; an empty or missing folder is an empty study.

    Raises:
        UserError: a file is no result file of the study, holds NaN or infinity, or holds the same
            run twice.
    """
    found = {}
    for path in sorted(folder.glob("*.json")):
        part = _read_part(path)
        if part.name in found:
            raise UserError(f'{path}: part "{part.name}" is in another file too; remove one')
        found[part.name] = part
    return Study({name: found[name] for name in PARTS if name in found})


def _read_part(path: Path) -> Part:
    def refuse(name: str) -> NoReturn:
        raise UserError(f"{path}: holds {name}; every number of a result must be finite")

    try:
        data = json.loads(path.read_text(), parse_constant=refuse)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from error
    name = data.get("part") if isinstance(data, dict) else None
    if name not in PARTS:
        raise UserError(f'{path}: "part" must be one of {", ".join(PARTS)}; got {name!r}')
    try:
        runs = tuple(Run(name, run["name"], run["seed"], run) for run in data["runs"])
    except (KeyError, TypeError) as error:
        raise UserError(
            f'{path}: "runs" must list objects with "name" and "seed"; got an error: {error!r}'
        ) from error
    seen = set()
    for run in runs:
        if (run.name, run.seed) in seen:
            raise UserError(f'{path}: run "{run.name}" of seed {run.seed} is listed twice')
        seen.add((run.name, run.seed))
    return Part(name, data, runs)


def mean_and_error(values: Iterable[float]) -> tuple[float, float | None]:
    """The mean and its standard error; None as the error of a single value.

    Raises:
        ValueError: no values, or one that is not finite.
    """
    values = list(values)
    if not values or not all(map(math.isfinite, values)):
        raise ValueError(f"mean_and_error: values must be finite, at least one; got {values}")
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, None
    return mean, standard_error(values, mean)


def standard_error(values: Sequence[float], mean: float) -> float:
    """sqrt(sum((x - mean)^2) / (n - 1) / n), for n of at least 2."""
    count = len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)
