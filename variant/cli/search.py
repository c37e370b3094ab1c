"""``variant search``: the layers of every scale under a budget, without training."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from variant.checkpoints.locate import packaged_models
from variant.cli.options import Search
from variant.cli.output import (
    check_apart,
    check_folder,
    check_json,
    check_own_folder,
    checked_path,
    console,
    table,
    write_json,
)
from variant.cli.pyplot import check_plot, pyplot, save_plot
from variant.cli.search_job import (
    LATENCY,
    RECORD,
    SCHEDULE,
    Job,
    budgets_text,
    no_schedule_text,
    share_text,
)
from variant.cli.search_record import record
from variant.cli.words import command_line
from variant.errors import UserError
from variant.files import atomic_write
from variant.folder_lock import clear_leftovers, locked_folder
from variant.models.placement import check_device
from variant.paths import path_kind, shown
from variant.schedule_files import save_schedule
from variant.search.compare import SAME, Row
from variant.search.costs import KINDS
from variant.search.tree import Found, Result
from variant.supernet import VARiant
from variant_kernels.arguments import integer
from variant_kernels.plans.depth_schedule import schedule_name
from variant_kernels.wording import counted

LOSSES = "losses-*.safetensors"
OWN_NAMES = (RECORD, SCHEDULE, LATENCY, LOSSES)
LOCK_NAME = ".variant-search.lock"
WEIGHTS = (".pth", ".pt", ".safetensors")
MAX_IMAGES = 10**6
MAX_BATCH = 2**12


def search_command(command: Search) -> None:
    """Search, print the front and the comparison, and write the schedule and the record."""
    budgets = _check(command)
    with locked_folder(command.out, LOCK_NAME, work="search") as is_locked:
        if is_locked:
            clear_leftovers(command.out, OWN_NAMES)
        _search(command, budgets)


def _search(command: Search, budgets: dict[str, float]) -> None:
    out = console(command.json)
    started = time.monotonic()
    job = Job(command, _model(command), budgets)
    try:
        result = job.run(out.print)
        out.print(_front_table(job, result))
        rows = job.compare(result)
    except KeyboardInterrupt as stop:
        job.save()
        again = command_line("search", command, resume=True)
        raise type(stop)(
            f"{job.num_known:,} losses are in {command.out}; continue: {again}"
        ) from None
    except BaseException:
        job.save()
        raise
    if any(row.verdict != SAME for row in rows):
        out.print(_comparison_table(job, rows))
    for line in _verdicts(rows):
        out.print(line)
    best = result.best(budgets)
    if best is None:
        least = {name: min(one.costs[name] for one in result.found) for name in budgets}
        raise UserError(no_schedule_text(least, budgets, "the least that was found is"))
    text = ", ".join(f"{name} {share_text(best.costs[name])}" for name in best.costs)
    out.print(
        f"Within {budgets_text(budgets)}: {schedule_name(best.depths)}, loss {best.loss:.4f} "
        f"({best.loss - job.full_loss:+z.4f} to the full network), {text}"
    )
    latency = job.measured_latency(best)
    if latency is not None:
        out.print(
            f"Measured, it takes {latency['share']:.3f} of the full network's time "
            f"({1000 * latency['seconds']:,.1f} of {1000 * latency['full_seconds']:,.1f} ms); by "
            f"the table {best.costs['latency']:.3f}."
        )
    values = record(job, result, rows, best, latency, time.monotonic() - started)
    _write(job, best, values)
    out.print(f"wrote {job.folder / SCHEDULE}, {job.folder / RECORD}")
    if command.plot is not None:
        _plot(command.plot, job, result, budgets)
        out.print(f"wrote {command.plot}")
    write_json(command.json, values)


def _write(job: Job, best: Found, values: dict[str, Any]) -> None:
    """Write the schedule and the record of the search.

    The record of an earlier search is removed first and the new one appears last: whatever ends the
    process, a record never lies beside the schedule of another search.
    """
    command, path = job.command, job.folder / RECORD
    about = {"model": command.model, "data": job.data, "budget": job.budgets}
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(values, indent=1) + "\n")
        Path(os.path.realpath(path)).unlink(missing_ok=True)  # of a link what it names
        save_schedule(
            job.folder / SCHEDULE, job.schedule_of(best), {**about, "costs": {**best.costs}}
        )


def _check(command: Search) -> dict[str, float]:
    """The budgets; refuses what can be refused without a model.

    Raises:
        UserError, ValueError: an option that cannot be used.
    """
    budgets = parse_budgets(command.budget)
    if command.data is None and command.model not in packaged_models():
        raise UserError("search: --data must name the images whose loss counts")
    integer("search", "--images", command.images, 2, MAX_IMAGES)
    integer("search", "--batch", command.batch, 1, MAX_BATCH)
    integer("search", "--exact", command.exact, 0)
    integer("search", "--beam", command.beam, 1)
    for depth in command.depths:
        integer("search", "--depths", depth, 1)
    check_device("search", command.device, name="--device", computes=True)
    check_apart(
        "search", {"--json": command.json, "--plot": command.plot}, command.out, _is_own_name
    )
    check_json("search", command.json)
    check_plot("search", command.plot)
    with checked_path(command.out):
        if command.out.exists() and not command.out.is_dir():
            raise UserError(f"{command.out}: --out must be a folder")
        check_folder(command.out)
        check_own_folder("search", command.out, _is_own_name)
        found = list(command.out.glob(LOSSES)) if command.out.is_dir() else []
        found += [name for name in (RECORD, SCHEDULE) if (command.out / name).exists()]
        if not command.resume and found:
            raise UserError(
                f"{command.out}: holds an earlier search; give --resume to use its losses, or "
                "another --out"
            )
    return budgets


def _is_own_name(name: str) -> bool:
    """Whether a search writes files of this name into its folder."""
    return any(fnmatch(name, own) for own in OWN_NAMES)


def parse_budgets(words: Sequence[str]) -> dict[str, float]:
    """``("kv=0.5", "work=0.6")`` as numbers.

    Raises:
        UserError: another form, an unknown cost, a share not in (0, 1], or a cost given twice.
    """
    budgets: dict[str, float] = {}
    for word in words:
        name, equals, text = word.partition("=")
        try:
            share = float(text)
        except ValueError:
            share = -1.0
        if name not in KINDS or not equals or not 0 < share <= 1:
            raise UserError(
                f"search: --budget must be {', '.join(f'{kind}=SHARE' for kind in KINDS)}, with a "
                f"share of the full network's in (0, 1]; got {word[:60]}"
            )
        if name in budgets:
            raise UserError(f"search: --budget {name} is given twice")
        budgets[name] = share
    if not budgets:
        raise UserError("search: --budget needs a value, as kv=0.5")
    return budgets


def _model(command: Search) -> VARiant:
    """Raises: UserError, for files that cannot be read."""
    is_file = command.model.endswith(WEIGHTS) and path_kind(command.model) == "file"
    if is_file != (command.vae is not None):
        raise UserError(
            "search: --vae goes with a file of the transformer's weights as --model"
            if command.vae is not None
            else f"search: --vae must name the VQ-VAE's file beside {shown(command.model)}"
        )
    if command.vae is not None:
        return VARiant.from_var_checkpoint(command.model, command.vae, device=command.device)
    return VARiant.from_pretrained(command.model, device=command.device)


def _front_table(job: Job, result: Result) -> Any:
    """The front of each cost that has a budget."""
    names = list(result.found[0].costs)
    inside, besides = job.evaluated(result)
    rows = table(
        f"{job.command.model}: {inside:,} of {counted(result.schedules, 'schedule')} evaluated, "
        f"and {besides:,} of other layers; those that no other beats in loss and "
        f"{' or '.join(job.budgets)}",
        "depths by scale",
        *names,
        "loss",
        "to full",
    )
    front = {one.schedule: one for name in job.budgets for one in result.front(name)}
    first = next(iter(job.budgets))
    for one in sorted(front.values(), key=lambda one: (one.costs[first], one.loss)):
        rows.add_row(
            schedule_name(one.depths),
            *(share_text(one.costs[name]) for name in names),
            f"{one.loss:.4f}",
            f"{one.loss - job.full_loss:+z.4f}",
        )
    return rows


def _comparison_table(job: Job, rows: Sequence[Row]) -> Any:
    result = table(
        f"At equal cost, on {counted(job.compared.count, 'other image')}: loss of the other minus "
        "loss of the searched schedule",
        "budget",
        "searched",
        "beside",
        "schedule",
        "difference",
        "verdict",
    )
    for row in (row for row in rows if row.verdict != SAME):
        error = "" if row.error != row.error else f" ± {row.error:.4f}"
        result.add_row(
            f"{row.cost}={row.share:g}",
            schedule_name(row.searched.depths),
            row.name,
            schedule_name(row.other.depths),
            f"{row.difference:+z.4f}{error}",
            row.verdict,
        )
    return result


def _verdicts(rows: Sequence[Row]) -> Iterator[str]:
    """One line for each cost and kind of schedules: at how many budgets the search is better."""
    for cost, name in dict.fromkeys((row.cost, row.name) for row in rows):
        own = [row for row in rows if (row.cost, row.name) == (cost, name)]
        better = sum(row.verdict == "searched is better" for row in own)
        worse = sum(row.verdict == "searched is worse" for row in own)
        text = f"At equal {cost}, searched schedules beat {name} at {better} of {len(own)} budgets"
        if not better:
            text = f"At equal {cost}, searched schedules do not beat {name} at any budget"
        yield text + (f", and are worse at {worse}." if worse else ".")


def _plot(path: Path, job: Job, result: Result, budgets: dict[str, float]) -> None:
    """Loss against each cost: every schedule, the front, and the grid of depth and bridge."""
    plt = pyplot("search")
    names, of_grid = list(result.found[0].costs), set(job.grid().values())
    figure, axes = plt.subplots(
        1, len(names), figsize=(4.5 * len(names), 3.5), sharey=True, layout="constrained"
    )
    for axis, name in zip(axes, names, strict=True):
        points = [(one.costs[name], one.loss) for one in result.found]
        axis.plot(*zip(*points, strict=True), ".", color="0.8", label="evaluated")
        points = [(one.costs[name], one.loss) for one in result.found if one.schedule in of_grid]
        axis.plot(*zip(*points, strict=True), "x", label="depth and bridge")
        points = [(one.costs[name], one.loss) for one in result.front(name)]
        axis.plot(*zip(*points, strict=True), "o-", markersize=3, label="front")
        if name in budgets:
            axis.axvline(budgets[name], linestyle=":", color="0.5")
        axis.set(xlabel=f"{name}, share of the full network")
    axes[0].set(ylabel="held-out loss per token")
    axes[0].legend(fontsize="small")
    save_plot(plt, figure, path)
