"""``variant plan``: the memory table."""

from __future__ import annotations

import math

from variant.cli.kv_error_table import print_kv_figures
from variant.cli.options import Plan
from variant.cli.output import DTYPES, configs_of, console, mebibytes, table
from variant.engine.planning import PlanRow, depths_of, plan_row, weight_bytes
from variant.errors import UserError


def plan(command: Plan) -> None:
    """Print the cache of every depth at one bridge, then of every depth and bridge."""
    if command.batch < 1:
        raise UserError(f"plan: --batch must be at least 1; got {command.batch}")
    if command.memory is not None and not 0 < command.memory < math.inf:
        raise UserError(f"plan: --memory must be positive and finite (GiB); got {command.memory}")
    var, vae = configs_of(command.model)
    dtype = DTYPES[command.dtype]
    scales = len(var.patch_nums)
    bridge = command.bridge if command.bridge is not None else var.bridge
    if bridge is None:
        raise UserError(f"plan: {command.model} names no bridge; give --bridge (0..{scales})")

    def row(depth: int, at: int) -> PlanRow:
        return plan_row(
            var,
            depth,
            at,
            command.batch,
            dtype,
            page_size=command.page_size,
            guidance=command.guidance,
            kv_dtype=command.kv_dtype,
        )

    eight = command.kv_dtype is not None
    weights = weight_bytes(var, vae, dtype)
    room = None if command.memory is None else command.memory * 2**30 - weights
    out = console()
    sequences = command.batch * (2 if command.guidance else 1)
    main = table(
        f"K/V cache of {command.model}: {command.batch} images ({sequences} sequences), "
        f"{var.layout.total} tokens, width {var.embed_dim}, {command.dtype}, bridge {bridge}",
        "depth",
        "paper, as measured\n(float32 K, 16-bit V)",
        f"paper's scheme\n({command.dtype} K and V)",
        *(["exact plan"] if not eight else ["exact plan", "with 8-bit K/V\nand scales"]),
        "of paper's\nscheme",
        *(
            []
            if room is None
            else [
                f"fits {command.memory:g} GiB\n(with weights)",
                "largest batch\n(paper's cache)",
            ]
        ),
    )
    for depth in depths_of(var):
        found = row(depth, bridge)
        main.add_row(
            str(depth),
            mebibytes(found.paper_measured),
            mebibytes(found.paper_same),
            *([mebibytes(found.exact)] if eight else []),
            mebibytes(found.ours),
            f"{found.share:.1%}",
            *([] if room is None else _fits(found, room, command.batch)),
        )
    out.print(main)
    grid = table(
        f"{'Plan with 8-bit K/V' if eight else 'Exact plan'} in MiB by depth and bridge"
        + ("" if room is None else " (-: does not fit)"),
        "depth",
        *(f"{k}" for k in range(scales + 1)),
    )
    for depth in depths_of(var):
        cells = []
        for at in range(scales + 1):
            size = row(depth, at).ours
            fits = room is None or size <= room
            cells.append(f"{size / 2**20:,.0f}" if fits else "-")
        grid.add_row(str(depth), *cells)
    out.print(grid)
    out.print(
        f"Weights: {mebibytes(weights)} beside it (transformer in {command.dtype}, VQ-VAE in "
        "float32). Activations come on top."
    )
    if eight:
        print_kv_figures(out, command.dtype)


def _fits(row: PlanRow, room: float, batch: int) -> tuple[str, str]:
    """Whether the plan fits beside the weights, and the largest batch, ours and the paper's."""
    ours, paper = (max(0, int(room // (size / batch))) for size in (row.ours, row.paper_measured))
    return ("yes" if row.ours <= room else "no"), f"{ours} ({paper})"
