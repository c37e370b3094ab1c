"""Intervals of means whose error is itself estimated: quantiles of Student's t.

1.96 standard errors are a 95 % interval where the error is known. Estimated from ten numbers, they
cover 92 %, and from two 70 %.
"""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist

from variant_kernels.arguments import integer

# Degrees of freedom above which three terms of the series in 1 / freedom are exact to 1e-6
# (Abramowitz and Stegun, 26.7.5).
MANY = 200


def student_within(errors: float, freedom: int) -> float:
    """P(abs(mean) < errors x its estimated standard error), for normal numbers of mean zero.

    Student's t in closed form (Abramowitz and Stegun, 26.7.3-4).

    Args:
        freedom: degrees of freedom: one less than the numbers.
    Raises:
        TypeError, ValueError: no freedom.
    """
    freedom = integer("student_within", "freedom", freedom, 1)
    angle = math.atan(errors / math.sqrt(freedom))
    term = math.sin(angle) * (math.cos(angle) if freedom % 2 else 1.0)
    total = 0.0
    for power in range(2 + freedom % 2, freedom + 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (power - 1) / power
    return (angle + total) * 2 / math.pi if freedom % 2 else total


@lru_cache
def student_quantile(freedom: int, chance: float = 0.05) -> float:
    """The estimated standard errors that a mean is off by with this chance, to either side.

    Args:
        freedom: as of :func:`student_within`.  chance: 0.05 gives a 95 % interval.
    Raises:
        TypeError, ValueError: no freedom.
    """
    if integer("student_quantile", "freedom", freedom, 1) > MANY:
        z = NormalDist().inv_cdf(1 - chance / 2)
        first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
        return z + first / freedom + second / freedom**2
    low, high = 0.0, 2.0
    while 1 - student_within(high, freedom) > chance:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        is_rare = 1 - student_within(middle, freedom) <= chance
        low, high = (low, middle) if is_rare else (middle, high)
    return high
