"""``variant plan --train``: the memory of a training step, and the fastest way that fits."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.table import Table

from variant.checkpoints.named_configs import configs_of
from variant.cli.options import Plan
from variant.cli.output import console, table, write_json
from variant.errors import UserError
from variant.models.config import VARConfig
from variant.training.memory_plan import TrainingRow, fastest, fits, training_rows
from variant_kernels.plans.cache_plan import item_bytes
from variant_kernels.wording import counted

GIB, MIB = 2**30, 2**20
COLUMNS = ("weights", "gradients", "optimizer", "ema", "casts", "activations", "logits", "encoder")


def print_train_plan(command: Plan, batch: int) -> None:
    """Print a row for every mode and checkpointing.  Args: batch: images of a step.

    Raises:
        UserError: a batch that the GPUs do not divide; a model with zone weights.
    """
    if batch % command.gpus:
        raise UserError(f"plan: --batch must be a multiple of --gpus ({command.gpus}); got {batch}")
    var, vae = configs_of(command.model)
    if var.zone_weights != "shared":
        raise UserError(
            f"plan: --train plans steps that train every weight; {command.model} has zone weights "
            f'("{var.zone_weights}"), which train alone, over a frozen full network. Name a model '
            "without zone weights"
        )
    memory = None if command.memory is None else command.memory * GIB
    rows = training_rows(
        var, vae, gpus=command.gpus, batch=batch, width=item_bytes(command.dtype), memory=memory
    )
    best = None if memory is None else fastest(rows, memory)
    out = console(command.json)
    out.print(_table(command, var, batch, rows, memory))
    if memory is not None:
        out.print(_verdict(command, best))
    out.print(
        f"{_unit(rows)[0]} on each GPU. The total is the peak: images are encoded before the "
        "transformer keeps activations of a part. It includes a moving average (EMA) of the "
        "weights and, with the images of each part, the encoder; a run without them needs less. "
        "6 % of a GPU stay free for the CUDA context, collectives and gaps between tensors."
    )
    write_json(command.json, _as_json(command, batch, rows, best))


def _table(
    command: Plan, var: VARConfig, batch: int, rows: list[TrainingRow], memory: float | None
) -> Table:
    columns = ["mode", "check-\npointing", "parts", "images\nat once"]
    columns += ["weights", "grads", "AdamW", "EMA", "casts", "activa-\ntions", "logits", "encoder"]
    columns += ["total", "work"]
    columns += [] if memory is None else ["fits"]
    result = table(
        f"A training step of {command.model}: {counted(batch, 'image')} on "
        f"{counted(command.gpus, 'GPU')}, {counted(var.layout.total, 'token')}, width "
        f"{var.embed_dim}, {command.dtype}",
        *columns,
    )
    result.padding = 0  # fifteen columns in a terminal of 100 characters
    _, unit = _unit(rows)
    for row in rows:
        sizes = [getattr(row, name) for name in COLUMNS] + [row.total]
        sizes[COLUMNS.index("activations")] += row.working
        result.add_row(
            row.mode,
            row.checkpointing,
            str(row.parts),
            str(row.images),
            *[f"{size / unit:.1f}" for size in sizes],
            f"{row.work:.2f}",
            *([] if memory is None else ["yes" if fits(row, memory) else "no"]),
        )
    return result


def _unit(rows: list[TrainingRow]) -> tuple[str, int]:
    """MiB for a small model, whose row would be zeros in GiB."""
    return ("GiB", GIB) if max(row.total for row in rows) >= GIB else ("MiB", MIB)


def _verdict(command: Plan, best: TrainingRow | None) -> str:
    if best is None:
        return f"Nothing fits {command.memory:g} GiB; use more GPUs or a smaller model."
    name, unit = _unit([best])
    mode = "" if best.mode == "single" else f'parallel.mode = "{best.mode}", '
    return (
        f"The fastest that fits {command.memory:g} GiB: {mode}optim.accumulate = {best.parts}, "
        f'memory.checkpointing = "{best.checkpointing}" ({counted(best.images, "image")} at once, '
        f"{best.total / unit:.0f} {name})."
    )


def _as_json(
    command: Plan, batch: int, rows: list[TrainingRow], best: TrainingRow | None
) -> dict[str, Any]:
    """The table as plain values, in bytes."""
    return {
        "format": "variant-train-plan-1",
        "model": command.model,
        "batch": batch,
        "gpus": command.gpus,
        "dtype": command.dtype,
        "memory_bytes": None if command.memory is None else int(command.memory * GIB),
        "rows": [{**asdict(row), "total": row.total} for row in rows],
        "fastest": None if best is None else {**asdict(best), "total": best.total},
    }
