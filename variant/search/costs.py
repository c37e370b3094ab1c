"""What a schedule costs, as a share of the full network's: K/V bytes, work, time.

Every cost also has a bound: no schedule that begins with a prefix costs less. Plain Python on
integers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from typing import Protocol

from variant.models.config import VARConfig
from variant.search.space import Layers, Prefix, Space
from variant_kernels.arguments import real
from variant_kernels.plans.cache_plan import CachePlan
from variant_kernels.plans.depth_schedule import DepthSchedule
from variant_kernels.wording import counted

KINDS = ("kv", "work", "latency")


class Cost(Protocol):
    """One cost of the schedules of a space; shares of the full network's."""

    name: str

    def of(self, schedule: Prefix) -> float:
        """Of a whole schedule."""
        ...

    def bound(self, prefix: Prefix) -> float:
        """At most the cost of any schedule of the space that begins with ``prefix``."""
        ...


class KVCost:
    """Peak K/V pages by the exact plan; grows with the layers of any scale.

    Args:
        page_size: tokens per page.
    """

    name = "kv"

    def __init__(self, space: Space, config: VARConfig, page_size: int = 16) -> None:
        self.space, self.layout, self.page_size = space, config.layout, page_size
        self._pages = cache(self._count)
        self._full = self._pages(((*range(space.full_depth),),) * space.num_scales)

    def _count(self, schedule: Prefix) -> int:
        by_scale = DepthSchedule.from_depths(schedule, full_depth=self.space.full_depth)
        return CachePlan(self.layout, by_scale, self.page_size).peak_pages

    def of(self, schedule: Prefix) -> float:
        return self._pages(schedule) / self._full

    def bound(self, prefix: Prefix) -> float:
        rest = self.space.num_scales - len(prefix)
        if rest:
            prefix = prefix + (self.space.common[prefix[-1]],) * rest
        return self.of(prefix)


class AdditiveCost:
    """A cost that is a sum over the scales, each by its number of layers.

    Args:
        by_depth: for each scale, the cost of each depth, >= 0.
    Raises:
        TypeError, ValueError: a depth of the space has no such cost at a scale, or the full network
            costs nothing.
    """

    def __init__(self, name: str, space: Space, by_depth: Sequence[Mapping[int, float]]) -> None:
        self.name, self.space, self.by_depth = name, space, by_depth
        if len(by_depth) != space.num_scales:
            raise ValueError(
                "AdditiveCost: by_depth must have the costs of "
                f"{counted(space.num_scales, 'scale')}; got {len(by_depth)}"
            )
        for scale, costs in enumerate(by_depth):
            for depth in sorted({len(layers) for layers in space.sets}):
                if depth not in costs:
                    raise ValueError(
                        f"AdditiveCost: by_depth[{scale}] must have the cost of depth {depth}, "
                        f"which the space has; got {sorted(costs)}"
                    )
            for depth, cost in costs.items():
                real("AdditiveCost", f"by_depth[{scale}][{depth}]", cost, 0)
        self._full = sum(costs[space.full_depth] for costs in by_depth)
        if not self._full:
            raise ValueError(f"AdditiveCost: {name} of the full network must be above 0; got 0")

    def of(self, schedule: Prefix) -> float:
        return self._sum(schedule) / self._full

    def bound(self, prefix: Prefix) -> float:
        return (self._sum(prefix) + self._rest[len(prefix)][prefix[-1]]) / self._full

    def _sum(self, prefix: Prefix) -> float:
        pairs = zip(self.by_depth, prefix, strict=False)
        return sum(costs[len(layers)] for costs, layers in pairs)

    @cached_property
    def _rest(self) -> list[dict[Layers, float]]:
        """By the number of scales before, and the last one's set: the least of the rest's cost."""
        space = self.space
        rest = [dict.fromkeys(space.sets, 0.0) for _ in range(space.num_scales + 1)]
        for scale in range(space.num_scales - 1, 0, -1):
            for layers in space.sets:
                rest[scale][layers] = min(
                    self.by_depth[scale][len(other)] + rest[scale + 1][other]
                    for other in space.children((layers,))
                )
        return rest


def work_cost(space: Space, config: VARConfig) -> AdditiveCost:
    """FLOP of the blocks' linear layers and the head, as ``models.flops.linear_flop`` counts.

    Guidance runs two sequences per image, but at the first scale's head.
    """
    width = config.embed_dim
    hidden = round(width * config.mlp_ratio)
    layer, head = 2 * (4 * width**2 + 2 * width * hidden), width * config.vocab_size
    costs = [
        {
            depth: 2.0 * tokens * (depth * layer + (1 if scale == 0 else 2) * head)
            for depth in range(1, space.full_depth + 1)
        }
        for scale, tokens in enumerate(config.layout.tokens)
    ]
    return AdditiveCost("work", space, costs)


def latency_cost(space: Space, seconds: Mapping[int, Sequence[float]]) -> AdditiveCost:
    """Measured seconds.

    Args:
        seconds: depth -> seconds of each scale; every depth of the space.
    Raises:
        TypeError, ValueError: as :class:`AdditiveCost`.
    """
    for depth, times in seconds.items():
        if len(times) != space.num_scales:
            raise ValueError(
                f"latency_cost: seconds[{depth}] must have {space.num_scales} numbers, one for "
                f"each scale; got {len(times)}"
            )
    costs = [
        {depth: float(times[scale]) for depth, times in seconds.items()}
        for scale in range(space.num_scales)
    ]
    return AdditiveCost("latency", space, costs)
