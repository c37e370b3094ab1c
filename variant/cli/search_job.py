"""The work of ``variant search``: losses, costs, the search and the comparison, resumable."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from variant.bench.environment import environment
from variant.cli.generate import fingerprint
from variant.cli.options import Search
from variant.cli.progress import Advance, progress
from variant.engine.engine import Engine, kernels_of
from variant.engine.planning import depths_of
from variant.errors import UserError
from variant.files import atomic_write
from variant.paths import json_text, path_kind
from variant.search.compare import Row, compare
from variant.search.costs import Cost, KVCost, latency_cost, work_cost
from variant.search.data import HeldOut, held_out
from variant.search.latency import FORMAT as LATENCY_FORMAT
from variant.search.latency import measure_beside_full, measure_seconds, read_seconds
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
from variant_kernels.wording import counted

RECORD, SCHEDULE, LATENCY = "search.json", "schedule.json", "latency.json"
# Budgets at which searched schedules are compared with others, besides those asked for.
LEVELS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
REPEATS = 5


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
        self.data = command.data or command.model  # a model of the package has its data's name
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
        self._check_reachable()
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
            f"search: {counted(count, 'schedule')} of {counted(len(space.sets), 'set')} of layers, "
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
        """Raises: UserError, if the least cost of any schedule is above a budget.

        That of latency is known once times are measured.
        """
        depth, scales = self.config.depth, self.num_scales
        known = [*self.recorded, *(layers for layers, _ in self.grid())]
        layers = equidistant_sets(depth, [min(*self.depths, *map(len, known))])[0]
        costs = self.costs(Space(depth, scales, [layers]))
        least = {cost.name: cost.of((layers,) * scales) for cost in costs}
        if self.seconds is not None:  # a measured time need not rise with the depth
            by_scale = zip(*self.seconds.values(), strict=True)
            least["latency"] = sum(map(min, by_scale)) / sum(self.seconds[depth])
        if any(least.get(name, 0) > most + ROUNDING for name, most in self.budgets.items()):
            raise UserError(no_schedule_text(least, self.budgets, "the least possible is"))

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
        texts = [f"{len(layers)}: {' '.join(map(str, layers))}" for layers in sets[1:]]
        if texts:  # a model of two layers has no smaller set
            say("search: layers by influence and loss: " + "; ".join(texts))
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
            temporary.write_text(json_text({**values, "seconds": seconds}, 1) + "\n")
        return seconds

    def measured_latency(self, best: Found) -> dict[str, float] | None:
        """The time of the schedule itself, beside which the table's sum can be judged.

        Returns:
            its seconds, the full network's, and their ratio; None without a budget of latency.
        """
        if self.seconds is None:
            return None
        own, full = measure_beside_full(
            Engine(self.model.var, self.model.vae),
            self.schedule_of(best),
            batch=self.command.batch,
            repeats=REPEATS,
        )
        return {"seconds": own, "full_seconds": full, "share": own / full}


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


def budgets_text(budgets: dict[str, float]) -> str:
    """``kv=0.5, work=0.6``."""
    return ", ".join(f"{name}={share:g}" for name, share in budgets.items())


def share_text(share: float) -> str:
    """A cost with three digits, rounded up: as a budget, the number is met by what costs that."""
    return f"{math.ceil((share - ROUNDING) * 1000) / 1000:.3f}"


def no_schedule_text(least: dict[str, float], budgets: dict[str, float], what: str) -> str:
    """Says that no schedule is within the budgets, and which costs are the least."""
    text = ", ".join(f"{name} {share_text(least[name])}" for name in budgets if name in least)
    return (
        f"search: no schedule is within {budgets_text(budgets)}; {what} {text}. Give a larger "
        "--budget, or smaller --depths"
    )
