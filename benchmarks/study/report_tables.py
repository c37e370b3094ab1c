"""Markdown tables of the study's page: our runs, and the paper's tables beside them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.report import table
from benchmarks.study.report_data import (
    ACCURACY,
    FASHION_FD,
    FULL,
    LOSS,
    LOSS_PER_TOKEN,
    METRICS,
    Metric,
    Part,
    Run,
    Study,
    mean_and_error,
)

# Kinds of schedules in the part "search", by their names in its file.
SEARCH_KINDS = {"searched": "searched", "grid": "depth and bridge", "even": "even or trained"}
ALL_METRICS = (*METRICS, LOSS_PER_TOKEN)
PAPER = json.loads((Path(__file__).parent / "paper_tables.json").read_text())
# The names of our tables, as the page's text uses them, and what a table of that name holds.
LOSSES = "Losses"
DIFFERENCES = "Differences of losses"
BY_SCALE = "Losses by scale"
PER_TOKEN = "Losses per layer-token"
GENERATED = "Generated images"
GRADIENTS = "Gradient norms"
SEARCHED = "Searched schedules"
CONTROLLED = "Metrics against the control"
VERDICTS = "Verdicts"
TABLES: Mapping[str, str] = {
    LOSSES: "held-out loss of each run at each schedule, in nats per token. `work`: of its "
    "training, in optimizer steps of the full network. `seconds`: of its training.",
    DIFFERENCES: "loss of a run minus that of the run in the column `against`, paired by seed. The "
    "last column is the standard error over the held-out images of one seed, the largest of the "
    "seeds.",
    BY_SCALE: "loss of the tokens of one scale minus that of the same run at full depth, mean over "
    "seeds.",
    PER_TOKEN: "loss above that of full depth, and the same over the layer-tokens that the "
    "schedule saves: the tokens of an image times the layers that each of them runs through.",
    GENERATED: "metrics of generated images.",
    GRADIENTS: "norm of the gradient of one layer in the steps that train the subnet: of the "
    "layers that the subnet shares, and of those that only the full network has (root mean square "
    "over the layers, mean over the steps).",
    SEARCHED: "losses of the best schedule of each kind within a budget, and its depths by scale.",
    CONTROLLED: "which metrics find the broken run worse.",
    VERDICTS: "what the numbers say about each claim.",
}


def named(name: str, lines: list[str]) -> list[str]:
    """A table with its name above it; nothing if there is no table.

    Raises:
        ValueError: the page does not explain tables of that name.
    """
    if name not in TABLES:
        raise ValueError(f"named: name must be one of {', '.join(TABLES)}; got {name!r}")
    return [f"**{name}**", "", *lines] if lines else []


def explained() -> list[str]:
    """A table of the names of the page's tables."""
    return table(["table", "what it holds"], [[f"*{name}*", text] for name, text in TABLES.items()])


def is_frozen(run: Run) -> bool:
    """Whether training left the full network as it was: subnets trained weights of their own."""
    schedule = (run.data.get("settings") or {}).get("schedule") or {}
    return schedule.get("zone_weights", "shared") != "shared"


def label(name: str, runs: Iterable[Run]) -> str:
    """The name of a run in a table, which says so where its full network was frozen."""
    return f"`{name}`" + (" (full network frozen)" if any(map(is_frozen, runs)) else "")


def estimate(metric: Metric, values: Iterable[float], seeds: int | None = None) -> str:
    """Mean ± standard error over seeds; of one seed the value alone.

    Args:
        seeds: of the row, which a number of fewer seeds does not share.
    """
    values = list(values)
    if not values:
        return "-"
    mean, error = mean_and_error(values)
    fewer = seeds is not None and len(values) < seeds
    few = f" ({len(values)} seed{'s' * (len(values) > 1)})" if fewer else ""
    return metric.text(mean) + ("" if error is None else f" ± {metric.text(error)}") + few


def schedules_of(part: Part) -> list[str]:
    """Every schedule of the part's runs, in the order in which they first come."""
    return list(dict.fromkeys(name for run in part.runs for name in run.schedules))


def losses(study: Study, part: Part) -> list[str]:
    """Held-out loss of every run at every schedule, with work and time of the training."""
    schedules = schedules_of(part)
    rows = []
    for name in part.names:
        runs = study.runs(name, part.name)
        rows.append([
            label(name, runs.values()),
            str(len(runs)),
            _common(runs.values(), "work", ".2f"),
            _common(runs.values(), "seconds", ",.0f"),
            *(
                estimate(LOSS, study.values(LOSS, name, s, part.name).values(), len(runs))
                for s in schedules
            ),
        ])  # fmt: skip
    return named(LOSSES, table(["run", "seeds", "work", "seconds", *schedules], rows))


def _common(runs: Iterable[Any], key: str, form: str) -> str:
    """The mean of a number that every run carries; "-" if none does."""
    values = [run.data[key] for run in runs if run.data.get(key) is not None]
    return format(mean_and_error(values)[0], form) if values else "-"


def differences(study: Study, part: Part) -> list[str]:
    """Paired differences of losses: standard error over seeds, and over the images of a seed."""
    rows = []
    for pair in part.data.get("pairs") or ():
        mean, error = mean_and_error(pair["by_seed"])
        images = [value for value in pair.get("se_by_seed") or () if value is not None]
        run, against = (
            label(pair[which], study.runs(pair[which], part.name).values())
            for which in ("run", "against")
        )
        rows.append([
            run, against, pair["schedule"], str(len(pair["by_seed"])),
            f"{mean:+.4f}" + ("" if error is None else f" ± {error:.4f}"),
            f"{max(images):.4f}" if images else "-",
        ])  # fmt: skip
    columns = ["run", "against", "schedule", "seeds", "difference of loss",
               "error over images, largest"]  # fmt: skip
    return named(DIFFERENCES, table(columns, rows)) if rows else []


def searched(study: Study, part: Part) -> list[str]:
    """The best schedule of each kind within each budget: its loss, and its depths by scale."""
    rows = []
    for name in part.names:
        runs = study.runs(name, part.name)
        first = next(iter(runs.values())).data.get("schedules") or {}
        keys = dict.fromkeys(key for run in runs.values() for key in run.schedules)
        budgets = dict.fromkeys(key.partition(" ")[2] for key in keys)
        for budget in budgets:
            found = {
                kind: study.values(LOSS, name, f"{kind} {budget}", part.name)
                for kind in SEARCH_KINDS
            }
            seeds = max(map(len, found.values()))
            rows.append([
                f"`{name}`", budget, str(seeds),
                *(estimate(LOSS, values.values(), seeds) for values in found.values()),
                *(first.get(f"{kind} {budget}", "-") for kind in SEARCH_KINDS),
            ])  # fmt: skip
    columns = ["run", "budget", "seeds", *(f"loss, {kind}" for kind in SEARCH_KINDS.values())]
    columns += [f"depths, {kind}" for kind in SEARCH_KINDS.values()]
    return named(SEARCHED, table(columns, rows))


def losses_by_scale(study: Study, part: Part) -> list[str]:
    """Held-out loss of every scale: mean over seeds, of the differences from the full depth."""
    rows, scales = [], 0
    for name in part.names:
        runs = study.runs(name, part.name)
        for schedule in schedules_of(part):
            by_seed = [
                (run.data["losses"][schedule]["by_scale"], run.data["losses"][FULL]["by_scale"])
                for run in runs.values()
                if schedule != FULL and {schedule, FULL} <= set(run.schedules)
                and "by_scale" in run.data["losses"][schedule]
            ]  # fmt: skip
            if by_seed:
                scales = max(scales, len(by_seed[0][0]))
                means = [
                    mean_and_error(here[scale] - full[scale] for here, full in by_seed)[0]
                    for scale in range(len(by_seed[0][0]))
                ]
                rows.append([
                    f"`{name}`", schedule, str(len(by_seed)), *(f"{mean:+.3f}" for mean in means),
                ])  # fmt: skip
    columns = ["run", "schedule", "seeds", *(f"scale {n}" for n in range(scales))]
    return named(BY_SCALE, table(columns, rows)) if rows else []


def losses_per_layer_token(study: Study, part: Part) -> list[str]:
    """What a skipped layer of a token costs: loss above the full depth, over what is saved."""
    rows = []
    for name in part.names:
        for schedule in schedules_of(part):
            costs = study.values(LOSS_PER_TOKEN, name, schedule, part.name)
            if costs:
                runs = study.runs(name, part.name)
                here = [runs[s].value(LOSS, schedule) - runs[s].value(LOSS, FULL) for s in costs]
                tokens = next(iter(runs.values())).data["layer_tokens"]
                rows.append([
                    f"`{name}`", schedule, str(len(costs)),
                    f"{tokens[FULL] - tokens[schedule]:,}",
                    estimate(LOSS, here), estimate(LOSS_PER_TOKEN, costs.values()),
                ])  # fmt: skip
    if not rows:
        return []
    columns = [
        "run",
        "schedule",
        "seeds",
        "layer-tokens saved",
        "loss above full",
        "per layer-token saved",
    ]
    return named(PER_TOKEN, table(columns, rows))


def generated(study: Study, part: Part) -> list[str]:
    """Metrics of generated images, the floor of the distance beside it."""
    rows = []
    for name in part.names:
        runs = study.runs(name, part.name)
        for schedule in dict.fromkeys(s for run in runs.values() for s in _generated(run)):
            cells = [
                _generated(run)[schedule] for run in runs.values() if schedule in _generated(run)
            ]
            floors = [cell["floor"] for cell in cells if cell.get("floor") is not None]
            found = (study.values(metric, name, schedule, part.name) for metric in METRICS[1:])
            values = [
                estimate(metric, by_seed.values(), len(cells))
                for metric, by_seed in zip(METRICS[1:], found, strict=True)
            ]
            counts = sorted({cell["n"] for cell in cells if "n" in cell})
            rows.append([
                label(name, runs.values()), schedule, str(len(cells)),
                ", ".join(f"{n:,}" for n in counts), values[0], estimate(FASHION_FD, set(floors)),
                *values[1:],
            ])  # fmt: skip
    if not rows:
        return []
    columns = ["run", "schedule", "seeds", "images", "fashion-FD", "floor",
               *(metric.name for metric in METRICS[2:])]  # fmt: skip
    return named(GENERATED, table(columns, rows))


def _generated(run: Any) -> Mapping[str, Any]:
    return run.data.get("generated") or {}


def gradient_norms(study: Study, part: Part) -> list[str]:
    """Gradient norms of the layers that the subnet has and of those that it skips."""
    rows = []
    for name in part.names:
        norms = [
            run.data["gradient_norms"]
            for run in study.runs(name, part.name).values()
            if run.data.get("gradient_norms")
        ]
        if norms:
            cells = [
                estimate(LOSS, [norm[key] for norm in norms]) for key in ("shared", "full_only")
            ]
            rows.append([f"`{name}`", str(len(norms)), *cells])
    columns = ["run", "seeds", "shared layers", "full-only layers"]
    return named(GRADIENTS, table(columns, rows)) if rows else []


def paper(name: str) -> list[str]:
    """A table of the paper with its source."""
    found = PAPER["tables"][name]
    lead = f"The paper's {found['source']}: {found['caption']}."
    return [lead, "", *table(found["columns"], found["rows"])]


def setting(study: Study) -> list[str]:
    """The data, the model and the judges of generated images, from the first file that has them."""
    joined = {
        f"{name}, seed {seed}": _scores(about["data"].get(key) or {})
        for seed, about in _all_joined(study).items()
        for name, key in (("floor", "floor"), ("reconstruction floor", "reconstruction_floor"))
    }
    data = next((part.data["data"] for part in study.parts.values() if part.data.get("data")), {})
    judges = data.get("classifier_accuracy") or {}
    sampling = data.get("sampling") or {}
    facts = {
        "data": data.get("dataset") or data.get("kind"),
        "held-out images": data.get("held_out"),
        "layers and width of the transformer": _list([data.get("depth"), data.get("width")]),
        "sides of the scales": _list(data.get("patch_nums") or []),
        "generated images of a schedule": data.get("generated"),
        "sampling": _list([f"{key} {value}" for key, value in sampling.items()]),
        "floor (two halves of the real images)": _scores(data.get("floor") or {}),
        "reconstruction floor (a half encoded and decoded, against the other)": _scores(
            data.get("reconstruction_floor") or {}),
        **joined,
        "held-out accuracy of the two classifiers": _list(
            [f"{name} {ACCURACY.text(value)}" for name, value in judges.items() if value]),
    }  # fmt: skip
    rows = [
        [name, f"{value:,}" if isinstance(value, int) else value]
        for name, value in facts.items()
        if value
    ]
    return table(["setting", "value"], rows) if rows else []


def _all_joined(study: Study) -> dict[str, Any]:
    """By seed, what the parts say of a seed that joined: the same in each part."""
    found: dict[str, Any] = {}
    for part in study.parts.values():
        found |= part.data.get("joined") or {}
    return found


def _scores(row: Mapping[str, Any]) -> str:
    return _list(
        metric.name + " " + metric.text(row[metric.key])
        for metric in METRICS[1:]
        if row.get(metric.key) is not None
    )


def _list(values: Iterable[Any]) -> str:
    return ", ".join(str(value) for value in values if value is not None)


def joined_seeds(part: Part) -> dict[int, str]:
    """Machine and versions of each seed whose VQ-VAE and classifiers are its own."""
    return {
        int(seed): f"{about['machine']}, {_versions(about)}"
        for seed, about in (part.data.get("joined") or {}).items()
    }


def _versions(data: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in (data.get("versions") or {}).items())


def commands(part: Part) -> list[str]:
    """Where the part's numbers were measured, and by which command."""
    data = part.data
    joined = joined_seeds(part)
    seeds = sorted({run.seed for run in part.runs} - joined.keys())
    commits = sorted({str(run.data["commit"])[:12] for run in part.runs if run.data.get("commit")})
    parts = [
        "seed" + "s" * (len(seeds) > 1) + " " + ", ".join(map(str, seeds)),
        str(data.get("machine") or ""),
        _versions(data),
        *(f"Seed {seed} with a VQ-VAE of its own: {made}" for seed, made in joined.items()),
        "commit " + ", ".join(commits) if commits else "",
    ]
    lines = [". ".join(text for text in parts if text) + "."] if any(parts) else []
    if data.get("command"):
        lines += ["", f"`{data['command']}`"]
    return [*lines, ""] if lines else []
