"""Printing what 8-bit K/V change: measured now (``variant info``), or before (``variant plan``)."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from variant.cli.output import table
from variant.engine.engine import Engine
from variant.evaluation.kv_error import (
    GREEDY_CFG,
    STEPS_PER_DEPTH,
    KVError,
    depths_of,
    measure_kv_error,
)
from variant.supernet import ASSETS

# What benchmarks/kv8.py measured, as it lies in benchmarks/results too.
FIGURES = ASSETS / "kv8.json"


def measured(engine: Engine, images: int) -> list[KVError]:
    """:func:`measure_kv_error` with a bar on standard error, where somebody watches."""
    if not sys.stderr.isatty():
        return measure_kv_error(engine, images=images)
    bar = Progress(*Progress.get_default_columns(), console=Console(stderr=True), transient=True)
    with bar:
        total = STEPS_PER_DEPTH * len(depths_of(engine.var.config))
        task = bar.add_task("measuring", total=total)

        def tick(done: str) -> None:
            bar.update(task, advance=1, description=done)

        return measure_kv_error(engine, images=images, tick=tick)


def kv_error_table(model: str, found: Iterable[KVError]) -> Table:
    """A table of one model, a row per depth."""
    rows = list(found)
    made = _table(
        f"8-bit K/V against exact ones: {model}, {rows[0].dtype}, {rows[0].images} images", []
    )
    for row in rows:
        made.add_row(*_cells(row))
    return made


def print_kv_figures(out: Console, dtype: str) -> None:
    """The figures of the package for engines of ``dtype``, with their source."""
    figures: dict[str, Any] = json.loads(FIGURES.read_text())
    known = {row["dtype"] for row in figures["rows"]}
    shown = dtype if dtype in known else "bfloat16"
    rows = [row for row in figures["rows"] if row["dtype"] == shown]
    made = _table(f"8-bit K/V against exact ones, measured: {shown}, small models", ["model"])
    for row in rows:
        made.add_row(row["model"], *_cells(KVError(**{k: row[k] for k in _FIELDS})))
    out.print(made)
    source = figures["source"]
    out.print(
        f"measured: {source['command']}, commit {source['commit'][:12]}, {source['cpu']}, torch "
        f"{source['torch']}. golden: random weights; digits: the model of this package. "
        "Yours: variant info --model YOURS --kv-dtype fp8"
    )


_FIELDS = tuple(KVError.__dataclass_fields__)


def _table(title: str, first: list[str]) -> Table:
    made = table(
        title,
        *first,
        "depth",
        "logits: largest\nchange / std",
        "rms change\n/ std",
        "likeliest token\nchanges",
        f"greedy tokens\n(cfg {GREEDY_CFG:g}) change",
        "in images",
        "from scale",
    )
    made.caption = (
        "logits are teacher-forced with tokens of the exact model; one greedy token that changes "
        "changes what follows it"
    )
    return made


def _cells(row: KVError) -> tuple[str, ...]:
    return (
        str(row.depth),
        f"{row.largest:.3g}",
        f"{row.rms:.3g}",
        f"{row.top_changed:.2%}",
        f"{row.greedy_changed:.2%}",
        f"{row.greedy_images} of {row.images}",
        "-" if row.first_scale is None else str(row.first_scale),
    )
