"""The README's table of quality by depth, from the study's result files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from benchmarks.report import table
from benchmarks.study.report_data import (
    FASHION_FD,
    FULL,
    LOSS,
    Metric,
    Run,
    Study,
    mean_and_error,
)
from benchmarks.study.report_tables import estimate, joined_seeds
from benchmarks.study.settings import load_study
from variant.engine.planning import plan_row
from variant.models.config import VARConfig

DEPTHS = {FULL: None, "d4": 4, "d2": 2}


def quality(study: Study, config: VARConfig, bridge: int) -> str:
    """The table, with a sentence above it; "" if no run was measured at every depth.

    Args:
        config, bridge: of the runs, for the K/V bytes of the plan.
    """
    chosen = best_supernet(study)
    if chosen is None:
        return ""
    runs = list(chosen.values())
    name = runs[0].name
    joined = joined_seeds(study.parts[runs[0].part])
    # Of one machine: times and the floor.
    first = [run for run in runs if run.seed not in joined] or runs
    floor = first[0].data["generated"][FULL]["floor"]
    count = runs[0].data["generated"][FULL]["n"]
    rows = []
    for schedule, depth in DEPTHS.items():
        cells = [run.data["generated"][schedule] for run in first]
        seconds = mean_and_error(cell["seconds"] / cell["n"] for cell in cells)[0]
        kv = plan_row(config, depth or config.depth, bridge, 1, torch.float32).ours
        rows.append([
            str(depth or config.depth),
            *(_estimate(metric, runs, schedule) for metric in (LOSS, FASHION_FD)),
            f"{1000 * seconds:.1f} ms",
            f"{kv / 1024:.0f} KiB",
        ])  # fmt: skip
    seeds = f"mean of {len(runs)} seeds ± standard error" if len(runs) > 1 else "one seed"
    others = len(runs) - len(first)
    seeds += f" ({others} of another VQ-VAE)" if others else ""
    lead = (
        f"Quality by depth on Fashion-MNIST: the miniature `{name}` of the [study](docs/study.md), "
        f"{seeds}. fashion-FD is a Fréchet distance of {count:,} images in the features of a "
        "classifier, no FID; two halves of the real images are at "
        f"{estimate(FASHION_FD, [floor])}. CPU time of one thread with decoder and classifiers."
    )
    columns = ["depth", "held-out loss", "fashion-FD", "time per image", "K/V per image"]
    return "\n".join([lead, "", *table(columns, rows)]).strip()


def _estimate(metric: Metric, runs: Iterable[Run], schedule: str) -> str:
    """Of these runs alone: a seed whose images are not measured yet has losses already."""
    values = (run.value(metric, schedule) for run in runs)
    return estimate(metric, [value for value in values if value is not None])


def best_supernet(study: Study) -> dict[int, Run] | None:
    """By seed, the trained run of one set of weights for all depths with the lowest mean loss.

    Only runs count that trained every depth, and whose images were measured at every depth. They
    are compared by the seeds that all of them have, where there are such.
    """
    found: list[dict[int, Run]] = []
    for part in study.parts.values():
        for name in part.names:
            runs = {s: run for s, run in study.runs(name, part.name).items() if _is_whole(run)}
            found += [runs] if runs else []
    if not found:
        return None
    shared = set.intersection(*map(set, found))

    def mean_loss(runs: dict[int, Run]) -> float:
        counted = [run for seed, run in runs.items() if seed in shared or not shared]
        losses = [run.value(LOSS, schedule) for run in counted for schedule in DEPTHS]
        return mean_and_error(loss for loss in losses if loss is not None)[0]

    return min(found, key=mean_loss)


def _is_whole(run: Run) -> bool:
    generated = run.data.get("generated") or {}
    depths = run.data.get("settings", {}).get("schedule", {}).get("depths", ())
    return (
        {4, 2} <= set(depths)
        and set(DEPTHS) <= set(run.schedules)
        and all(
            key in generated.get(schedule, {})
            for schedule in DEPTHS
            for key in ("n", "seconds", "floor", "fashion_fd")
        )
    )


def quality_of_settings(study: Study) -> str:
    """:func:`quality` with the sizes of the study's settings."""
    depths: Mapping[str, object] = {"schedule": {"depths": [4, 2]}}
    recipe = load_study().recipe_of(depths)
    return quality(study, recipe.var_config, recipe.schedule.bridge)
