"""Timing several calls interleaved, so that a slow minute of the machine slows all of them.

A ratio is the median of the ratios of each round, so that it compares times taken close together.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Call = Callable[[], Any]

# A call that takes this long needs no second warm-up.
LONG_SECONDS = 1.0
# Cycles that keep a GPU busy for about 5 ms, and the number of short calls that Python launches
# in that time.
HEAD_START_CYCLES, HEAD_START_CALLS = 10**7, 100


class SelfTimed(float):
    """Seconds that a call measured itself; they replace the time of the call."""


@dataclass
class Samples:
    """Seconds per call by round; calls that are timed in every n-th round only miss some rounds.

    iterations: calls per sample.
    """

    iterations: int = 1
    by_round: dict[int, float] = field(default_factory=dict)

    @property
    def seconds(self) -> list[float]:
        """The samples in the order in which they were taken."""
        return list(self.by_round.values())

    @property
    def median(self) -> float:
        """Seconds per call."""
        return statistics.median(self.by_round.values())

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile of the seconds per call."""
        return quartiles(self.seconds)


def quartiles(values: list[float]) -> tuple[float, float]:
    """First and third quartile; of a single value, the value twice."""
    if len(values) == 1:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


def ratios(slow: Samples, fast: Samples) -> list[float]:
    """The time of ``slow`` divided by that of ``fast``, for every round that timed both."""
    return [
        seconds / fast.by_round[number]
        for number, seconds in slow.by_round.items()
        if number in fast.by_round
    ]


def time_interleaved(
    calls: Mapping[str, Call],
    *,
    rounds: int,
    min_seconds: float = 5e-4,
    every: Callable[[str, float], int] = lambda name, seconds: 1,
    device: str = "cpu",
    on_sample: Callable[[str], None] = lambda name: None,
    launches: bool = True,
) -> dict[str, Samples]:
    """Time each call once per round; the order rotates from round to round.

    Every call first runs once to fill caches and to compile and, unless it is a long one, once more
    to estimate its time.

    Args:
        min_seconds: a sample repeats a call until it lasts about that long.
        every: (name, seconds of one call) -> n: only every n-th round times the call, starting
            with the first.
        device: "cuda" times by events between synchronisations.
        on_sample: called with the name after every sample: rounds + 1 times for a call that every
            round times.
        launches: whether the time of launching work on a GPU from Python counts. False keeps the
            GPU busy while Python fills its queue, as for work that a captured graph will launch.
    """

    def sample(call: Call, iterations: int) -> float:
        return _sample(call, iterations, device, launches)

    samples_of: dict[str, Samples] = {}
    round_step: dict[str, int] = {}
    for name, call in calls.items():
        once = sample(call, 1)
        if once < LONG_SECONDS:
            once = sample(call, 1)
        on_sample(name)
        if once < min_seconds:  # one call gives a rough estimate: refine it with several
            once = sample(call, max(1, int(0.2 * min_seconds / max(once, 1e-7))))
        iterations = max(1, math.ceil(min_seconds / max(once, 1e-7)))
        samples_of[name] = Samples(iterations if launches else min(iterations, HEAD_START_CALLS))
        round_step[name] = max(1, every(name, once))
    names = list(calls)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            if number % round_step[name] == 0:
                samples = samples_of[name]
                samples.by_round[number] = sample(calls[name], samples.iterations)
                on_sample(name)
    return samples_of


def _sample(call: Call, iterations: int, device: str, launches: bool) -> float:
    """Seconds per call over some calls."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        if not launches:
            torch.cuda._sleep(HEAD_START_CYCLES)
        start.record()
        results = [call() for _ in range(iterations)]
        end.record()
        torch.cuda.synchronize()
        spent = start.elapsed_time(end) / 1000
    else:
        begun = time.perf_counter()
        results = [call() for _ in range(iterations)]
        spent = time.perf_counter() - begun
    if isinstance(results[0], SelfTimed):
        spent = sum(results)
    return spent / iterations
