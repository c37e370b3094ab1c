"""Write ``docs/results.md`` and the README's tables from the committed result files, and
``docs/recipes.md`` from the sections of recipes.

    make docs-results

All are text that only this module writes; a test compares them with their sources.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks import predict
from benchmarks.report import PARTS, environment_lines, table
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
from benchmarks.study.report_readme import quality_of_settings, with_quality
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

# The results of the README's table, and the two lines around that table.
GAINS = "engine-var-d16-batch-1-epyc-2-threads"
GAINS_PATCH = "dropin-var-d16-bfloat16-epyc-2-threads"
GAINS_DTYPE, GAINS_PEER = "bfloat16", "original bfloat16 autocast"
BEGIN, END = "<!-- gains:begin (make docs-results) -->", "<!-- gains:end -->"

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
        f"{constants.source}. It may be off by 15 % and more. TFLOP/s count visible pairs.",
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
    rows = [row for row in by_name[GAINS]["rows"] if row["dtype"] == GAINS_DTYPE]
    all_kept = rows[0]["kv_paper_bytes"]
    patch = by_name[GAINS_PATCH]["results"][0]["implementations"]["patch"]
    patch_mib = float(re.findall(r"([0-9.]+) allocated", patch["note"])[0])
    cells = [
        ["original code", f"{_peer(rows[0])['ms']['median']:,.0f} ms", "1.00", "-", "-"],
        _gain("`patch`, depth 16", 1000 * patch["median"], patch["ratio_to_original"],
              patch_mib * 2**20, all_kept),
    ]  # fmt: skip
    for row in rows:
        cells.append(
            _gain(f"`VARiant`, depth {row['depth']}", row["ms"]["median"], _peer(row)["ratio"],
                  row["kv_allocated_bytes"], all_kept)
        )  # fmt: skip
    columns = ["bfloat16", "time per image", "times as fast", "K/V cache",
               f"of {all_kept / 2**20:.1f} MiB (all K/V kept)"]  # fmt: skip
    return "\n".join(table(columns, cells)).strip()


def _gain(name: str, ms: float, ratio: float, kv_bytes: float, all_kept: int) -> list[str]:
    share = round(100 * kv_bytes / all_kept)
    return [name, f"{ms:,.0f} ms", f"{ratio:.2f}", f"{kv_bytes / 2**20:.1f} MiB", f"{share} %"]


def _peer(row: Mapping[str, Any]) -> Mapping[str, Any]:
    return next(peer for peer in row["against"] if peer["peer"] == GAINS_PEER)


def with_gains(readme: str, text: str) -> str:
    """The README with ``text`` between its two marks."""
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}"


def outputs() -> dict[Path, Callable[[], str]]:
    """The generated files, and the function that returns the text of each."""
    results = read_all(RESULTS)
    return {
        PAGE: lambda: page(results, json.loads(DIGITS.read_text())),
        RECIPES: recipe_reference.reference,
        README: lambda: with_quality(
            with_gains(README.read_text(), gains(results)),
            quality_of_settings(read_study(STUDY)),
        ),
    }


def main() -> int:
    """Write all; 0."""
    for path, text in outputs().items():
        with atomic_write(path) as temporary:
            temporary.write_text(text())
        print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
