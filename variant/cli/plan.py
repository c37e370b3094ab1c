"""``variant plan``: the memory of generation and of training. It needs no weights and no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from typing import Any

from rich.table import Table

from variant.checkpoints.named_configs import configs_of
from variant.cli.options import Plan
from variant.cli.output import check_json, console, mebibytes, table, write_json
from variant.cli.schedule import schedule_of
from variant.cli.words import refuse_given
from variant.engine.planning import (
    PlanRow,
    depths_of,
    merged_zone_bytes,
    plan_row,
    schedule_row,
    weight_bytes,
)
from variant.errors import UserError
from variant.models.config import VARConfig
from variant.models.parameter_count import zone_parameters
from variant_kernels.arguments import integer
from variant_kernels.plans.cache_plan import item_bytes
from variant_kernels.wording import counted

MAX_BATCH = 2**31 - 1
MAX_PAGE_SIZE = 2**16
MAX_GPUS = 2**16
MAX_MEMORY = 2**40  # GiB
# Of the K/V cache; a training step has none.
CACHE_OPTIONS = ("kv_dtype", "bridge", "schedule", "page_size", "guidance")
# (depth, bridge) -> the plan
PlanOf = Callable[[int, int], PlanRow]


def plan(command: Plan) -> None:
    """Print the cache of every depth at one bridge, then of every depth and bridge."""
    batch = command.batch if command.batch is not None else 1024 if command.train else 64
    batch = integer("plan", "--batch", batch, 1, MAX_BATCH)
    command = replace(command, batch=batch)
    integer("plan", "--page-size", command.page_size, 1, MAX_PAGE_SIZE)
    integer("plan", "--gpus", command.gpus, 1, MAX_GPUS)
    if command.memory is not None and not 0 < command.memory <= MAX_MEMORY:
        raise UserError(
            f"plan: --memory must be above 0 and at most 2^40 GiB; got {command.memory}"
        )
    check_json("plan", command.json)
    if command.train:
        refuse_given("plan", command, CACHE_OPTIONS, "excluded by --train")
        from variant.cli.train_plan import print_train_plan

        print_train_plan(command, batch)
        return
    if command.gpus != 1:
        raise UserError("plan: --gpus needs --train")
    var, vae = configs_of(command.model)
    bridge = command.bridge if command.bridge is not None else var.bridge
    schedule = None
    if command.schedule is not None:
        schedule = schedule_of("plan", "--schedule", command.schedule, var)
    if bridge is None:
        raise UserError(
            f"plan: the config of {command.model} has no bridge; give --bridge "
            f"(0..{len(var.patch_nums)})"
        )

    @cache
    def plan_of(depth: int, bridge: int) -> PlanRow:
        return plan_row(
            var,
            depth,
            bridge,
            batch,
            command.dtype,
            page_size=command.page_size,
            guidance=command.guidance,
            kv_dtype=command.kv_dtype,
        )

    planned = None
    if schedule is not None:
        planned = schedule_row(
            var,
            schedule,
            batch,
            command.dtype,
            page_size=command.page_size,
            guidance=command.guidance,
            kv_dtype=command.kv_dtype,
        )
    weights = weight_bytes(var, vae, command.dtype)
    free = None if command.memory is None else command.memory * 2**30 - weights
    out = console(command.json)
    out.print(_by_depth(command, var, bridge, plan_of, free))
    out.print(_by_bridge(command, var, plan_of, free))
    if any(depth < var.depth for depth in depths_of(var)):
        out.print(_free_bridges(var, bridge, plan_of))
    if schedule is not None and planned is not None:
        out.print(
            f"Schedule {schedule.name}: {mebibytes(planned.ours)} of K/V, "
            f"{planned.share:.1%} of the paper's scheme, "
            f"{planned.ours / plan_of(var.depth, bridge).ours:.1%} of the full network's plan."
        )
    out.print(
        f"Weights: {mebibytes(weights)} in addition (transformer in {command.dtype}, VQ-VAE in "
        "float32). Activations are not included."
    )
    if var.zone_weights != "shared":
        out.print(_zone_weights(command, var))
    if command.kv_dtype is not None:
        from variant.cli.kv_error_table import print_kv_figures  # needs torch

        print_kv_figures(out, command.dtype)
    values = _as_json(command, var, bridge, weights, plan_of)
    if schedule is not None and planned is not None:
        values["schedule"] = {**schedule.to_dict(), **_row_as_json(planned)}
    write_json(command.json, values)


def largest_free_bridge(var: VARConfig, depth: int, bridge: int, plan_of: PlanOf) -> int:
    """The largest bridge whose cache takes no more memory than that of ``bridge``."""
    most = plan_of(depth, bridge).ours
    bridges = range(bridge, len(var.patch_nums) + 1)
    return max(other for other in bridges if plan_of(depth, other).ours <= most)


def _free_bridges(var: VARConfig, bridge: int, plan_of: PlanOf) -> str:
    """One line: how far the bridge may grow at each depth without more memory, though more work."""
    largest = ", ".join(
        f"{largest_free_bridge(var, depth, bridge, plan_of)} at depth {depth}"
        for depth in depths_of(var)
        if depth < var.depth
    )
    return f"Largest bridge at no more K/V memory than bridge {bridge}: {largest}."


def _zone_weights(command: Plan, var: VARConfig) -> str:
    """What the weights of the subnets take."""
    item = item_bytes(command.dtype)
    parameters = sum(zone_parameters(var, depth) * item for depth in var.subnets)
    text = f"Of the weights, {mebibytes(parameters)} are zone weights ({var.zone_weights})."
    merged = ", ".join(
        f"{mebibytes(size)} at depth {depth}"
        for depth in var.subnets
        if (size := merged_zone_bytes(var, depth, command.dtype))
    )
    if merged:
        text += f" Merged with the full network's at their first use, they take {merged} more."
    return text


def _as_json(
    command: Plan, var: VARConfig, bridge: int, weights: int, plan_of: PlanOf
) -> dict[str, Any]:
    """Both tables as plain values, in bytes."""
    bridges = range(len(var.patch_nums) + 1)
    rows = [plan_of(depth, bridge) for depth in depths_of(var)]
    free = {depth: largest_free_bridge(var, depth, bridge, plan_of) for depth in depths_of(var)}
    grid = [plan_of(depth, bridge) for depth in depths_of(var) for bridge in bridges]
    return {
        "format": "variant-plan-1",
        "model": command.model,
        "batch": command.batch,
        "guidance": command.guidance,
        "dtype": command.dtype,
        "kv_dtype": command.kv_dtype,
        "page_size": command.page_size,
        "bridge": bridge,
        "tokens": var.layout.total,
        "weight_bytes": weights,
        "zone_weight_bytes": {
            str(depth): zone_parameters(var, depth) * item_bytes(command.dtype)
            for depth in (var.subnets if var.zone_weights != "shared" else ())
        },
        "memory_bytes": None if command.memory is None else int(command.memory * 2**30),
        "depths": [{**_row_as_json(row), "largest_free_bridge": free[row.depth]} for row in rows],
        "bridges": [
            {"depth": row.depth, "bridge": row.bridge, "planned_bytes": row.ours} for row in grid
        ],
    }


def _row_as_json(row: PlanRow) -> dict[str, int]:
    return {
        "depth": row.depth,
        "merged_zone_bytes": row.merged_zone,
        "paper_measured_bytes": row.paper_measured,
        "paper_scheme_bytes": row.paper_same,
        "exact_bytes": row.exact,
        "planned_bytes": row.ours,
    }


def _by_depth(
    command: Plan, var: VARConfig, bridge: int, plan_of: PlanOf, free: float | None
) -> Table:
    """The plan of every depth at one bridge, beside the paper's scheme."""
    eight_bits = command.kv_dtype is not None
    assert command.batch is not None, "plan() sets it"
    sequences = command.batch * (2 if command.guidance else 1)
    columns = [
        "depth",
        "paper, as measured\n(float32 K, 16-bit V)",
        f"paper's scheme\n({command.dtype} K and V)",
        "exact plan",
    ]
    columns += ["with 8-bit K/V\nand scales"] if eight_bits else []
    columns += ["of paper's\nscheme"]
    if free is not None:
        columns += [f"fits {command.memory:g} GiB\n(with weights)"]
        columns += ["largest batch\n(paper's cache)"]
    depths = table(
        f"K/V cache of {command.model}: {counted(command.batch, 'image')} "
        f"({counted(sequences, 'sequence')}), "
        f"{counted(var.layout.total, 'token')}, width {var.embed_dim}, {command.dtype}, bridge "
        f"{bridge}",
        *columns,
    )
    for depth in depths_of(var):
        row = plan_of(depth, bridge)
        depths.add_row(
            str(depth),
            mebibytes(row.paper_measured),
            mebibytes(row.paper_same),
            *([mebibytes(row.exact)] if eight_bits else []),
            mebibytes(row.ours),
            f"{row.share:.1%}",
            *([] if free is None else _fits(row, free - row.merged_zone, command.batch)),
        )
    return depths


def _by_bridge(command: Plan, var: VARConfig, plan_of: PlanOf, free: float | None) -> Table:
    """The plan of every depth and bridge in one unit."""
    bridges = range(len(var.patch_nums) + 1)
    sizes = {depth: [plan_of(depth, bridge).ours for bridge in bridges] for depth in depths_of(var)}
    unit, name = unit_of(size for row in sizes.values() for size in row)
    grid = table(
        f"{'Exact plan' if command.kv_dtype is None else 'Plan with 8-bit K/V'} in {name} by "
        "depth and bridge" + ("" if free is None else " (-: does not fit)"),
        "depth",
        *map(str, bridges),
    )
    for depth, row in sizes.items():
        merged = plan_of(depth, 0).merged_zone
        fits = [free is None or size + merged <= free for size in row]
        cells = [f"{size / unit:,.0f}" if fit else "-" for size, fit in zip(row, fits, strict=True)]
        grid.add_row(str(depth), *cells)
    return grid


def unit_of(sizes: Iterable[int]) -> tuple[int, str]:
    """The largest unit in which the smallest size that is not 0 has two digits."""
    smallest = min((size for size in sizes if size), default=0)
    units = (2**20, "MiB"), (2**10, "KiB")
    return next((unit for unit in units if smallest >= 10 * unit[0]), (1, "bytes"))


def _fits(row: PlanRow, free: float, batch: int) -> tuple[str, str]:
    """Whether the plan fits into ``free`` bytes; the largest batch of ours and of the paper."""
    ours, paper = (max(0, int(free // (size / batch))) for size in (row.ours, row.paper_measured))
    return ("yes" if row.ours <= free else "no"), f"{ours} ({paper})"
