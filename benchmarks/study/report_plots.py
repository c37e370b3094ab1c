"""The plots of the study's page. Each picture carries the digest of the numbers that it shows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

from benchmarks.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY, STYLE, panels
from benchmarks.study.report_claims import D2, EARLY, FIXED, LATE, PROGRESSIVE
from benchmarks.study.report_data import FULL, LOSS, Run, Study, mean_and_error

DIGEST = "Description"  # the text chunk of the PNG file
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, RED, GREY)
Data = dict[str, Any]


def plane_data(study: Study) -> Data:
    """Full loss and d2 loss of every run of the ratios: mean and standard error over seeds."""
    part = study.parts.get("ratios")
    points = {}
    for name in part.names if part else ():
        axes = [study.values(LOSS, name, schedule, "ratios").values() for schedule in (FULL, D2)]
        if all(axes):
            points[name] = [mean_and_error(values) for values in axes]
    return points


def curves_data(study: Study) -> Data:
    """Losses during training, by run and schedule: share of the steps, and mean over seeds.

    Runs of equal work have different numbers of steps, and so may seeds: points are joined by their
    rank. A run whose seeds have different numbers of points is left out.
    """
    part = study.parts.get("ratios")
    curves: Data = {}
    for name in part.names if part else ():
        runs = study.runs(name, "ratios").values()
        for schedule in (FULL, D2):
            by_seed = [_curve(run, schedule) for run in runs]
            if len({len(curve) for curve in by_seed}) == 1 and by_seed[0]:
                curves.setdefault(name, {})[schedule] = [
                    [mean_and_error(column)[0] for column in zip(*points, strict=True)]
                    for points in zip(*by_seed, strict=True)
                ]
    return curves


def _curve(run: Run, schedule: str) -> list[tuple[float, float]]:
    """(Share of the steps, loss) of the points that have the schedule."""
    points = run.data.get("curve") or ()
    last = run.data.get("steps") or max((step for step, _ in points), default=1)
    losses = ((step / last, losses.get(schedule)) for step, losses in points)
    return [(share, loss) for share, loss in losses if loss is not None]


def early_late_data(study: Study) -> Data:
    """Loss by fixed probability, early and late: mean and standard error over seeds."""
    found: Data = {}
    for name in ("p0", *FIXED):
        runs = study.runs(name, "ratios").values()
        for schedule in (FULL, D2):
            for moment in (EARLY, LATE):
                values = [run.value(LOSS, schedule, moment) for run in runs]
                if values and None not in values:
                    key = f"{schedule} {moment}"
                    found.setdefault(key, {})[name] = mean_and_error(values)
    return found


def plane(points: Data) -> Figure:
    """Figure 2a: the closer to the lower left corner, the better at both depths."""
    figure, (axis,) = panels(1, "Full network against subnet", height=4.4)
    fixed = [name for name in ("p0", *FIXED) if name in points]
    axis.plot(
        [points[name][0][0] for name in fixed],
        [points[name][1][0] for name in fixed],
        color=GREY, lw=1, ls="--",
        label="fixed probabilities",
    )  # fmt: skip
    for name, ((full, full_error), (subnet, subnet_error)) in points.items():
        colour = BLUE if name in fixed else RED if name == PROGRESSIVE else ORANGE
        errors = [None if e is None else 2 * e for e in (full_error, subnet_error)]
        marker, size = ("*", 11) if name == PROGRESSIVE else ("o", 5)
        axis.errorbar(full, subnet, xerr=errors[0], yerr=errors[1], color=colour, capsize=3, lw=1,
                      marker=marker, ms=size)  # fmt: skip
        axis.annotate(name, (full, subnet), xytext=(6, 5), textcoords="offset points", fontsize=9)
    axis.set(xlabel="held-out loss, full network", ylabel="held-out loss, depth 2")
    axis.margins(0.12)
    axis.legend(fontsize=8)
    return figure


def curves(data: Data) -> Figure:
    """Figure 2b: held-out loss during training."""
    figure, axes = panels(2, "Held-out loss during training", width=5.2, height=4.0)
    for axis, schedule in zip(axes, (FULL, D2), strict=True):
        for index, (name, by_schedule) in enumerate(data.items()):
            if schedule in by_schedule:
                steps, losses = zip(*by_schedule[schedule], strict=True)
                axis.plot(steps, losses, color=COLOURS[index % len(COLOURS)], lw=1.3, label=name,
                          ls="-" if index < len(COLOURS) else "--")  # fmt: skip
        axis.set(xlabel="share of the steps", ylabel="held-out loss")
        axis.set_title("full network" if schedule == FULL else "depth 2")
    axes[0].legend(fontsize=7)
    return figure


def early_late(data: Data) -> Figure:
    """Figure 2c: the fixed probabilities early and late."""
    figure, axes = panels(len(data), "Fixed probabilities, early and late", height=3.2)
    for axis, (key, by_run) in zip(axes, data.items(), strict=True):
        names = list(by_run)
        means = [by_run[name][0] for name in names]
        errors = [2 * (by_run[name][1] or 0) for name in names]
        schedule, moment = key.split()
        axis.errorbar(
            range(len(names)), means, yerr=errors, marker="o", color=BLUE, capsize=3, lw=1
        )
        axis.set_xticks(range(len(names)), names)
        axis.set(ylabel="held-out loss")
        whom = "full network" if schedule == FULL else "depth 2"
        axis.set_title(f"{whom}, after {float(moment):.0%} of the steps")
    return figure


# Name of the picture's file, caption, what it shows, and how it is drawn.
PLOTS: tuple[tuple[str, str, Callable[[Study], Data], Callable[[Data], Figure]], ...] = (
    ("study-plane.png", "Full loss against the loss of depth 2, with two standard errors",
     plane_data, plane),
    ("study-curves.png", "Held-out loss during training, mean over seeds", curves_data, curves),
    ("study-early-late.png", "Fixed probabilities early and late, with two standard errors",
     early_late_data, early_late),
)  # fmt: skip


def pictures(study: Study) -> dict[str, str]:
    """Name and caption of the pictures for which there are numbers."""
    return {name: caption for name, caption, data, _ in PLOTS if data(study)}


def digest(data: Data) -> str:
    """A digest of the numbers that a picture shows."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def draw_all(study: Study, folder: Path) -> None:
    """Draw every picture for which there are numbers into ``folder``; remove the others."""
    for name, _, read, draw in PLOTS:
        data = read(study)
        if not data:
            (folder / name).unlink(missing_ok=True)
        elif not is_current(study, folder / name):
            with plt.rc_context(STYLE):
                figure = draw(data)
                figure.savefig(folder / name, metadata={DIGEST: digest(data)})
                plt.close(figure)


def is_current(study: Study, path: Path) -> bool:
    """Whether the picture exists and shows the numbers of ``study``."""
    read = next(read for name, _, read, _ in PLOTS if name == path.name)
    if not path.is_file():
        return False
    with Image.open(path) as picture:
        return picture.info.get(DIGEST) == digest(read(study))
