"""``variant search``: the layers of every scale under a budget, without training."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from variant.bench.environment import environment
from variant.cli.generate import fingerprint
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
from variant.cli.progress import Advance, progress
from variant.cli.pyplot import check_plot, pyplot, save_plot
from variant.cli.words import command_line
from variant.engine.engine import Engine
from variant.engine.planning import depths_of, schedule_row
from variant.errors import UserError
from variant.files import atomic_write
from variant.models.placement import check_device
from variant.paths import path_kind, shown
from variant.schedule_files import save_schedule
from variant.search.compare import SAME, Row, compare
from variant.search.costs import KINDS, Cost, KVCost, latency_cost, work_cost
from variant.search.data import HeldOut, held_out
from variant.search.latency import FORMAT as LATENCY_FORMAT
from variant.search.latency import kernels_of, measure_seconds, read_seconds
from variant.search.losses import ForcedLosses, subnet_schedule
from variant.search.saved import SavedLosses, losses_file
from variant.search.space import (
    Layers,
    Prefix,
    Space,
    default_depths,
    equidistant_sets,
    grid,
    nested_sets,
)
from variant.search.tree import ROUNDING, Found, Result, search
from variant.supernet import VARiant
from variant_kernels import DepthSchedule
from variant_kernels.arguments import integer
from variant_kernels.plans.depth_schedule import schedule_name

FORMAT = "variant-search-1"
RECORD, SCHEDULE, LATENCY = "search.json", "schedule.json", "latency.json"
LOSSES = "losses-*.safetensors"
DIGITS = "digits"  # the model, and its data
WEIGHTS = (".pth", ".pt", ".safetensors")
# Budgets at which searched schedules are compared with others, besides those asked for.
LEVELS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
REPEATS = 5
MAX_IMAGES = 10**6
MAX_BATCH = 2**12


def search_command(command: Search) -> None:
    """Search, print the front and the comparison, and write the schedule and the record."""
    budgets = _check(command)
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
        raise UserError(_no_schedule(least, budgets, "the least that was found is"))
    text = ", ".join(f"{name} {best.costs[name]:.3f}" for name in best.costs)
    out.print(
        f"Within {_budgets_text(budgets)}: {schedule_name(best.depths)}, loss {best.loss:.4f} "
        f"({best.loss - job.full_loss:+.4f} to the full network), {text}"
    )
    record = job.record(result, rows, best, time.monotonic() - started)
    save_schedule(
        job.folder / SCHEDULE,
        job.schedule_of(best),
        {"model": command.model, "data": job.data, "budget": budgets, "costs": {**best.costs}},
    )
    with atomic_write(job.folder / RECORD) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n")
    out.print(f"wrote {job.folder / SCHEDULE}, {job.folder / RECORD}")
    if command.plot is not None:
        _plot(command.plot, job, result, budgets)
        out.print(f"wrote {command.plot}")
    write_json(command.json, record)


def _check(command: Search) -> dict[str, float]:
    """The budgets; refuses what can be refused without a model.

    Raises:
        UserError, ValueError: an option that cannot be used.
    """
    budgets = parse_budgets(command.budget)
    if command.data is None and command.model != DIGITS:
        raise UserError("search: --data must name the images whose loss counts")
    integer("search", "--images", command.images, 2, MAX_IMAGES)
    integer("search", "--batch", command.batch, 1, MAX_BATCH)
    integer("search", "--exact", command.exact, 0)
    integer("search", "--beam", command.beam, 1)
    for depth in command.depths:
        integer("search", "--depths", depth, 1)
    check_device("search", command.device, name="--device")
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
        found = sorted(command.out.glob(LOSSES)) if command.out.is_dir() else []
        if not command.resume and (found or (command.out / RECORD).exists()):
            raise UserError(
                f"{command.out}: holds an earlier search; give --resume to use its losses, or "
                "another --out"
            )
    return budgets


def _is_own_name(name: str) -> bool:
    """Whether a search writes files of this name into its folder."""
    return name in (RECORD, SCHEDULE, LATENCY) or fnmatch(name, LOSSES)


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


@dataclass
class _Clock:
    """Says how much is left, from the losses that are done."""

    advance: Advance
    started: float
    total: int = 0
    done: int = 0
    before: int = 0

    def next(self) -> None:
        """The next search counts from here on."""
        self.before = self.done

    def report(self, done: int, expected: int, what: str) -> None:
        done, expected = self.before + done, max(self.total, self.before + expected)
        if done <= self.done:
            return
        left = (time.monotonic() - self.started) / done * max(expected - done, 0)
        about = timedelta(seconds=round(left))
        self.advance(done - self.done, f"{what}, about {about} left")
        self.done = done


class Job:
    """One search: model, images, losses and costs.

    Args:
        budgets: the name of a cost -> its largest share.
    """

    def __init__(self, command: Search, model: VARiant, budgets: dict[str, float]) -> None:
        self.command, self.model, self.budgets = command, model, budgets
        self.config, self.folder = model.var.config, command.out
        model.var.eval()
        depths = command.depths or default_depths(self.config.depth, depths_of(self.config))
        low = min(2, self.config.depth)
        for depth in depths:
            integer("search", "--depths", depth, low, self.config.depth)
        self.depths = tuple(sorted({self.config.depth, *depths}, reverse=True))
        self.weights = fingerprint(model)
        self.data = command.data or DIGITS
        self.images = held_out(model, self.data, command.images)
        chosen, compared = self.images.halves()
        self.losses, self.compared = self._saved(chosen), self._saved(compared)
        self.full_loss = float("nan")
        self.seconds: dict[int, list[float]] | None = None
        self.influence: list[float] = []
        self.sets: list[Layers] = []
        self.recorded = [layers for d, layers in self.config.subnets.items() if d in self.depths]

    def _saved(self, images: HeldOut) -> SavedLosses:
        model = self.model
        losses = ForcedLosses(model.var, model.vae, images.labels_N, images.tokens_NL)
        return SavedLosses(
            losses,
            losses_file(
                self.folder,
                self.weights,
                {"var": model.var.config.to_dict(), "vae": model.vae.config.to_dict()},
                model.var.pos_start.device.type,
                images.labels_N,
                images.tokens_NL,
            ),
            count=len(images.labels_N),
            num_scales=self.num_scales,
            full_depth=self.config.depth,
            read=self.command.resume,
            # Without memory for all images at once: each part of them by itself.
            parts=() if losses.is_whole else losses.parts,
        )

    @property
    def forced(self) -> ForcedLosses:
        """What computes the losses of the images that choose."""
        losses = self.losses.losses
        assert isinstance(losses, ForcedLosses), "made by __init__"
        return losses

    @property
    def num_scales(self) -> int:
        """K."""
        return self.model.var.layout.num_scales

    @property
    def num_known(self) -> int:
        """Losses of prefixes, of both halves of the images."""
        return self.losses.num_known + self.compared.num_known

    def save(self) -> None:
        """Write the losses."""
        self.losses.save()
        self.compared.save()

    def schedule_of(self, found: Found) -> DepthSchedule:
        """As the engine takes it."""
        return DepthSchedule.from_depths(found.schedule, full_depth=self.config.depth)

    # --- the search -----------------------------------------------------------------------------

    def run(self, say: Callable[[str], None]) -> Result:
        """Measure times where a budget needs them, choose the layers, and search.

        Args:
            say: prints a line.
        Raises:
            UserError: no schedule can be within a budget.
        """
        every = tuple(range(self.config.depth))
        full = (every,) * self.num_scales
        if "latency" in self.budgets:
            self.seconds = self._seconds(say)
        self._check_reachable()
        before, started = self.losses.computed, time.monotonic()
        self.full_loss = float(self.losses.of_schedule(full).mean())
        of_full = time.monotonic() - started if self.losses.computed > before else None
        say(
            f"search: {self.images.name}, half to choose and half to compare; the full network "
            f"loses {self.full_loss:.4f} per token"
        )
        self.sets = self._layers(say)
        space = Space(self.config.depth, self.num_scales, [*self.sets, *self.recorded])
        even = Space(self.config.depth, self.num_scales, self._equidistant())
        count, prefixes = space.count()
        exact = count <= self.command.exact
        estimate = ""
        if of_full is not None and exact:
            tokens = self.model.var.layout.tokens
            share = space.layer_tokens(tokens) / (len(every) * sum(tokens))
            estimate = f", at most about {timedelta(seconds=round(share * of_full))}"
        say(
            f"search: {count:,} schedules of {len(space.sets)} sets of layers, "
            f"{'each evaluated or excluded' if exact else 'by beam'}, "
            f"{prefixes:,} prefixes{estimate}"
        )
        seeds = list(self.grid().values())
        of_even, prefixes_of_even = even.count()
        with self._progress("schedules", prefixes + prefixes_of_even if exact else 0) as clock:
            result = self._search(space, seeds, clock.report, exact)
            clock.next()
            with_even = self._search(even, [], clock.report, of_even <= self.command.exact)
        self.save()
        self.forced.forget()  # the comparison's images have K and V of their own
        # Evenly chosen layers are among those that a search may take.
        found = {one.schedule: one for one in [*with_even.found, *result.found]}
        # Where one of the two left out what is above the budgets, all are compared within them.
        budgets = {**with_even.budgets, **result.budgets}
        return Result(list(found.values()), result.exact, result.schedules, budgets)

    def _check_reachable(self) -> None:
        """Raises: UserError, if the least cost of any schedule is above a budget."""
        depth, scales = self.config.depth, self.num_scales
        known = [*self.recorded, *(layers for layers, _ in self.grid())]
        layers = equidistant_sets(depth, [min(*self.depths, *map(len, known))])[0]
        costs = self.costs(Space(depth, scales, [layers]))
        least = {cost.name: cost.of((layers,) * scales) for cost in costs}
        if self.seconds is not None:  # a measured time need not rise with the depth
            by_scale = zip(*self.seconds.values(), strict=True)
            least["latency"] = sum(map(min, by_scale)) / sum(self.seconds[depth])
        if any(least[name] > most + ROUNDING for name, most in self.budgets.items()):
            raise UserError(_no_schedule(least, self.budgets, "the least possible is"))

    def _search(self, space: Space, seeds: Sequence[Prefix], report: Any, exact: bool) -> Result:
        # A front is of use beyond the budget where nothing has to be left out for it.
        return search(
            space,
            self.costs(space),
            self.losses,
            budgets=None if exact else self.budgets,
            seeds=seeds,
            exact=self.command.exact,
            beam=self.command.beam,
            report=report,
            ahead=self.losses.fill if len(self.losses.parts) > 1 else None,
        )

    @contextmanager
    def _progress(self, doing: str, total: int) -> Iterator[_Clock]:
        """Progress within the block; total: losses of prefixes, 0 if that is not known."""
        with progress("search", doing, total, self.command.json) as advance:
            yield _Clock(advance, time.monotonic(), total)

    def costs(self, space: Space) -> list[Cost]:
        """Those of the schedules of a space."""
        costs: list[Cost] = [KVCost(space, self.config), work_cost(space, self.config)]
        if self.seconds is not None:
            costs.append(latency_cost(space, self.seconds))
        return costs

    def _layers(self, say: Callable[[str], None]) -> list[Layers]:
        """A set of layers for each depth: by influence, then by the loss after the bridge."""
        depth, scales = self.config.depth, self.num_scales
        self.influence = self.forced.influence()
        bridge = self.config.bridge
        bridge = scales // 2 if bridge is None else min(bridge, scales - 1)
        tried = max(depth - self.depths[-1], 0) * 3
        with self._progress("layers", tried) as clock:
            done = 0

            def loss(layers: Layers) -> float:
                nonlocal done
                clock.report(done, tried, f"layers of depth {len(layers)}")
                done += 1
                schedule = subnet_schedule(layers, depth, scales, bridge)
                return float(self.losses.of_schedule(schedule).mean())

            sets = nested_sets(depth, self.depths, self.influence, loss)
        say(
            "search: layers by influence and loss: "
            + "; ".join(f"{len(s)}: {' '.join(map(str, s))}" for s in sets[1:])
        )
        return sets

    def _equidistant(self) -> list[Layers]:
        return [*equidistant_sets(self.config.depth, self.depths), *self.recorded]

    def grid(self) -> dict[tuple[Layers, int], Prefix]:
        """Every depth of the model at every bridge, with the layers that it was trained with."""
        depths = depths_of(self.config)
        sets = [*self.config.subnets.values()] or equidistant_sets(self.config.depth, depths)
        return grid(self.config.depth, self.num_scales, sets)

    def compare(self, result: Result) -> list[Row]:
        """Searched schedules beside equidistant or trained layers and the grid, on other images."""
        even, of_grid = set(self._equidistant()), set(self.grid().values())
        every = tuple(range(self.config.depth))
        others = {
            "equidistant or trained layers": [
                one for one in result.found if set(one.schedule) <= {*even, every}
            ],
            "depth and bridge": [one for one in result.found if one.schedule in of_grid],
        }
        # A beam looks within the budgets only, which the seeds of the grid exceed: then nothing
        # above them is compared, nor at a cost for which the beam had no budget.
        kinds = list(result.budgets or result.found[0].costs)
        levels = [
            (kind, share)
            for kind in kinds
            for share in sorted({*LEVELS, self.budgets.get(kind, LEVELS[0])})
            if share <= result.budgets.get(kind, 1)
        ]
        rows = compare(result.found, others, levels, self.compared.of_schedule, result.budgets)
        self.compared.save()
        return rows

    def evaluated(self, result: Result) -> tuple[int, int]:
        """Schedules of the searched sets of layers whose loss is known, and other schedules."""
        sets = {*self.sets, *self.recorded, tuple(range(self.config.depth))}
        inside = sum(sets.issuperset(one.schedule) for one in result.found)
        return inside, len(result.found) - inside

    # --- times ----------------------------------------------------------------------------------

    def _seconds(self, say: Callable[[str], None]) -> dict[int, list[float]]:
        """The table of times: that of the folder, or measured now and written there."""
        command, path = self.command, self.folder / LATENCY
        engine = Engine(self.model.var, self.model.vae)
        settings = _times_settings(command, engine, self.weights)
        of_grid = {len(layers) for layers, _ in self.grid()}
        sets = {len(s): s for s in equidistant_sets(self.config.depth, {*of_grid, *self.depths})}
        if command.resume and path_kind(path) is not None:
            seconds = read_seconds(path, settings, self.num_scales)
            if seconds is not None and sets.keys() <= seconds.keys():
                say(f"search: times of {path}, measured on {settings['gpu'] or settings['cpu']}")
                return seconds
            say(f"search: {path} is of another machine or other settings; measuring again")
        total = (REPEATS + 1) * len(sets)
        with progress("search", "times", total, command.json) as advance:
            seconds = measure_seconds(
                engine,
                list(sets.values()),
                batch=command.batch,
                repeats=REPEATS,
                report=lambda: advance(1, "time of each scale at each depth"),
            )
        with atomic_write(path) as temporary:
            values = {"format": LATENCY_FORMAT, **settings, "repeats": REPEATS}
            # The callback by which the scales are timed keeps an engine from recording graphs.
            values["cuda_graphs"] = False
            temporary.write_text(json.dumps({**values, "seconds": seconds}, indent=1) + "\n")
        return seconds

    # --- the record -----------------------------------------------------------------------------

    def as_dict(self, found: Found) -> dict[str, Any]:
        """A schedule with its loss and costs, as plain values."""
        schedule = self.schedule_of(found)
        row = schedule_row(self.config, schedule, 1, self.model.var.head.weight.dtype)
        return {
            "name": schedule.name,
            "loss": found.loss,
            "difference_to_full": found.loss - self.full_loss,
            "costs": dict(found.costs),
            "kv_bytes": row.ours,
            "layers": [list(layers) for layers in found.schedule],
        }

    def record(
        self, result: Result, rows: Sequence[Row], best: Found, seconds: float
    ) -> dict[str, Any]:
        """Everything that the search found, as plain values."""
        command = self.command
        return {
            "format": FORMAT,
            "model": command.model,
            "data": self.data,
            "images": self.losses.count,
            "images_compared": self.compared.count,
            "weights": self.weights,
            "budget": self.budgets,
            "depths": list(self.depths),
            "sets": [list(layers) for layers in self.sets],
            "influence": self.influence,
            "full_loss": self.full_loss,
            "exact": result.exact,
            "schedules": result.schedules,
            "evaluated": self.evaluated(result)[0],
            "evaluated_besides": self.evaluated(result)[1],
            "best": self.as_dict(best),
            "front": {
                name: [self.as_dict(one) for one in result.front(name)] for name in best.costs
            },
            "comparison": [
                {
                    "cost": row.cost,
                    "share": row.share,
                    "with": row.name,
                    "searched": schedule_name(row.searched.depths),
                    "other": schedule_name(row.other.depths),
                    "difference": row.difference,
                    "standard_error": None if row.error != row.error else row.error,
                    "verdict": row.verdict,
                }
                for row in rows
            ],
            "seconds_per_scale": self.seconds,
            "seconds": round(seconds, 2),
            "environment": environment(),
        }


def _times_settings(command: Search, engine: Engine, weights: str) -> dict[str, Any]:
    """All that measured times depend on, as plain values."""
    machine = environment()
    return {
        **{key: machine[key] for key in ("cpu", "isa", "gpu", "threads", "torch")},
        "kernels": kernels_of(engine),
        "device": command.device,
        "batch": command.batch,
        "weights": weights,
    }


# --- printing -----------------------------------------------------------------------------------


def _budgets_text(budgets: dict[str, float]) -> str:
    return ", ".join(f"{name}={share:g}" for name, share in budgets.items())


def _no_schedule(least: dict[str, float], budgets: dict[str, float], what: str) -> str:
    text = ", ".join(f"{name} {least[name]:.3f}" for name in budgets)
    return (
        f"search: no schedule is within {_budgets_text(budgets)}; {what} {text}. Give a larger "
        "--budget, or smaller --depths"
    )


def _front_table(job: Job, result: Result) -> Any:
    """The front of each cost that has a budget."""
    names = list(result.found[0].costs)
    inside, besides = job.evaluated(result)
    rows = table(
        f"{job.command.model}: {inside:,} of {result.schedules:,} schedules evaluated, and "
        f"{besides:,} of other layers; those that no other beats in loss and "
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
            *(f"{one.costs[name]:.3f}" for name in names),
            f"{one.loss:.4f}",
            f"{one.loss - job.full_loss:+.4f}",
        )
    return rows


def _comparison_table(job: Job, rows: Sequence[Row]) -> Any:
    result = table(
        f"At equal cost, on {job.compared.count:,} other images: loss of the other minus loss of "
        "the searched schedule",
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
            f"{row.difference:+.4f}{error}",
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
