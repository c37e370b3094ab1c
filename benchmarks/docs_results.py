"""Write ``docs/results.md`` and the parts with numbers of other documents from the committed result
files, and ``docs/recipes.md`` from the sections of recipes.

    make docs-results

All are text that only this module writes; a test compares them with their sources.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import docs_blocks, predict
from benchmarks.docs_blocks import with_block
from benchmarks.report import PARTS, environment_lines, table, with_decoder
from benchmarks.results import (
    DROPIN,
    ENGINE,
    KERNELS,
    KV8,
    LARGEST,
    RUN,
    TRAINING,
    VAE_LOSSES,
    Result,
    read_all,
)
from benchmarks.study.report import RESULTS as STUDY
from benchmarks.study.report_data import read_study
from benchmarks.study.report_readme import quality_of_settings
from variant.engine.planning import depths_of, plan_row
from variant.files import atomic_write
from variant.models.presets import PAPER_BRIDGE, VAR_PRESETS
from variant.training import recipe_reference

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PLOT = "../benchmarks/results/var-d16-latency.png"  # of the results named GAINS
DIGITS = ROOT / "docs" / "digits.json"
PAGE = ROOT / "docs" / "results.md"
RECIPES = ROOT / "docs" / "recipes.md"
README = ROOT / "README.md"
SEARCH, TRAINING_GUIDE = ROOT / "docs" / "search.md", ROOT / "docs" / "training.md"
MEMORY_PLAN = ROOT / "docs" / "memory-plan.md"
# The record of docs_blocks.COMMAND, written as result files are.
FOUND = ROOT / "docs" / "search.json"

# The results of the README's table.
GAINS = "engine-var-d16-batch-1-epyc-2-threads"
GAINS_PATCH = "dropin-var-d16-bfloat16-epyc-2-threads"
GAINS_DTYPE, GAINS_PEER = "bfloat16", "original bfloat16 autocast"

INTRODUCTION = """\
# Results

`make docs-results` writes this page from the files in
[benchmarks/results](../benchmarks/results) and from [digits.json](digits.json); do not edit it.
[benchmarks.md](benchmarks.md) explains how the results are measured and how to read them.{no_gpu}

Compare ratios, not absolute times of different runs. A command stands as it was typed when the
result was measured; options have been renamed since (`--json` instead of `--benchmark-json`).
`PATH` stands for a local folder.
"""

NO_GPU = """ There is
no GPU result yet."""

# One section for each kind of result file, in the page's order.
SECTIONS = {
    RUN: "Runs on a GPU",
    ENGINE: "Whole generations",
    DROPIN: "Drop-in: `patch` and `accelerate` in the original code",
    TRAINING: "Training step",
    LARGEST: "Largest batch",
    VAE_LOSSES: "Losses of the VQ-VAE",
    KV8: "Error of 8-bit K/V",
    KERNELS: "Kernels",
}


def page(results: list[Result], digits: Mapping[str, Any]) -> str:
    """The text of ``docs/results.md``."""
    has_gpu = any(result.kind == RUN for result in results)
    introduction = INTRODUCTION.format(no_gpu="" if has_gpu else NO_GPU)
    lines = [introduction, *_plan(), *_predictions(results), *_digits(digits)]
    for kind, title in SECTIONS.items():
        of_kind = [result for result in results if result.kind == kind]
        if of_kind:
            lines += [f"## {title}", ""]
        for result in of_kind:
            lines += [f"### {result.name}", "", *environment_lines(result), ""]
            if result.name == GAINS:
                lines += [f"![Time per image by depth]({PLOT})", ""]
            # One level below the file's own heading.
            lines += [
                line.replace("### ", "#### ", 1) if line.startswith("### ") else line
                for line in PARTS[kind](result.data)
            ]
    return "\n".join(lines).rstrip() + "\n"


def _plan() -> list[str]:
    """K/V memory of VAR-d30: arithmetic, no measurement."""
    config = VAR_PRESETS["var-d30"]
    cells = []
    for depth in depths_of(config):
        exact = plan_row(config, depth, PAPER_BRIDGE, 64, torch.bfloat16)
        eight = plan_row(config, depth, PAPER_BRIDGE, 64, torch.bfloat16, kv_dtype="fp8")
        sizes = (exact.paper_measured, exact.paper_same, exact.exact, eight.ours)
        mib = [f"{size / 2**20:,.0f} MiB" for size in sizes]
        cells.append([str(depth), *mib[:3], f"{exact.share:.1%}", mib[3]])
    columns = ["depth", "paper's scheme as measured (float32 K)", "paper's scheme, 16-bit K and V",
               "exact plan", "of the paper's 16-bit scheme", "exact plan, 8-bit K/V"]  # fmt: skip
    return [
        "## Memory plan",
        "",
        f"K/V cache of VAR-d30 at 256x256: 64 images with guidance (128 sequences of 680 tokens), "
        f"bridge {PAPER_BRIDGE}, 16-token pages. The numbers are computed; the allocated cache "
        "equals the plan ([memory-plan.md](memory-plan.md)).",
        "",
        "`variant plan --model var-d30 --batch 64`",
        "",
        *table(columns, cells),
    ]


def _predictions(results: list[Result]) -> list[str]:
    """Targets on a GPU beside what the model predicts and what a run measured."""
    constants, run = predict.constants(), predict.run_of(results)
    found = predict.cases(constants, None if run is None else run.data)
    return [
        "## Targets on a GPU",
        "",
        "For one H200, VAR-d30 at 256x256, bfloat16. **The predicted values are no measurements**: "
        "a model computes them from the machine code that the compiler makes for this GPU, the "
        "number of tiles, rooflines, and counts of what the peers read and write "
        "([prediction](../benchmarks/prediction)). Source of its constants: "
        f"{constants.source}. No run has tested it yet. TFLOP/s count visible pairs.",
        "",
        "`python -m benchmarks.predict`",
        "",
        *table(["what", "target", "predicted", "measured"], [case.cells() for case in found]),
        "Predicted to miss their target, and what limits them:",
        "",
        *(f"- {line}" for line in predict.misses(constants)),
        "",
    ]


def _digits(data: Mapping[str, Any]) -> list[str]:
    """Time, memory and quality of the shipped model."""
    cells = [
        [
            str(row["depth"]),
            f"{row['tokens_ms']['median']:.2f} ms",
            f"{row['image_ms']['median']:.2f} ms",
            f"{row['kv_allocated_bytes'] / 1024:.0f} KiB",
            f"{row['classified']:.1%}",
            f"{row['spread']:.1%}",
            f"{row['repeats']:.1%}",
            f"{row['copies']:.1%}",
            f"{row['train_loss']:.3f} / {row['held_out_loss']:.3f}",
        ]
        for row in data["rows"]
    ]
    columns = ["depth", "transformer, per image", "with decoder", "K/V per image",
               "classified as their label", "spread", "repeats", "copies",
               "loss, training / held out"]  # fmt: skip
    timing, sampling, machine = data["timing"], data["sampling"], data["environment"]
    return [
        "## Digits",
        "",
        "The shipped model `digits`: 16x16 pixels, 8 layers, 6 scales (130 tokens), every layer at "
        "the first 4 scales; trained by the recipe `digits` on scikit-learn's 1,797 scans of "
        "handwritten digits.",
        "",
        f"{machine['cpu']}, {machine['isa']}, {machine['threads']} thread, torch "
        f"{machine['torch']}. {timing['clock']}, median of "
        f"{timing['rounds']} interleaved rounds, batch {timing['batch']}, {timing['dtype']}; cfg "
        f"{sampling['cfg']}, top_p {sampling['top_p']}. Commit {machine['commit'][:12]}, "
        f"{machine['date'][:10]}.",
        "",
        "`python -m benchmarks.readme_picture`",
        "",
        *table(columns, cells),
        f"Quality is of {data['classified_images']:,} images at each depth. A support vector "
        "machine, trained on all scans at 8x8, classifies the images; trained without the held-out "
        f"tenth, it classifies {data['classifier_held_out_accuracy']:.1%} of that tenth correctly. "
        "Spread: the mean standard deviation of a pixel within a class, over that of the real "
        "scans. Repeats: images whose tokens equal those of an earlier one. Copies: images whose "
        "tokens equal those of a training scan.",
        "",
    ]


def gains(results: list[Result]) -> str:
    """The README's table: six rows of the results at batch 1 in bfloat16."""
    by_name = {result.name: result.data for result in results}
    data = by_name[GAINS]
    rows = [row for row in data["rows"] if row["dtype"] == GAINS_DTYPE]
    images = {row["depth"]: row for row in with_decoder(data) if row["dtype"] == GAINS_DTYPE}
    decoder = next(row for row in data["decoder"] if row["dtype"] == GAINS_DTYPE)
    theirs, all_kept = _peer(decoder)["ms"]["median"], rows[0]["kv_paper_bytes"]
    patch = by_name[GAINS_PATCH]["results"][0]["implementations"]["patch"]
    patched, patch_ratio = 1000 * patch["median"], patch["ratio_to_original"]
    patch_mib = float(re.findall(r"([0-9.]+) allocated", patch["note"])[0])
    original = [_peer(row)["ms"]["median"] for row in (rows[0], images[rows[0]["depth"]])]
    cells = [
        _gain("original code", original, [1.0, 1.0]),
        # `patch` leaves the decoder as it is; its ratio is of another run.
        _gain("`patch`, depth 16", [patched, patched + theirs],
              [patch_ratio, (patch_ratio * patched + theirs) / (patched + theirs)],
              patch_mib * 2**20, all_kept),
    ]  # fmt: skip
    for row in rows:
        both = row, images[row["depth"]]
        cells.append(
            _gain(f"`VARiant`, depth {row['depth']}", [one["ms"]["median"] for one in both],
                  [_peer(one)["ratio"] for one in both], row["kv_allocated_bytes"], all_kept)
        )  # fmt: skip
    columns = ["bfloat16", "without decoder", "times as fast", "with decoder", "times as fast",
               "K/V cache", f"of {all_kept / 2**20:.1f} MiB (all K/V kept)"]  # fmt: skip
    after = "" if data.get("images") else (
        f"The decoder was timed by itself ({decoder['ms']['median']:,.0f} ms, original "
        f"{theirs:,.0f} ms) and is added."
    )  # fmt: skip
    return "\n".join([*table(columns, cells), after]).strip()


def _gain(
    name: str,
    times: Sequence[float],
    ratios: Sequence[float],
    kv_bytes: float | None = None,
    all_kept: int = 1,
) -> list[str]:
    """A row. times, ratios: milliseconds and speed without and with the decoder."""
    speeds = [
        text
        for ms, ratio in zip(times, ratios, strict=True)
        for text in (f"{ms:,.0f} ms", f"{ratio:.2f}")
    ]
    if kv_bytes is None:
        return [name, *speeds, "-", "-"]
    share = f"{round(100 * kv_bytes / all_kept)} %"
    return [name, *speeds, f"{kv_bytes / 2**20:.1f} MiB", share]


def _peer(row: Mapping[str, Any]) -> Mapping[str, Any]:
    return next(peer for peer in row["against"] if peer["peer"] == GAINS_PEER)


def picture(data: Mapping[str, Any]) -> str:
    """The times of the README's picture, with the decoder too."""
    machine, timing = data["environment"], data["timing"]
    times = [f"{row['image_ms']['median']:.2f}" for row in data["rows"]]
    return (
        f"Time is {timing['clock']} of one {machine['cpu']} thread, in batches of "
        f"{timing['batch']}, without the image decoder; with it, {', '.join(times[:-1])} and "
        f"{times[-1]} ms ([details](docs/results.md#digits))."
    )


def blocks() -> dict[Path, dict[str, Callable[[], str]]]:
    """The parts with numbers of hand-written documents, by the names of their marks."""
    results, study = read_all(RESULTS), read_study(STUDY)
    digits, found = (json.loads(path.read_text()) for path in (DIGITS, FOUND))
    return {
        README: {
            "picture": lambda: picture(digits),
            "gains": lambda: gains(results),
            "quality": lambda: quality_of_settings(study),
        },
        SEARCH: {
            "search-digits": lambda: docs_blocks.search_of_digits(found),
            "search-study": lambda: docs_blocks.search_of_study(study),
        },
        TRAINING_GUIDE: {
            "adversaries": lambda: docs_blocks.adversaries(results),
            "training-step": lambda: docs_blocks.training_steps(results),
        },
        MEMORY_PLAN: {"train-plan": docs_blocks.train_plan},
    }


def outputs() -> dict[Path, Callable[[], str]]:
    """The generated files, and the function that returns the text of each."""
    return {
        PAGE: lambda: page(read_all(RESULTS), json.loads(DIGITS.read_text())),
        RECIPES: recipe_reference.reference,
        **{path: partial(_with_blocks, path, parts) for path, parts in blocks().items()},
    }


def _with_blocks(path: Path, parts: Mapping[str, Callable[[], str]]) -> str:
    text = path.read_text()
    for name, body in parts.items():
        text = with_block(text, name, body())
    return text


def main() -> int:
    """Write all; 0."""
    for path, text in outputs().items():
        with atomic_write(path) as temporary:
            temporary.write_text(text())
        print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
