"""Tables of the error of 8-bit K/V: measured now (``variant info``), or before (``plan``)."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from variant.checkpoints.locate import ASSETS
from variant.cli.output import table as new_table
from variant.cli.progress import progress
from variant.engine.engine import Engine
from variant.evaluation.kv_error import (
    GREEDY_CFG,
    STEPS_PER_DEPTH,
    KVError,
    measure_kv_error,
    trained_depths,
)
from variant_kernels.wording import counted

# Measured by benchmarks/kv8.py; its whole result is in benchmarks/results.
FIGURES = ASSETS / "kv8.json"


def measure_with_progress(
    engine: Engine, images: int, json_file: Path | None = None
) -> list[KVError]:
    """:func:`measure_kv_error` with :func:`progress`."""
    total = STEPS_PER_DEPTH * len(trained_depths(engine.var.config))
    with progress("info", "measuring", total, json_file) as advance:
        return measure_kv_error(engine, images=images, on_step=functools.partial(advance, 1))


def kv_error_table(model: str, errors: Sequence[KVError]) -> Table:
    """A table of one model, a row per depth."""
    dtype, images = errors[0].dtype, errors[0].images
    table = _table(
        f"8-bit K/V compared with exact K/V: {model}, {dtype}, {counted(images, 'image')}", []
    )
    for error in errors:
        table.add_row(*_cells(error))
    return table


def print_kv_figures(out: Console, dtype: str) -> None:
    """Print the figures in the package for engines of ``dtype``, with their source.

    Without figures of that dtype, those of bfloat16 are printed, and the title names bfloat16.
    """
    figures: dict[str, Any] = json.loads(FIGURES.read_text())
    measured = {row["dtype"] for row in figures["rows"]}
    dtype = dtype if dtype in measured else "bfloat16"
    rows = [row for row in figures["rows"] if row["dtype"] == dtype]
    table = _table(f"8-bit K/V compared with exact K/V: {dtype}, small models", ["model"])
    for row in rows:
        table.add_row(row["model"], *_cells(KVError(**{k: row[k] for k in _FIELDS})))
    out.print(table)
    source = figures["source"]
    out.print(
        f"measured: {source['command']}, commit {source['commit'][:12]}, {source['cpu']}, torch "
        f"{source['torch']}. golden: random weights; digits: the model in this package. "
        "For your model: variant info --model YOURS --kv-dtype fp8"
    )


_FIELDS = tuple(KVError.__dataclass_fields__)


def _table(title: str, first_columns: list[str]) -> Table:
    table = new_table(
        title,
        *first_columns,
        "depth",
        "logits: largest\nchange / std",
        "rms change\n/ std",
        "likeliest token\nchanges",
        f"greedy tokens\n(cfg {GREEDY_CFG:g}) change",
        "in images",
        "from scale",
    )
    table.caption = (
        "logits are teacher-forced with tokens of the exact model; a different greedy token "
        "changes all later tokens of its image"
    )
    return table


def _cells(error: KVError) -> tuple[str, ...]:
    return (
        str(error.depth),
        f"{error.largest:.3g}",
        f"{error.rms:.3g}",
        f"{error.top_changed:.2%}",
        f"{error.greedy_changed:.2%}",
        f"{error.greedy_images} of {error.images}",
        "-" if error.first_scale is None else str(error.first_scale),
    )
