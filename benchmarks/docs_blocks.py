"""Parts of the hand-written documentation that hold numbers: each is made from result files.

A document has two marks around such a part; ``benchmarks.docs_results`` writes what stands between.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.report import duration, table
from benchmarks.results import TRAINING, Result
from benchmarks.study.report_claims import SEARCH_BUDGETS, at
from benchmarks.study.report_data import METRICS, Study
from benchmarks.study.report_verdicts import Evidence, Verdict, better, judge, sums_by_seed
from variant.models.presets import VAR_PRESETS, vqvae_of
from variant.search.compare import SAME
from variant.training.memory_plan import fastest, training_rows
from variant_kernels.wording import counted

# The costs of a search's budgets, and the other kinds of schedules, as the guide names them.
COSTS = {"kv": "K/V bytes", "work": "work", "latency": "time"}
# The depths of a grid are those that the model offers, in both records.
OTHERS = {"grid": "depth 8, 4 or 2 and bridge", "even": "evenly chosen or trained layers"}
# The names of these kinds in the record of `variant search`.
RECORDED = {"grid": "depth and bridge", "even": "equidistant or trained layers"}
# The study's runs of a search: the model that they search.
SEARCHED = {
    "search-untrained": "full network, no subnet trained",
    "search-supernet": "supernet of depths 8, 4 and 2",
}
# Files of results with and without an adversary, without what their names share, and what differs.
FILES = "vae-losses-fashion-mnist-{}-epyc-1-thread"
ADVERSARIES = {
    "r1-seed-0": "`fashion-mnist-adversarial`, seed 0",
    "r1-seed-1": "both stages with seed 1",
    "r1-judge-1": "both stages with two threads, seed 0, judge 1",
    "r1-judge-2": "the same run, judge 2",
    "r1-judge-3": "the same run, judge 3",
    "lecam-seed-0": "LeCAM in place of R1, two layers, 250 steps, seed 0",
    "lecam-seed-1": "the same, seed 1",
    "stage": "LeCAM, all parts trained, discriminator's rate 2e-4",
    "stage-again-first-judge": "both stages of that once more, the same judge",
    "stage-again": "the same two runs, another judge",
}
FIRST_STAGE = "vae-losses-fashion-mnist-epyc-2-threads"
EARLIER = FILES.format("step-700")


def with_block(text: str, name: str, body: str) -> str:
    """The text with ``body`` between the two marks of that name.

    Raises:
        ValueError: the text does not hold both marks once.
    """
    begin, end = f"<!-- {name}:begin (make docs-results) -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"with_block: the text must hold {begin} and {end}, each once")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{body}\n{end}{rest.split(end)[1]}"


# --- searches -----------------------------------------------------------------------------------


def search_of_digits(record: Mapping[str, Any]) -> str:
    """What `variant search` found for the shipped model, beside other schedules."""
    machine = record["environment"]
    how = "each evaluated or excluded" if record["exact"] else "by beam"
    rows = []
    for cost, what in COSTS.items():
        for kind, name in RECORDED.items():
            found = [
                row for row in record["comparison"] if (row["cost"], row["with"]) == (cost, name)
            ]
            if found:
                better_by = [
                    row["difference"] for row in found if row["verdict"] == "searched is better"
                ]
                count = {
                    verdict: sum(row["verdict"] == verdict for row in found)
                    for verdict in ("searched is worse", SAME)
                }
                rows.append([
                    what, OTHERS[kind], _of(len(better_by), found),
                    _of(count["searched is worse"], found), _of(count[SAME], found),
                    _range(better_by),
                ])  # fmt: skip
    lead = (
        f"On the shipped model `{record['model']}`: {record['schedules']:,} schedules of "
        f"{len(record['sets'])} sets of layers, {how}; {record['images']} images choose and "
        f"{record['images_compared']} compare (`{COMMAND}`, {record['seconds']:.0f} s with "
        f"{counted(machine['threads'], 'thread')} of {machine['cpu']}, {machine['isa']})."
    )
    return _text(lead, table(["at equal", *COLUMNS], rows))


# What made the record.
COMMAND = "variant search --model digits --budget kv=0.5 --out out/search"
COLUMNS = ("beside", "searched is better", "worse", "the same schedule",
           "nats per token less, where better")  # fmt: skip


def search_of_study(study: Study) -> str:
    """The study's searches, at the budgets that every kind of schedule reaches."""
    rows = []
    for name, model in SEARCHED.items():
        seeds = len(study.runs(name, "search"))
        for cost in ("kv", "work"):
            for kind, other in OTHERS.items():
                found = _differences(study, name, cost, kind)
                better_by = [
                    -one.mean for one in found if one.verdict is Verdict.HOLDS and one.mean
                ]
                worse = sum(one.verdict is Verdict.DOES_NOT_HOLD for one in found)
                same = sum(one.mean == 0 and one.error == 0 for one in found)
                rows.append([
                    f"{model} ({seeds} seeds)", COSTS[cost], other, _of(len(better_by), found),
                    _of(worse, found), _of(same, found), _range(better_by),
                ])  # fmt: skip
    shares = f"{SEARCH_BUDGETS[0]:g} to {SEARCH_BUDGETS[-1]:g}"
    lead = f"On two models of the [study](study.md#{SEARCH_ANCHOR}), at budgets of {shares}:"
    return _text(
        lead,
        [*table(["model", "at equal", *COLUMNS], rows), *_shapes(study)],
    )


def _shapes(study: Study) -> list[str]:
    """How often the best evenly chosen schedule is no more than another depth after a bridge."""
    rows = []
    for name, model in SEARCHED.items():
        for cost in ("kv", "work"):
            names = [
                run.data.get("schedules", {}).get(f"even {cost}={share:g}")
                for run in study.runs(name, "search").values()
                for share in SEARCH_BUDGETS
            ]
            depths = [depth_after_bridge(name) for name in names if name is not None]
            if depths:
                rows.append([
                    model, COSTS[cost], _of(sum(d is not None for d in depths), depths),
                    _of(sum(d not in (None, 8, 4, 2) for d in depths), depths),
                ])  # fmt: skip
    if not rows:
        return []
    columns = ["model", "at equal", "one depth after a bridge", "a depth that is not 8, 4 or 2"]
    lead = "The shape of the best schedule of evenly chosen or trained layers, at each budget and "
    return [lead + "seed:", "", *table(columns, rows)]


def depth_after_bridge(name: str) -> int | None:
    """The depth of a schedule of 8 layers that runs all of them, then one depth; None: another."""
    depths = [int(part.partition("x")[0]) for part in name.split("-")]
    return depths[-1] if len(depths) == 1 or (len(depths) == 2 and depths[0] == 8) else None


SEARCH_ANCHOR = "searched-layers-and-depths"


def _differences(study: Study, name: str, cost: str, kind: str) -> list[Evidence]:
    """Searched minus the other kind at each budget; an error of 0 and a mean of 0: the same."""
    statements = [
        better(at(name, f"searched {cost}={share:g}"), at(name, f"{kind} {cost}={share:g}"))
        for share in SEARCH_BUDGETS
    ]
    return [judge(one, study, METRICS) for one in statements if sums_by_seed(one, study)]


def _of(count: int, found: list[Any]) -> str:
    return f"{count} of {len(found)}"


def _range(values: Iterable[float]) -> str:
    values = sorted(values)
    if not values:
        return "-"
    return " to ".join(dict.fromkeys(f"{value:.3f}" for value in (values[0], values[-1])))


def _text(lead: str, lines: list[str]) -> str:
    return "\n".join([lead, "", *lines]).strip()


# --- training -----------------------------------------------------------------------------------


def training_steps(results: Iterable[Result]) -> str:
    """A step of each committed result on a CPU, beside that of the original code."""
    lines = []
    for result in results:
        if result.kind != TRAINING or result.environment["gpu"]:
            continue
        data, machine = result.data, result.environment
        by_name = {row["implementation"]: row for row in data["steps"]}
        peer = by_name[data["peer"]]
        ours = next(row for row in data["steps"] if row is not peer)  # the full depth comes first
        lines.append(
            f"A {data['dtype']} step of {data['model']} with {data['batch']} images takes "
            f"{duration(ours['median'])}, that of the original code with its dense mask and the "
            f"same weights {duration(peer['median'])}: {ours['ratio_to_peer']:.2f} times as long "
            f"({machine['threads']} threads of an {machine['cpu']}, {machine['isa']})."
        )
    return " ".join(lines)


# --- the plan of training memory ---------------------------------------------------------------


def train_plan() -> str:
    """The memory of a training step of VAR-d30, as `variant plan --train` has it."""
    gpus, batch, gib = 8, 1024, 2**30
    config = VAR_PRESETS["var-d30"]
    rows = training_rows(
        config, vqvae_of(config), gpus=gpus, batch=batch, width=2, memory=PLAN_GIB * gib
    )
    best = fastest(rows, PLAN_GIB * gib)
    cells: dict[str, list[str]] = {"none": [], "attention": [], "full": []}
    work, state = {row.checkpointing: row.work for row in rows}, []
    for mode in ("ddp", "fsdp2"):
        found = [row for row in rows if row.mode == mode]
        for row in found:
            text = f"{row.parts} of {row.images}: {row.total / gib:.0f} GiB"
            cells[row.checkpointing].append(f"**{text}**" if row is best else text)
        sizes = {
            row.parts > 1: (row.weights + row.gradients + row.optimizer + row.ema) / gib
            for row in found
        }
        both = f"{sizes[True]:.0f} with several parts, {sizes[False]:.0f} with one"
        state.append(both if sizes[True] != sizes[False] else f"{sizes[True]:.0f}")
    again = [f"{100 * (work[kind] - 1):.0f} % more work" for kind in ("attention", "full")]
    lines = table(
        ["", "DDP", "FSDP2"],
        [
            ["weights, gradients, AdamW, EMA (GiB)", *state],
            ["parts, images at once, nothing recomputed", *cells["none"]],
            [f"attention recomputed ({again[0]})", *cells["attention"]],
            [f"blocks recomputed ({again[1]})", *cells["full"]],
        ],
    )
    return _text(f"For VAR-d30, {batch} images a step and bfloat16:", lines)


PLAN_GIB = 80

# --- losses of the VQ-VAE -----------------------------------------------------------------------


def adversaries(results: Iterable[Result]) -> str:
    """rFD and PSNR with and without an adversary, of every pair of runs that was measured."""
    by_name = {result.name: result.data for result in results}
    files = {FILES.format(name): text for name, text in ADVERSARIES.items()}
    rows = []
    for name, text in files.items():
        without, own = by_name[name]["rows"]
        rows.append([
            text, f"{without['fd']:.3f} to {own['fd']:.3f}", f"{own['fd_change_error']:.3f}",
            f"{own['psnr'] - without['psnr']:+.2f} dB",
        ])  # fmt: skip
    perceptual, late, pixels = by_name[FIRST_STAGE]["rows"]
    early = by_name[EARLIER]["rows"][1]
    every = [by_name[name] for name in (*files, FIRST_STAGE, EARLIER)]
    codes = min(min(row["codes_used_by_scale"][-3:]) for data in every for row in data["rows"])
    right = [data["classifier"]["accuracy"] for data in every]
    changes = [
        f"{row['fd'] - perceptual['fd']:+.3f} (standard error {row['fd_change_error']:.3f}; from "
        f"step {row['adversary_from']:,})"
        for row in (early, late)
    ]
    after = (
        "A judge is the classifier in whose features rFD is measured; each classifies "
        f"{min(right):.1%} to {max(right):.1%} of the held-out images right. How much is gained "
        "depends on it, so that a test of `make nightly` asks for the mean of three. With LeCAM, "
        "run and judge change the sign of the effect. In the first stage, at its higher rates, an "
        f"adversary with LeCAM changes the distance by {' and '.join(changes)}, of "
        f"{late['steps']:,} steps. The perceptual loss lowers it by more: {pixels['fd']:.3f} to "
        f"{perceptual['fd']:.3f}, at {perceptual['psnr'] - pixels['psnr']:+.2f} dB. All use at "
        f"least {codes:.0%} of the codes at the last three scales."
    )
    columns = ["run", "rFD", "standard error of its change", "PSNR"]
    return "\n".join([*table(columns, rows), after])
