"""The README's table of quality by depth, from the study's result files."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from benchmarks.report import table
from benchmarks.study.report_data import FASHION_FD, FULL, LOSS, Run, Study, mean_and_error
from benchmarks.study.report_tables import estimate
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
    name, part = runs[0].name, runs[0].part
    floors = [run.data["generated"][FULL]["floor"] for run in runs]
    count = runs[0].data["generated"][FULL]["n"]
    rows = []
    for schedule, depth in DEPTHS.items():
        cells = [run.data["generated"][schedule] for run in runs]
        seconds = mean_and_error(cell["seconds"] / cell["n"] for cell in cells)[0]
        kv = plan_row(config, depth or config.depth, bridge, 1, torch.float32).ours
        rows.append([
            str(depth or config.depth),
            estimate(LOSS, study.values(LOSS, name, schedule, part).values()),
            estimate(FASHION_FD, study.values(FASHION_FD, name, schedule, part).values()),
            f"{1000 * seconds:.1f} ms",
            f"{kv / 1024:.0f} KiB",
        ])  # fmt: skip
    seeds = f"mean of {len(runs)} seeds ± standard error" if len(runs) > 1 else "one seed"
    lead = (
        f"Quality by depth on Fashion-MNIST: the miniature `{name}` of the [study](docs/study.md), "
        f"{seeds}. fashion-FD is a Fréchet distance of {count:,} images in the features of a "
        "classifier, no FID; two halves of the real images are at "
        f"{estimate(FASHION_FD, floors[:1])}. CPU time of one thread with the image decoder and "
        "the classifiers."
    )
    columns = ["depth", "held-out loss", "fashion-FD", "time per image", "K/V per image"]
    return "\n".join([lead, "", *table(columns, rows)]).strip()


def best_supernet(study: Study) -> dict[int, Run] | None:
    """By seed, the trained run of one set of weights for all depths with the lowest mean loss.

    Only runs count that trained every depth, and whose images were measured at every depth.
    """
    found: list[tuple[float, dict[int, Run]]] = []
    for part in study.parts.values():
        for name in part.names:
            runs = {s: run for s, run in study.runs(name, part.name).items() if _is_whole(run)}
            losses = [run.value(LOSS, schedule) for run in runs.values() for schedule in DEPTHS]
            if runs:
                found.append((mean_and_error(loss for loss in losses if loss is not None)[0], runs))
    return min(found, key=lambda pair: pair[0])[1] if found else None


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
