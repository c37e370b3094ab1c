"""The model's constants from a run on a GPU."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from benchmarks.prediction.constants import Constants
from benchmarks.prediction.generation import generation
from benchmarks.prediction.times import (
    FLASH,
    FLEX,
    TORCH_CALLS,
    TRITON,
    Times,
    measured,
    predicted,
    predicted_attention,
)

# The share that each of these times is divided by: its name begins and ends so.
SHARES = (
    ("sampling_share", "sampling", TRITON),
    ("torch_calls_share", "sampling", TORCH_CALLS),
    ("flex_share", "attention", FLEX),
    ("flash_share", "attention", FLASH),
    ("original_share", "original", ""),
    ("original_training_share", "training original", ""),
    ("training_share", "training", ""),
)


def fit(c: Constants, run: Mapping[str, Any], source: str) -> Constants:
    """The constants that a run determines, the others unchanged.

    The rates are the run's own; ``overlap`` and ``program_cycles`` have the least squared error of
    the logarithms of the attention cases; then follow the generations, and last the shares, each
    the mean of its cases.
    """
    limits = run.get("limits", {}).get("start")
    if limits is not None:
        c = replace(c, matrix_flops=limits["gemm"]["bfloat16"], copy_bytes=limits["copy"])
    times = measured(run)
    c = _fit_attention(c, times)
    # A generation holds sampling, so that its share comes first.
    c = _fit_shares(c, times, SHARES[:1])
    c = _fit_generations(c, times)
    return replace(_fit_shares(c, times, SHARES), source=source)


def _fit_attention(c: Constants, times: Times) -> Constants:
    names = predicted_attention(c).keys() & times.keys()
    if not names:
        return c

    def error(trial: Constants) -> float:
        own = predicted_attention(trial)
        return sum(math.log(own[name] / times[name]) ** 2 for name in names)

    # With one case only one constant can be determined.
    several = len(names) > 1
    cycles = [500 * n for n in range(9)] if several else [c.program_cycles]
    c = min(_trials(c, [0.1 * n for n in range(5, 16)], cycles), key=error)
    cycles = [c.program_cycles + 125 * n for n in range(-3, 4)] if several else cycles
    return min(_trials(c, [c.overlap + 0.01 * n for n in range(-9, 10)], cycles), key=error)


def _trials(c: Constants, overlaps: Iterable[float], cycles: Iterable[float]) -> list[Constants]:
    return [
        replace(c, overlap=round(overlap, 3), program_cycles=max(0.0, float(one)))
        for overlap in overlaps
        for one in cycles
    ]


def _fit_generations(c: Constants, times: Times) -> Constants:
    if "generation 64 30" in times:
        gemms = times["gemms 64 30"]
        c = replace(c, matrix_flops=c.matrix_flops * generation(c, 64, 30).gemms / gemms)
        part = generation(c, 64, 30)
        # Sampling is among the rows, and hardly moves with their share.
        left = times["generation 64 30"] - part.gemms - part.attention - part.rest
        for _ in range(8):
            rows = generation(c, 64, 30).rows
            if left > 0:
                c = replace(c, row_share=c.row_share * rows / left)
    if "generation 1 30" in times:
        gemms, tokens = times["gemms 1 30"], times["generation 1 30"]
        # Not all kernels are bound by what is fitted, so that one step is not enough.
        for _ in range(8):
            c = replace(c, gemm_share=c.gemm_share * generation(c, 1, 30).gemms / gemms)
            part = generation(c, 1, 30)
            left = tokens - part.gemms - part.attention - part.rest
            if left > 0:
                c = replace(c, row_seconds=c.row_seconds * left / part.rows)
    for batch in (64, 1):
        if f"images {batch} 30" in times and f"generation {batch} 30" in times:
            decoder = times[f"images {batch} 30"] - times[f"generation {batch} 30"]
            if batch == 64:
                one = (decoder - c.decoder_seconds) / batch
                c = replace(c, decoder_image_seconds=max(one, 0.0))
            else:
                left = max(decoder - c.decoder_image_seconds, 0.0)
                c = replace(c, decoder_seconds=left)
    return c


def _fit_shares(c: Constants, times: Times, shares: Iterable[tuple[str, str, str]]) -> Constants:
    own = predicted(c)
    done: set[str] = set()
    for share, beginning, end in shares:
        names = [
            name
            for name in own.keys() & times.keys() - done
            if name.startswith(beginning) and name.endswith(end)
        ]
        done |= set(names)
        if names:
            mean = sum(math.log(own[name] / times[name]) for name in names) / len(names)
            c = replace(c, **{share: getattr(c, share) * math.exp(mean)})
    return c
