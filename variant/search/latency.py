"""The measured time of every scale at every depth, from which the time of any schedule is a sum.

A layer that runs reads K and V of all earlier scales, in which it ran too: the time of a scale
depends on its own layers alone. So one generation of each depth, the same at all scales, gives the
times of all schedules.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from variant.engine.engine import Engine
from variant.errors import UserError
from variant.paths import read_json, shown
from variant.search.space import Layers
from variant_kernels import DepthSchedule

FORMAT = "variant-latency-1"
CFG = 1.5


def measure_seconds(
    engine: Engine,
    sets: Sequence[Layers],
    *,
    batch: int = 1,
    repeats: int = 5,
    report: Callable[[], None] = lambda: None,
) -> dict[int, list[float]]:
    """depth -> seconds of each scale, medians; without the decoder, and without CUDA graphs.

    Args:
        sets: one list of layers for each depth.
        batch: images at once; with guidance, two sequences each.
        repeats: rounds; each runs every depth once, so that a slow moment does not meet one alone.
        report: called before each generation.
    """
    scales = engine.var.layout.num_scales
    schedules = {
        len(layers): DepthSchedule.from_depths(
            [layers] * scales, full_depth=engine.var.config.depth
        )
        for layers in sets
    }
    times: dict[int, list[list[float]]] = {depth: [] for depth in schedules}
    for turn in range(repeats + 1):
        for depth, schedule in schedules.items():
            report()
            marks = _marks(engine, schedule, batch)
            if turn:  # the first round loads kernels and casts weights
                times[depth].append(marks)
    return {
        depth: [statistics.median(column) for column in zip(*rounds, strict=True)]
        for depth, rounds in times.items()
    }


def measure_beside_full(
    engine: Engine, schedule: DepthSchedule, *, batch: int = 1, repeats: int = 5
) -> tuple[float, float]:
    """Seconds of a schedule and of the full network, taken in turn as :func:`measure_seconds` does.

    Returns:
        medians of ``repeats`` generations, each summed over the scales.
    """
    full = DepthSchedule.full(engine.var.config.depth, engine.var.layout.num_scales)
    pairs = [
        (sum(_marks(engine, schedule, batch)), sum(_marks(engine, full, batch)))
        for _ in range(repeats + 1)
    ]
    own, of_full = zip(*pairs[1:], strict=True)  # the first round loads kernels and casts weights
    return statistics.median(own), statistics.median(of_full)


def _marks(engine: Engine, schedule: DepthSchedule, batch: int) -> list[float]:
    """Seconds of each scale of one generation."""
    ends: list[float] = []

    def on_scale(scale: int, partial: object) -> None:
        if engine.device.type == "cuda":
            torch.cuda.synchronize(engine.device)
        ends.append(time.perf_counter())

    started = time.perf_counter()
    engine.generate(
        [0] * batch,
        depth=schedule,
        seed=0,
        cfg=CFG,
        decode=False,
        on_scale=on_scale,
        max_batch=batch,  # in several parts, the times would be those of the first one
    )
    return [end - start for start, end in zip([started, *ends], ends, strict=False)]


def read_seconds(
    path: Path, settings: Mapping[str, Any], scales: int
) -> dict[int, list[float]] | None:
    """The table in a file; None if it was measured with other settings.

    Raises:
        UserError: no JSON of such a table.
    """
    values = read_json(path)
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise UserError(f'{shown(path)}: its "format" must be "{FORMAT}"; delete it')
    if any(values.get(key) != value for key, value in settings.items()):
        return None
    try:
        table = {int(depth): [float(x) for x in row] for depth, row in values["seconds"].items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{shown(path)}: its table cannot be read: {error!s:.100}") from None
    if not all(len(row) == scales and all(0 < x < 1e9 for x in row) for row in table.values()):
        raise UserError(
            f"{shown(path)}: its table must have {scales} seconds above 0 for each depth; delete it"
        )
    return table
