"""Quantiles of Student's t."""

import numpy as np
import pytest

from variant.evaluation.intervals import MANY, student_quantile, student_within

# Degrees of freedom; quantiles for 5 % and for an eighth of that; the share within two errors:
# scipy.stats.t of scipy 1.17.
TABLE = [
    (1, 12.70620474, 101.85589107, 0.7048327647),
    (2, 4.30265273, 12.58974056, 0.8164965809),
    (3, 3.18244631, 6.89523052, 0.8606740314),
    (9, 2.26215716, 3.5465085, 0.9234471762),
    (100, 1.98397152, 2.79347824, 0.9517878213),
    (MANY, 1.97189622, 2.76363059, 0.9531468138),
    (MANY + 1, 1.97183651, 2.76348357, 0.9531535601),
    (4999, 1.96043865, 2.73552841, 0.9544457292),
]


@pytest.mark.parametrize(("freedom", "quantile", "rare", "within"), TABLE)
def test_quantiles_are_those_of_students_t(freedom, quantile, rare, within):
    assert student_quantile(freedom) == pytest.approx(quantile, rel=2e-6)
    assert student_quantile(freedom, 0.05 / 8) == pytest.approx(rare, rel=2e-6)
    assert student_within(2.0, freedom) == pytest.approx(within, abs=1e-10)


def test_an_interval_of_few_numbers_covers_what_it_says():
    numbers_RN = np.random.default_rng(0).normal(size=(20_000, 10))
    errors_R = numbers_RN.std(axis=1, ddof=1) / 10**0.5
    inside = np.abs(numbers_RN.mean(1)) < student_quantile(9) * errors_R
    assert inside.mean() == pytest.approx(0.95, abs=0.005)  # 0.918 with 1.96


def test_one_number_has_no_interval():
    with pytest.raises(ValueError, match="student_quantile: freedom must be"):
        student_quantile(0)
