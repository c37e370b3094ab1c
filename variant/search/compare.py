"""Searched schedules beside others at equal cost, by paired differences over images.

The search chooses by the losses of some images; the comparison takes others, so that the choice
does not flatter itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from variant.evaluation.intervals import student_quantile
from variant.search.space import Prefix
from variant.search.tree import Found, best_within

# Only a difference of more than two standard errors is resolved; of few images, whose error is
# uncertain, more than the 95 % quantile of Student's t.
RESOLVED = 2.0
SAME = "the same schedule"


@dataclass(frozen=True)
class Row:
    """The best schedules within a budget.

    cost, share: the budget.  name: of the other kind of schedules.  searched, other: the best of
    each by the search's images.  difference: mean loss of the other minus that of the searched, on
    the images of the comparison, in nats per token; error: its standard error, NaN for one image.
    images: of the comparison.
    """

    cost: str
    share: float
    name: str
    searched: Found
    other: Found
    difference: float
    error: float
    images: int

    @property
    def verdict(self) -> str:
        """What the difference says."""
        if self.searched.schedule == self.other.schedule:
            return SAME
        needed = max(RESOLVED, student_quantile(max(self.images - 1, 1)))
        # An unknown error (NaN) resolves nothing, as a difference of 0 does not.
        if not abs(self.difference) > needed * self.error:
            return "not resolved"
        return "searched is better" if self.difference > 0 else "searched is worse"


def compare(
    searched: Sequence[Found],
    others: Mapping[str, Sequence[Found]],
    budgets: Sequence[tuple[str, float]],
    losses: Callable[[Prefix], np.ndarray],
    within: Mapping[str, float] | None = None,
) -> list[Row]:
    """One row for each budget and kind of schedules that has one within it.

    Args:
        searched: what the search found.  others: name -> schedules of another kind.
        budgets: (name of a cost, share of the full network's).
        losses: of a schedule, (N,) on the images of the comparison.
        within: the name of a cost -> its largest share, which holds for both sides in every row.
    """
    rows = []
    for cost, share in budgets:
        limits = {**(within or {}), cost: share}
        best = best_within(searched, limits)
        for name, found in others.items():
            other = best_within(found, limits)
            if best is not None and other is not None:
                other_N, best_N = losses(other.schedule), losses(best.schedule)
                difference, error = paired(other_N, best_N)
                rows.append(Row(cost, share, name, best, other, difference, error, len(best_N)))
    return rows


def paired(first_N: np.ndarray, second_N: np.ndarray) -> tuple[float, float]:
    """The mean of ``first - second`` over images, and its standard error; NaN for one image."""
    differences = first_N - second_N
    if len(differences) < 2:
        return float(differences.mean()), math.nan
    return float(differences.mean()), float(differences.std(ddof=1) / math.sqrt(len(differences)))
