"""Which layers run at which scale.

A depth supernet runs every layer in the bridge zone (the first scales) and a few layers in the
flexible zone. Layers are sampled equidistantly and include the first and the last (VARiant,
equation 2). This module works on integers, without tensors.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from operator import index
from typing import Literal

Selection = Literal["nested", "equidistant"]

# The depths that the paper trains. Each is sampled from the next larger one, so that the sets are
# nested as the paper claims; applying its formula to the full depth directly does not nest them.
DEPTH_CHAIN = (16, 8, 4, 2)


def _sample_equidistant(layers: Sequence[int], depth: int) -> tuple[int, ...]:
    # round_half_up(i * (n - 1) / (depth - 1)) in exact integer arithmetic.
    last, gaps = len(layers) - 1, depth - 1
    return tuple(layers[(2 * i * last + gaps) // (2 * gaps)] for i in range(depth))


def select_layers(full_depth: int, depth: int, selection: Selection = "nested") -> tuple[int, ...]:
    """Layers of the depth-``depth`` subnet of a ``full_depth``-layer model, ascending.

    ``equidistant``: layer i is ``round_half_up(i * (full_depth - 1) / (depth - 1))``.
    ``nested``: the same formula, applied to the layers of the next larger member of the chain
    (full_depth, 16, 8, 4, 2), so that each depth's layers contain those of every smaller one
    in the chain. Source: VARiant, section 3.2.2.

    Raises:
        ValueError: depth not in [2, full_depth], or an unknown selection.
    """
    if full_depth < 1:
        raise ValueError(f"select_layers: full_depth must be at least 1; got {full_depth}")
    if depth == full_depth:
        return tuple(range(full_depth))
    if not 2 <= depth <= full_depth:
        raise ValueError(f"select_layers: depth must be in [2, {full_depth}]; got {depth}")
    if selection == "equidistant":
        return _sample_equidistant(range(full_depth), depth)
    if selection != "nested":
        raise ValueError(
            f'select_layers: selection must be "nested" or "equidistant"; got {selection!r}'
        )
    larger = [d for d in DEPTH_CHAIN if depth < d < full_depth]
    parent = select_layers(full_depth, min(larger)) if larger else tuple(range(full_depth))
    return _sample_equidistant(parent, depth)


def check_layers(
    full_depth: int, layers: Sequence[int], op: str = "DepthSchedule"
) -> tuple[int, ...]:
    """Check an explicit list of layers: ascending, unique, with the first and the last layer.

    Raises:
        ValueError: the list violates this; the message starts with ``op``.
    """
    try:
        checked = tuple(index(layer) for layer in layers)
    except TypeError:
        raise ValueError(f"{op}: layers must be integers; got {list(layers)}") from None
    if not checked or checked[0] != 0 or checked[-1] != full_depth - 1:
        raise ValueError(
            f"{op}: a list of layers must start with 0 and end with {full_depth - 1}; "
            f"got {list(layers)}"
        )
    if any(a >= b for a, b in itertools.pairwise(checked)):
        raise ValueError(f"{op}: layers must be ascending without repeats; got {list(layers)}")
    return checked


def resolve_layers(
    full_depth: int, depth: int | Sequence[int], selection: Selection = "nested"
) -> tuple[int, ...]:
    """Layers of ``depth``: selected if it is a number, checked if it is a list.

    Raises:
        ValueError: depth out of range, or not a valid list.
    """
    if isinstance(depth, Sequence):
        return check_layers(full_depth, depth)
    try:
        return select_layers(full_depth, index(depth), selection)
    except TypeError:
        raise ValueError(
            f"DepthSchedule: depth must be a number of layers or a list of them; got {depth!r}"
        ) from None


class DepthSchedule:
    """The layers that run at each scale; every scale's layers are a subset of the previous scale's.

    Scales ``0..bridge-1`` run every layer, the others the layers of ``depth``.

    Args:
        full_depth: number of layers D of the model.
        num_scales: K.
        depth: number of layers in the flexible zone (2..D), or their explicit list.
        bridge: number of scales that run every layer, 0..K.
        selection: how a number becomes a list, see :func:`select_layers`.
    Raises:
        ValueError: depth, bridge or list out of range.
    """

    __slots__ = ("full_depth", "layers")

    full_depth: int
    layers: tuple[tuple[int, ...], ...]

    def __init__(
        self,
        full_depth: int,
        num_scales: int,
        depth: int | Sequence[int],
        bridge: int,
        selection: Selection = "nested",
    ) -> None:
        if num_scales < 1:
            raise ValueError(f"DepthSchedule: num_scales must be at least 1; got {num_scales}")
        if not 0 <= bridge <= num_scales:
            raise ValueError(f"DepthSchedule: bridge must be in [0, {num_scales}]; got {bridge}")
        flexible = resolve_layers(full_depth, depth, selection)
        every = tuple(range(full_depth))
        self.full_depth = full_depth
        self.layers = (every,) * bridge + (flexible,) * (num_scales - bridge)

    @classmethod
    def _from_layers(cls, full_depth: int, layers: Sequence[tuple[int, ...]]) -> DepthSchedule:
        for scale in range(1, len(layers)):
            if not set(layers[scale]) <= set(layers[scale - 1]):
                extra = sorted(set(layers[scale]) - set(layers[scale - 1]))
                raise ValueError(
                    f"DepthSchedule: the layers of scale {scale} must be a subset of those of "
                    f"scale {scale - 1}, whose K/V they read; layers {extra} are new"
                )
        schedule = cls.__new__(cls)
        schedule.full_depth = full_depth
        schedule.layers = tuple(layers)
        return schedule

    @classmethod
    def from_depths(
        cls,
        depths: Sequence[int | Sequence[int]],
        *,
        full_depth: int | None = None,
        selection: Selection = "nested",
    ) -> DepthSchedule:
        """One depth (or list of layers) per scale: ``from_depths([30] * 6 + [16, 16, 8, 8])``.

        ``full_depth`` defaults to the depth of the first scale; pass it if no scale runs every
        layer.

        Raises:
            ValueError: a scale's layers are not a subset of the previous scale's.
        """
        if not depths:
            raise ValueError("DepthSchedule.from_depths: needs one depth per scale; got none")
        if full_depth is None:
            first = depths[0]
            full_depth = first if isinstance(first, int) else max(first, default=0) + 1
        return cls._from_layers(
            full_depth, [resolve_layers(full_depth, depth, selection) for depth in depths]
        )

    @classmethod
    def full(cls, full_depth: int, num_scales: int) -> DepthSchedule:
        """Every layer at every scale."""
        return cls(full_depth, num_scales, full_depth, num_scales)

    def switched(
        self, scale: int, depth: int | Sequence[int], selection: Selection = "nested"
    ) -> DepthSchedule:
        """A schedule with this one's layers before ``scale`` and those of ``depth`` from it on.

        Raises:
            ValueError: the new layers are not a subset of the previous scale's.
        """
        if not 0 <= scale <= self.num_scales:
            raise ValueError(
                f"DepthSchedule.switched: scale must be in [0, {self.num_scales}]; got {scale}"
            )
        flexible = resolve_layers(self.full_depth, depth, selection)
        layers = self.layers[:scale] + (flexible,) * (self.num_scales - scale)
        return self._from_layers(self.full_depth, layers)

    @property
    def num_scales(self) -> int:
        """K."""
        return len(self.layers)

    @property
    def depths(self) -> tuple[int, ...]:
        """Number of active layers at each scale."""
        return tuple(len(layers) for layers in self.layers)

    def active_layers(self, scale: int) -> tuple[int, ...]:
        """Layers that run at ``scale``, ascending.

        Raises:
            ValueError: scale out of range.
        """
        if not 0 <= scale < self.num_scales:
            raise ValueError(f"DepthSchedule: scale must be in [0, {self.num_scales}); got {scale}")
        return self.layers[scale]

    def is_active(self, layer: int, scale: int) -> bool:
        """Whether ``layer`` runs at ``scale``."""
        return layer in self.active_layers(scale)

    def last_scale(self, layer: int) -> int:
        """The last scale at which ``layer`` runs; -1 if it never runs."""
        if not 0 <= layer < self.full_depth:
            raise ValueError(
                f"DepthSchedule.last_scale: layer must be in [0, {self.full_depth}); got {layer}"
            )
        # Layers never come back at a later scale, so the number of scales gives the last one.
        return sum(layer in layers for layers in self.layers) - 1

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DepthSchedule):
            return NotImplemented
        return self.full_depth == other.full_depth and self.layers == other.layers

    def __hash__(self) -> int:
        return hash((self.full_depth, self.layers))

    def __repr__(self) -> str:
        return f"DepthSchedule(full_depth={self.full_depth}, depths={list(self.depths)})"
