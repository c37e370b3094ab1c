"""The search itself: a tree over scales, by depth where it is small, by beam where it is not.

The loss of a scale depends on the layers of its own and of earlier scales only. So a schedule's
loss is a sum over its prefixes, and schedules that begin alike share those losses.

By depth, two bounds cut the tree, and neither loses a schedule that would be on a front: a prefix
whose cheapest schedule costs more than the budget, and a prefix that a whole schedule already found
beats in loss and in every cost; the loss of later scales is at least 0. By beam, the loss of later
scales is taken to be at least that of the full network, which is an estimate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import numpy as np

from variant.search.costs import Cost
from variant.search.space import Prefix, Space
from variant_kernels.arguments import instance, integer, real, typed
from variant_kernels.plans.depth_schedule import check_layers
from variant_kernels.wording import counted

# loss(prefix) -> the part of the loss that the tokens of the prefix's last scale have: a number, or
# one for each image, >= 0. The loss of a schedule is the sum over its prefixes.
Loss = Callable[[Prefix], float | Sequence[float] | np.ndarray]
# report(done, expected, what): of the losses of prefixes.
Report = Callable[[int, int, str], None]
# ahead(prefixes, report): may compute losses that are asked for next, in an order of its own, and
# calls report with the share of them that is done.
Ahead = Callable[[Sequence[Prefix], Callable[[float], None]], None]

# Shares are sums of floats: a schedule exactly at a budget is within it.
ROUNDING = 1e-9
EXACT = 3000  # schedules, up to which every one is evaluated
BEAM = 24  # prefixes that are kept of each scale for each cost


@dataclass(frozen=True)
class Found:
    """A schedule, its mean loss, and its costs by name as shares of the full network's."""

    schedule: Prefix
    loss: float
    costs: Mapping[str, float]

    @property
    def depths(self) -> tuple[int, ...]:
        """Layers of each scale."""
        return tuple(map(len, self.schedule))


@dataclass
class Result:
    """What a search found.

    found: every schedule whose loss was computed, but those that another of them beats in loss and
    all costs.  exact: whether each one that is not in it costs more than a budget, or is beaten so
    by one that is.  schedules: of the space.
    """

    found: list[Found]
    exact: bool
    schedules: int
    budgets: dict[str, float] = field(default_factory=dict)

    def best(self, budgets: Mapping[str, float] | None = None) -> Found | None:
        """The lowest loss within budgets, of equal ones the cheapest; None if there is none.

        Args:
            budgets: shares of the full network's costs; None takes those of the search.
        """
        return best_within(self.found, self.budgets if budgets is None else budgets)

    def front(self, name: str) -> list[Found]:
        """The schedules that no other beats in loss and this cost, the cheapest first."""
        return front(self.found, name)


def best_within(found: Iterable[Found], budgets: Mapping[str, float]) -> Found | None:
    """See :meth:`Result.best`."""
    within = [
        one
        for one in found
        if all(one.costs[name] <= most + ROUNDING for name, most in budgets.items())
    ]
    return min(within, key=lambda one: (one.loss, sum(one.costs.values())), default=None)


def front(found: Iterable[Found], name: str) -> list[Found]:
    """See :meth:`Result.front`."""
    result: list[Found] = []
    for one in sorted(found, key=lambda one: (one.costs[name], one.loss)):
        if not result or one.loss < result[-1].loss:
            result.append(one)
    return result


def search(
    space: Space,
    costs: Sequence[Cost],
    loss: Loss,
    *,
    budgets: Mapping[str, float] | None = None,
    seeds: Iterable[Prefix] = (),
    exact: int = EXACT,
    beam: int = BEAM,
    report: Report = lambda done, expected, what: None,
    ahead: Ahead | None = None,
) -> Result:
    """The schedules of a space with low loss at low costs.

    Args:
        loss: of the last scale of a prefix; called once for each prefix.
        budgets: the name of a cost -> its largest share. Prefixes that exceed one are cut.
        seeds: schedules that are evaluated in any case; they need not be of the space's sets, and
            may exceed the budgets.
        exact: the largest number of schedules that are searched exactly; more are searched by beam.
        beam: prefixes that the beam keeps of each scale for each cost.
        report: called before each loss.
        ahead: called before the losses of many prefixes are asked for. A search by depth names all
            that the budgets leave, so that it computes what the bounds on the loss would cut.
    Raises:
        TypeError: an argument of another type.
        ValueError: a budget without a cost of its name or not in (0, 1], two costs of one name, a
            seed that is no schedule of the space's model, or a loss below 0.
    """
    op = "search"
    instance(op, "space", space, Space)
    exact, beam = integer(op, "exact", exact, 0), integer(op, "beam", beam, 1)
    names = [cost.name for cost in costs]
    if not names:
        raise ValueError(f"{op}: costs must be at least one; got none")
    if len(set(names)) < len(names):
        raise ValueError(f"{op}: costs must have different names; got {', '.join(names)}")
    checked: dict[str, float] = {}
    for name, most in (budgets or {}).items():
        if name not in names:
            raise ValueError(f"{op}: budgets must be of {', '.join(names)}; got {name!r}")
        checked[name] = real(op, f"budgets[{name!r}]", most, 0, 1)
        if not checked[name]:
            raise ValueError(f"{op}: budgets[{name!r}] must be above 0; got 0")
    tree = _Tree(space, costs, loss, checked, report, ahead)
    count, prefixes = space.count()
    is_exact = count <= exact
    tree.expected = prefixes if is_exact else _beam_losses(space, beam * len(costs))
    seeds = [_checked_seed(space, number, seed) for number, seed in enumerate(seeds)]
    tree.announce([seed[:end] for seed in seeds for end in range(1, len(seed) + 1)])
    if is_exact and ahead is not None:
        tree.announce(list(tree.prefixes(())))
    for seed in seeds:
        tree.add(seed)
    if is_exact:
        tree.by_depth((), 0.0)
    else:
        tree.by_beam(beam)
    return Result(list(tree.found.values()), is_exact, count, checked)


def _checked_seed(space: Space, number: int, seed: Prefix) -> Prefix:
    """Raises: TypeError, ValueError, for what is no schedule of the space's model."""
    name = f"seeds[{number}]"
    if len(seed) != space.num_scales:
        raise ValueError(
            f"search: {name} must have layers for each of the "
            f"{counted(space.num_scales, 'scale')}; got {len(seed)}"
        )
    checked = tuple(check_layers(space.full_depth, layers, "search", name) for layers in seed)
    for before, layers in pairwise(checked):
        if not set(layers) <= set(before):
            raise ValueError(
                f"search: {name}: the layers of each scale must be among those of the scale "
                f"before; got {list(layers)} after {list(before)}"
            )
    return checked


def _beam_losses(space: Space, width: int) -> int:
    """About as many losses as a beam computes."""
    return len(space.sets) + (space.num_scales - 1) * width * (len(space.sets) + 1) // 2


class _Tree:
    """One search while it runs."""

    def __init__(
        self,
        space: Space,
        costs: Sequence[Cost],
        loss: Loss,
        budgets: Mapping[str, float],
        report: Report,
        ahead: Ahead | None,
    ) -> None:
        self.space, self.costs, self.budgets, self.report = space, costs, budgets, report
        self.ahead = ahead
        self.found: dict[Prefix, Found] = {}
        self.expected = 0
        self._loss = loss
        self._losses: dict[Prefix, float] = {}
        # Of the found schedules: their losses and costs, for one comparison with all of them.
        self._table = np.empty((0, 1 + len(costs)))

    def loss(self, prefix: Prefix) -> float:
        """Of the last scale; the mean over the images."""
        if prefix not in self._losses:
            depths = "-".join(str(len(layers)) for layers in prefix)
            self.report(len(self._losses), self.expected, depths)
            loss = self._loss(prefix)
            try:
                value = np.asarray(loss, dtype=np.float64)
            except (TypeError, ValueError):
                raise TypeError(f"search: loss must be numbers >= 0; got {typed(loss)}") from None
            if not value.size or not (np.isfinite(value).all() and value.min() >= 0):
                raise ValueError(f"search: loss must be numbers >= 0; got {typed(value.tolist())}")
            self._losses[prefix] = float(value.mean())
        return self._losses[prefix]

    def announce(self, prefixes: Sequence[Prefix]) -> None:
        """Have losses computed that are asked for next."""
        new = [prefix for prefix in dict.fromkeys(prefixes) if prefix not in self._losses]
        if self.ahead is not None and new:
            done = len(self._losses)
            self.ahead(
                new,
                lambda share: self.report(done + int(share * len(new)), self.expected, "by part"),
            )

    def prefixes(self, prefix: Prefix) -> Iterator[Prefix]:
        """Every prefix of the space that begins with this one and is not above a budget."""
        for layers in self.space.children(prefix) if len(prefix) < self.space.num_scales else ():
            following = (*prefix, layers)
            if not self.is_cut(following, 0.0):
                yield following
                yield from self.prefixes(following)

    def add(self, schedule: Prefix) -> None:
        """Evaluate a whole schedule."""
        if schedule in self.found:
            return
        total = 0.0
        for end in range(1, len(schedule) + 1):
            total += self.loss(schedule[:end])
        self._add(schedule, total)

    def _add(self, schedule: Prefix, loss: float) -> None:
        values = {cost.name: cost.of(schedule) for cost in self.costs}
        self.found[schedule] = Found(schedule, loss, values)
        row = np.array([[loss, *values.values()]])
        # Rows that the new one beats cut nothing that it does not cut.
        kept = self._table[~(self._table >= row).all(1)]
        if not (kept <= row).all(1).any():
            self._table = np.concatenate((kept, row))

    def is_cut(self, prefix: Prefix, at_least: float) -> bool:
        """Whether no schedule that begins with this prefix can be wanted.

        Args:
            at_least: no such schedule has a lower loss.
        """
        bounds = [cost.bound(prefix) for cost in self.costs]
        if any(
            cost.name in self.budgets and bound > self.budgets[cost.name] + ROUNDING
            for cost, bound in zip(self.costs, bounds, strict=True)
        ):
            return True
        # A schedule that is as good in everything may be this prefix's own: it is in no table yet.
        return bool((self._table <= np.array([at_least, *bounds])).all(1).any())

    def by_depth(self, prefix: Prefix, loss: float) -> None:
        """Every schedule that begins with ``prefix`` and is not cut; its parts' K/V stay cached."""
        if len(prefix) == self.space.num_scales:
            if prefix not in self.found:
                self._add(prefix, loss)
            return
        for layers in self.space.children(prefix):
            following = (*prefix, layers)
            if not self.is_cut(following, loss):
                total = loss + self.loss(following)
                if not self.is_cut(following, total):
                    self.by_depth(following, total)

    def by_beam(self, width: int) -> None:
        """The best prefixes of each scale, scale by scale."""
        full = (tuple(range(self.space.full_depth)),) * self.space.num_scales
        self.add(full)
        by_scale = [self.loss(full[:end]) for end in range(1, len(full) + 1)]
        # estimate[k]: of the loss of the scales from k on.
        estimate = list(accumulate(reversed(by_scale), initial=0.0))[::-1]
        beam: list[tuple[Prefix, float]] = [((), 0.0)]
        for scale in range(self.space.num_scales):
            nodes = [
                ((*prefix, layers), loss)
                for prefix, loss in beam  # those of one parent one after the other
                for layers in self.space.children(prefix)
                if not self.is_cut((*prefix, layers), loss)
            ]
            self.announce([prefix for prefix, _ in nodes])
            nodes = [(prefix, loss + self.loss(prefix)) for prefix, loss in nodes]
            nodes = [
                node for node in nodes if not self.is_cut(node[0], node[1] + estimate[scale + 1])
            ]
            # Whole schedules cost nothing more: a front has all of them.
            is_last = scale + 1 == self.space.num_scales
            beam = nodes if is_last else self._selected(nodes, width)
        for schedule, loss in beam:
            if schedule not in self.found:
                self._add(schedule, loss)

    def _selected(
        self, nodes: Sequence[tuple[Prefix, float]], width: int
    ) -> list[tuple[Prefix, float]]:
        """For each cost ``width`` nodes: front after front of loss and the cost's bound."""
        kept: set[int] = set()
        for cost in self.costs:
            rows = [(cost.bound(prefix), loss, n) for n, (prefix, loss) in enumerate(nodes)]
            kept |= set(_fronts(rows, width))
        return [nodes[number] for number in sorted(kept)]


def _fronts(rows: Iterable[tuple[float, float, int]], width: int) -> list[int]:
    """The numbers of ``width`` rows (cost, loss, number), front after front.

    Of a front that does not fit, rows at even distances are taken.
    """
    left, taken = sorted(rows), list[int]()
    while left and len(taken) < width:
        best, current, rest = float("inf"), list[int](), []
        for row in left:
            if row[1] < best:
                best = row[1]
                current.append(row[2])
            else:
                rest.append(row)
        room = width - len(taken)
        if len(current) > room:
            places = np.linspace(0, len(current) - 1, room).round().astype(int)
            current = [current[place] for place in dict.fromkeys(places.tolist())]
        taken += current
        left = rest
    return taken
