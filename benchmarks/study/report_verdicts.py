"""Verdicts on claims: holds, does not hold, not resolved, not run yet.

A claim is a statement about differences of measured numbers, paired by seed. A difference counts
when it is at least two standard errors over seeds. Where one of several differences decides alone,
each has one more chance to do so by accident: it must also reach the quantile of Student's t with
Bonferroni's correction. A metric is used only if it flags the control, a run that was broken on
purpose.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from benchmarks.study.report_data import FULL, LOSS, LOSS_PER_TOKEN, Metric, Study, mean_and_error
from variant.evaluation.intervals import student_quantile, student_within

ERRORS = 2.0
# Chance that one of several differences decides a claim by accident, where there is none.
CHANCE = 0.05


class Verdict(enum.Enum):
    """What the results say about a claim."""

    HOLDS = "holds"
    DOES_NOT_HOLD = "does not hold"
    NOT_RESOLVED = "not resolved"
    NOT_RUN = "not run yet"


@dataclass(frozen=True)
class Point:
    """A metric of a run: ``part`` and ``at`` as in ``Study.runs`` and ``Run.value``."""

    run: str
    schedule: str = FULL
    metric: Metric = LOSS
    part: str | None = None
    at: float | None = None


@dataclass(frozen=True)
class Below:
    """The weighted sum of the points is below zero. All points have one metric."""

    terms: tuple[tuple[float, Point], ...]

    def __post_init__(self) -> None:
        metrics = {point.metric for _, point in self.terms}
        if len(metrics) != 1:
            raise ValueError(f"Below: terms must share one metric; got {len(metrics)}")

    @property
    def metric(self) -> Metric:
        """The metric of all its points."""
        return self.terms[0][1].metric


@dataclass(frozen=True)
class All:
    """Every part holds."""

    parts: tuple[Statement, ...]


@dataclass(frozen=True)
class Some:
    """At least one part holds."""

    parts: tuple[Statement, ...]


Statement = Below | All | Some


def points(statement: Statement) -> list[Point]:
    """Every point of a statement."""
    if isinstance(statement, Below):
        return [point for _, point in statement.terms]
    return [point for part in statement.parts for point in points(part)]


def better(this: Point, other: Point) -> Below:
    """``this`` is better than ``other``: lower or higher, as its metric wants it."""
    sign = float(this.metric.sign)
    return Below(((sign, this), (-sign, other)))


@dataclass(frozen=True)
class Evidence:
    """A verdict and what it rests on.

    mean, error: of the weighted sum over seeds (error: standard error); None where several
        differences were judged, or too few were measured.
    seeds: number of seeds.  reason: why a number was not used; empty if it was.
    """

    verdict: Verdict
    mean: float | None = None
    error: float | None = None
    seeds: int = 0
    reason: str = ""
    parts: tuple[Evidence, ...] = ()


def chance_within(errors: float, seeds: int) -> float:
    """P(abs(mean) < errors x standard error) of so many normal numbers of mean zero."""
    if seeds < 2:
        raise ValueError(f"chance_within: seeds must be at least 2; got {seeds}")
    return student_within(errors, seeds - 1)


def needed_errors(seeds: int, chances: int) -> float:
    """Standard errors that a difference needs, if ``chances`` differences can decide alone."""
    return ERRORS if chances == 1 else max(ERRORS, student_quantile(seeds - 1, CHANCE / chances))


def decide(sums: Sequence[float], to_hold: int = 1, to_fail: int = 1) -> Evidence:
    """The verdict on "below zero" from one number per seed.

    Holds and does not hold need a mean of at least two standard errors and at least two seeds.

    Args:
        to_hold, to_fail: how many differences, this one among them, can decide alone that the
            claim holds, or that it does not.
    Raises:
        ValueError: a number is NaN or infinite.
    """
    if not all(map(math.isfinite, sums)):
        raise ValueError(f"decide: sums must be finite; got {list(sums)}")
    if not sums:
        return Evidence(Verdict.NOT_RUN)
    mean, error = mean_and_error(sums)
    if error is None:
        return Evidence(Verdict.NOT_RESOLVED, mean, None, len(sums), "one seed")
    needed = needed_errors(len(sums), to_hold if mean < 0 else to_fail)
    if mean == 0 or abs(mean) < needed * error:
        verdict = Verdict.NOT_RESOLVED
    else:
        verdict = Verdict.HOLDS if mean < 0 else Verdict.DOES_NOT_HOLD
    return Evidence(verdict, mean, error, len(sums))


def combine(parts: Sequence[Evidence], *, all_must_hold: bool) -> Evidence:
    """Three-valued "and" or "or". What decides alone decides even if other parts were not run."""
    decisive = Verdict.DOES_NOT_HOLD if all_must_hold else Verdict.HOLDS
    otherwise = Verdict.HOLDS if all_must_hold else Verdict.DOES_NOT_HOLD
    verdicts = [part.verdict for part in parts]
    for verdict in (decisive, Verdict.NOT_RUN, Verdict.NOT_RESOLVED):
        if verdict in verdicts:
            break
    else:
        verdict = otherwise
    seeds = min((part.seeds for part in parts), default=0)
    reason = ""
    if verdict is not decisive:
        reason = next((part.reason for part in parts if part.verdict is verdict), "")
    return Evidence(verdict, seeds=seeds, reason=reason, parts=tuple(parts))


def sums_by_seed(statement: Below, study: Study) -> dict[int, float]:
    """The weighted sum, for the seeds that measured all of its points."""
    columns = []
    for weight, point in statement.terms:
        runs = study.runs(point.run, point.part)
        values = {s: run.value(point.metric, point.schedule, point.at) for s, run in runs.items()}
        columns.append({s: weight * value for s, value in values.items() if value is not None})
    shared = set.intersection(*map(set, columns))
    return {seed: math.fsum(column[seed] for column in columns) for seed in sorted(shared)}


def judge(
    statement: Statement,
    study: Study,
    usable: Collection[Metric],
    to_hold: int = 1,
    to_fail: int = 1,
) -> Evidence:
    """The verdict on a statement.

    One part that fails decides ``All``, one that holds decides ``Some``; the other verdict needs
    every part, which no single accident gives.

    Args:
        usable: the metrics that flag the control (``usable_metrics``). A number of another metric
            is shown and never decides.
        to_hold, to_fail: as in :func:`decide`, of the statements around this one.
    """
    if not isinstance(statement, Below):
        count, is_all = len(statement.parts), isinstance(statement, All)
        hold, fail = (1, count) if is_all else (count, 1)
        parts = [
            judge(part, study, usable, to_hold * hold, to_fail * fail) for part in statement.parts
        ]
        return combine(parts, all_must_hold=is_all)
    evidence = decide(list(sums_by_seed(statement, study).values()), to_hold, to_fail)
    checked = LOSS if statement.metric is LOSS_PER_TOKEN else statement.metric
    if evidence.verdict is Verdict.NOT_RUN or checked in usable:
        return evidence
    return Evidence(
        Verdict.NOT_RESOLVED,
        evidence.mean,
        evidence.error,
        evidence.seeds,
        f"{checked.name} has not flagged the control",
    )
