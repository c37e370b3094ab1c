"""The schedules among which a search chooses: sets of layers, one for each scale.

Each scale's set is a subset of the previous scale's: the K/V of earlier scales exist only for
layers that ran there. Plain Python on integers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property

from variant_kernels.arguments import integer, integers
from variant_kernels.plans.depth_schedule import MAX_SCALES, check_layers, select_layers

Layers = tuple[int, ...]
# The sets of the first scales, or of all of them.
Prefix = tuple[Layers, ...]

# Depths of a larger model that a search tries by default, as shares of all layers.
SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
SMALL = 8  # layers; of a model with at most so many, every depth is tried


class Space:
    """Sets of layers that a scale may run, and the schedules that they make.

    Args:
        full_depth: layers of the model.
        num_scales: K.
        sets: lists of layers, each ascending with the first and the last layer. All layers are
            always one of them.
    Raises:
        TypeError: a number or a list of another type.  ValueError: out of range.
    """

    def __init__(self, full_depth: int, num_scales: int, sets: Iterable[Sequence[int]]) -> None:
        full_depth = integer("Space", "full_depth", full_depth, 1)
        self.num_scales = integer("Space", "num_scales", num_scales, 1, MAX_SCALES)
        checked = {check_layers(full_depth, layers, "Space", "sets") for layers in sets}
        checked.add(tuple(range(full_depth)))
        self.full_depth = full_depth
        # The deepest first, so that a search by depth begins with the full network.
        self.sets = tuple(sorted(checked, key=lambda layers: (-len(layers), layers)))

    def children(self, prefix: Prefix) -> tuple[Layers, ...]:
        """The sets that the next scale may run, the deepest first."""
        return self._subsets[prefix[-1]] if prefix else self.sets

    @cached_property
    def _subsets(self) -> dict[Layers, tuple[Layers, ...]]:
        return {
            layers: tuple(other for other in self.sets if set(other) <= set(layers))
            for layers in self.sets
        }

    @cached_property
    def common(self) -> dict[Layers, Layers]:
        """The layers that every set within a set has, which is none of more cost."""
        return {
            layers: tuple(sorted(set.intersection(*map(set, subsets))))
            for layers, subsets in self._subsets.items()
        }

    def count(self) -> tuple[int, int]:
        """The number of schedules, and of all prefixes that a search by depth visits."""
        ending = dict.fromkeys(self.sets, 1)
        prefixes = len(self.sets)
        for _ in range(self.num_scales - 1):
            following = dict.fromkeys(self.sets, 0)
            for layers, number in ending.items():
                for other in self._subsets[layers]:
                    following[other] += number
            ending = following
            prefixes += sum(ending.values())
        return sum(ending.values()), prefixes

    def layer_tokens(self, tokens: Sequence[int]) -> int:
        """Layers times tokens of the last scales of all prefixes: what a search by depth runs.

        Args:
            tokens: of each scale.
        """
        ending, total = dict.fromkeys(self.sets, 1), 0
        for scale, count in enumerate(tokens):
            if scale:
                following = dict.fromkeys(self.sets, 0)
                for layers, number in ending.items():
                    for other in self._subsets[layers]:
                        following[other] += number
                ending = following
            total += count * sum(len(layers) * number for layers, number in ending.items())
        return total

    def schedules(self) -> Iterator[Prefix]:
        """Every schedule."""
        stack: list[Prefix] = [()]
        while stack:
            prefix = stack.pop()
            if len(prefix) == self.num_scales:
                yield prefix
            else:
                stack += [(*prefix, layers) for layers in reversed(self.children(prefix))]


def default_depths(full_depth: int, known: Iterable[int] = ()) -> tuple[int, ...]:
    """Depths that a search tries, falling, the full one included.

    Args:
        known: depths that are always among them, e.g. those that the model was trained at.
    """
    full_depth = integer("default_depths", "full_depth", full_depth, 1)
    if full_depth <= SMALL:
        depths = range(min(2, full_depth), full_depth + 1)
    else:
        depths = [round(share * full_depth) for share in SHARES]
    return tuple(sorted({full_depth, *depths, *known}, reverse=True))


def equidistant_sets(full_depth: int, depths: Iterable[int]) -> list[Layers]:
    """The evenly chosen layers of each depth, by both formulas of :func:`select_layers`."""
    sets = [select_layers(full_depth, depth, "nested") for depth in depths]
    return list(
        dict.fromkeys(sets + [select_layers(full_depth, depth, "equidistant") for depth in depths])
    )


def grid(
    full_depth: int, num_scales: int, sets: Iterable[Layers]
) -> dict[tuple[Layers, int], Prefix]:
    """(layers, bridge) -> the schedule that runs every layer before the bridge, then these."""
    every = tuple(range(full_depth))
    return {
        (layers, bridge): (every,) * bridge + (layers,) * (num_scales - bridge)
        for layers in sets
        for bridge in range(num_scales + 1)
    }


def nested_sets(
    full_depth: int,
    depths: Iterable[int],
    influence: Sequence[float],
    loss: Callable[[Layers], float],
    tries: int = 3,
) -> list[Layers]:
    """A set of layers for each depth, every one within the next larger one, without training.

    From all layers down, one layer is left out at a time: of the ``tries`` layers with the least
    influence, the one without which the loss is lowest. The first and the last layer stay.

    Args:
        depths: of the sets to return.
        influence: of each layer: 1 - the cosine between the stream before and after it.
        loss: of a set of layers.
        tries: layers that are tried for each one that is left out; 1 follows influence alone.
    Raises:
        TypeError, ValueError: no number of influence for each layer, or an argument out of range.
    """
    if len(influence) != integer("nested_sets", "full_depth", full_depth, 1):
        raise ValueError(
            f"nested_sets: influence must have {full_depth} numbers, one for each layer; got "
            f"{len(influence)}"
        )
    tries = integer("nested_sets", "tries", tries, 1)
    wanted = set(integers("nested_sets", "depths", list(depths), min(2, full_depth), full_depth))
    layers: Layers = tuple(range(full_depth))
    found = [layers] if full_depth in wanted else []
    while len(layers) > min(wanted, default=full_depth):
        inner = sorted(layers[1:-1], key=lambda layer: influence[layer])[:tries]
        rests = [tuple(other for other in layers if other != layer) for layer in inner]
        layers = rests[0] if len(rests) == 1 else min(rests, key=loss)
        if len(layers) in wanted:
            found.append(layers)
    return found
