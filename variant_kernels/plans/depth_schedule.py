"""Which layers run at which scale.

A depth supernet runs every layer in the bridge zone (the first scales) and a few layers in the
flexible zone. Layers are sampled equidistantly and include the first and the last (VARiant,
equation 2). This module works on integers, without tensors.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from variant_kernels.arguments import choice, instance, integer, integers, sequence, shown, typed
from variant_kernels.plans.scale_layout import MAX_SCALES
from variant_kernels.wording import counted

Selection = Literal["nested", "equidistant"]
SELECTIONS = ("nested", "equidistant")
SCHEDULE_FORMAT = "variant-schedule-1"
# The deepest VAR models have 40 layers; a schedule and a plan list every layer of every scale.
MAX_LAYERS = 1024

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
        TypeError: a number that is no integer.
        ValueError: full_depth not in [1, 1024], depth not in [2, full_depth], or an unknown
            selection.
    """
    op = "select_layers"
    full_depth = integer(op, "full_depth", full_depth, 1, MAX_LAYERS)
    choice(op, "selection", selection, SELECTIONS)
    return _select(op, full_depth, depth, selection)


def _select(
    op: str, full_depth: int, depth: object, selection: str, note: str = ""
) -> tuple[int, ...]:
    # A model of one layer has the depth 1 only.
    depth = integer(op, "depth", depth, min(2, full_depth), full_depth, note)
    if depth == full_depth:
        return tuple(range(full_depth))
    if selection == "equidistant":
        return _sample_equidistant(range(full_depth), depth)
    larger = min(d for d in (*DEPTH_CHAIN, full_depth) if depth < d <= full_depth)
    return _sample_equidistant(_select(op, full_depth, larger, selection), depth)


def check_layers(
    full_depth: int, layers: object, op: str = "DepthSchedule", name: str = "depth"
) -> tuple[int, ...]:
    """Check an explicit list of layers: ascending, unique, with the first and the last layer.

    Raises:
        TypeError: a layer that is no integer.
        ValueError: the list violates this; the message starts with ``op``.
    """
    checked = integers(op, name, layers)
    if not checked or checked[0] != 0 or checked[-1] != full_depth - 1:
        raise ValueError(
            f"{op}: {name}, a list of layers, must start with 0 and end with {full_depth - 1}; "
            f"got {shown(list(checked))}"
        )
    if any(a >= b for a, b in itertools.pairwise(checked)):
        raise ValueError(
            f"{op}: {name}, a list of layers, must be ascending without repeats; "
            f"got {shown(list(checked))}"
        )
    return checked


def resolve_layers(
    full_depth: int, depth: Any, selection: Selection = "nested", op: str = "DepthSchedule"
) -> tuple[int, ...]:
    """Layers of ``depth``: selected if it is a number, checked if it is a list.

    Args:
        depth: a number of layers, or a list, tuple, 1-D array or 1-D tensor of layers.
        op: begins the messages.
    Raises:
        TypeError: depth is neither.
        ValueError: depth out of range, or not a valid list.
    """
    chosen = choice(op, "selection", selection, SELECTIONS)
    if sequence(depth) is not None:
        return check_layers(full_depth, depth, op)
    return _select(op, full_depth, depth, chosen, "(a number of layers), or a list of layers")


def schedule_name(depths: Sequence[int]) -> str:
    """The name of a schedule by scale: ``[8, 8, 8, 8, 4, 2]`` is ``8x4-4-2``."""
    runs = [(depth, len(list(group))) for depth, group in itertools.groupby(depths)]
    return "-".join(f"{depth}x{count}" if count > 1 else f"{depth}" for depth, count in runs)


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
        TypeError: a number that is no integer.
        ValueError: depth, bridge or list out of range; more than 1,024 layers or scales.
    """

    __slots__ = ("_last_scales", "full_depth", "layers")

    full_depth: int
    layers: tuple[tuple[int, ...], ...]
    _last_scales: tuple[int, ...]

    def __init__(
        self,
        full_depth: int,
        num_scales: int,
        depth: int | Sequence[int],
        bridge: int,
        selection: Selection = "nested",
    ) -> None:
        op = "DepthSchedule"
        full_depth = integer(op, "full_depth", full_depth, 1, MAX_LAYERS)
        num_scales = integer(op, "num_scales", num_scales, 1, MAX_SCALES)
        bridge = integer(op, "bridge", bridge, 0, num_scales)
        flexible = resolve_layers(full_depth, depth, selection)
        every = tuple(range(full_depth))
        self._set(full_depth, (every,) * bridge + (flexible,) * (num_scales - bridge))

    def _set(self, full_depth: int, layers: tuple[tuple[int, ...], ...]) -> None:
        """Layers never come back at a later scale, so that the last entry of each is the last."""
        last_scales = [-1] * full_depth
        for scale, active in enumerate(layers):
            for layer in active:
                last_scales[layer] = scale
        self.full_depth, self.layers, self._last_scales = full_depth, layers, tuple(last_scales)

    @classmethod
    def _from_layers(
        cls, op: str, full_depth: int, layers: Sequence[tuple[int, ...]]
    ) -> DepthSchedule:
        for scale in range(1, len(layers)):
            extra = sorted(set(layers[scale]).difference(layers[scale - 1]))
            if extra:
                raise ValueError(
                    f"{op}: the layers of scale {scale} must be a subset of those of scale "
                    f"{scale - 1}, whose K/V they read; layers {shown(extra)} are new. The depth "
                    "can only fall within an image"
                )
        schedule = cls.__new__(cls)
        schedule._set(full_depth, tuple(layers))
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
            TypeError: a depth that is neither an integer nor a list of integers.
            ValueError: a depth out of range, or a scale's layers are not a subset of the previous
                scale's.
        """
        op = "DepthSchedule.from_depths"
        items = sequence(depths)
        if items is None or not 1 <= len(items) <= MAX_SCALES:
            raise (TypeError if items is None else ValueError)(
                f"{op}: depths must be a list of 1 to {MAX_SCALES} depths, one for each scale; "
                f"got {shown(depths)}"
            )
        if full_depth is None:
            first = sequence(items[0])
            full_depth = (
                items[0] if first is None else max(integers(op, "depths[0]", first), default=0) + 1
            )
        full_depth = integer(op, "full_depth", full_depth, 1, MAX_LAYERS)
        return cls._from_layers(
            op, full_depth, [resolve_layers(full_depth, depth, selection, op) for depth in items]
        )

    @classmethod
    def full(cls, full_depth: int, num_scales: int) -> DepthSchedule:
        """Every layer at every scale."""
        return cls(full_depth, num_scales, full_depth, num_scales)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DepthSchedule:
        """The schedule of :meth:`to_dict`'s plain values.

        A key "about" may hold anything: it is not read.

        Raises:
            TypeError: no mapping, or a number or list of another type.
            ValueError: another format, missing or unknown keys, layers out of order or out of
                range, or a scale's layers are not a subset of the previous scale's.
        """
        op = "DepthSchedule.from_dict"
        instance(op, "values", values, Mapping, "DepthSchedule.to_dict makes them")
        if values.get("format") != SCHEDULE_FORMAT:
            raise ValueError(
                f'{op}: "format" must be "{SCHEDULE_FORMAT}"; got {shown(values.get("format"))}'
            )
        known = {"format", "full_depth", "layers"}
        missing, unknown = known - values.keys(), values.keys() - known - {"about"}
        if missing or unknown:
            what = "missing" if missing else "unknown"
            keys = sorted(map(str, missing or unknown))
            raise ValueError(f"{op}: {what} key {shown(keys[0])}")
        full_depth = integer(op, "full_depth", values["full_depth"], 1, MAX_LAYERS)
        scales = sequence(values["layers"])
        if scales is None or not 1 <= len(scales) <= MAX_SCALES:
            raise (TypeError if scales is None else ValueError)(
                f"{op}: layers must be a list of 1 to {MAX_SCALES} lists of layers, one for each "
                f"scale; got {typed(values['layers'])}"
            )
        layers = [
            check_layers(full_depth, active, op, f"layers[{scale}]")
            for scale, active in enumerate(scales)
        ]
        return cls._from_layers(op, full_depth, layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; :meth:`from_dict` is the inverse."""
        return {
            "format": SCHEDULE_FORMAT,
            "full_depth": self.full_depth,
            "layers": [list(active) for active in self.layers],
        }

    def switched(
        self, scale: int, depth: int | Sequence[int], selection: Selection = "nested"
    ) -> DepthSchedule:
        """A schedule with this one's layers before ``scale`` and those of ``depth`` from it on.

        Raises:
            TypeError: scale or depth is no integer (or, depth, no list of them).
            ValueError: out of range, or the new layers are not a subset of the previous scale's.
        """
        op = "DepthSchedule.switched"
        scale = integer(op, "scale", scale, 0, self.num_scales)
        flexible = resolve_layers(self.full_depth, depth, selection, op)
        layers = self.layers[:scale] + (flexible,) * (self.num_scales - scale)
        return self._from_layers(op, self.full_depth, layers)

    @property
    def num_scales(self) -> int:
        """K."""
        return len(self.layers)

    @property
    def depths(self) -> tuple[int, ...]:
        """Number of active layers at each scale."""
        return tuple(len(layers) for layers in self.layers)

    @property
    def name(self) -> str:
        """The depths by scale: ``8x4-4-2`` is depth 8 at four scales, then 4, then 2."""
        return schedule_name(self.depths)

    def active_layers(self, scale: int) -> tuple[int, ...]:
        """Layers that run at ``scale``, ascending.

        Raises:
            ValueError: scale out of range.
        """
        op = "DepthSchedule.active_layers"
        return self.layers[integer(op, "scale", scale, 0, self.num_scales - 1)]

    def is_active(self, layer: int, scale: int) -> bool:
        """Whether ``layer`` runs at ``scale``.

        Raises:
            ValueError: layer or scale out of range.
        """
        op = "DepthSchedule.is_active"
        layer = integer(op, "layer", layer, 0, self.full_depth - 1)
        return layer in self.layers[integer(op, "scale", scale, 0, self.num_scales - 1)]

    def last_scale(self, layer: int) -> int:
        """The last scale at which ``layer`` runs; -1 if it never runs.

        Raises:
            ValueError: layer out of range.
        """
        op = "DepthSchedule.last_scale"
        return self._last_scales[integer(op, "layer", layer, 0, self.full_depth - 1)]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DepthSchedule):
            return NotImplemented
        return self.full_depth == other.full_depth and self.layers == other.layers

    def __hash__(self) -> int:
        return hash((self.full_depth, self.layers))

    def __repr__(self) -> str:
        return f"DepthSchedule(full_depth={self.full_depth}, depths={list(self.depths)})"


def check_schedule(
    op: str,
    schedule: DepthSchedule,
    bridge: object,
    full_depth: int,
    num_scales: int | None,
    name: str = "depth",
) -> DepthSchedule:
    """A schedule that a caller gives as the depth, which must fit the model.

    Args:
        op, name: of the function and its argument, for the messages.
        bridge: the caller's; must be None.
        num_scales: of the model; None takes any.
    Raises:
        ValueError: a bridge is given, or the schedule is of another model.
    """
    if bridge is not None:
        raise ValueError(
            f"{op}: bridge must be None with a schedule, which lists the layers of every scale; "
            f"got {shown(bridge)}"
        )
    scales = schedule.num_scales if num_scales is None else num_scales
    if schedule.full_depth != full_depth or schedule.num_scales != scales:
        raise ValueError(
            f"{op}: {name} must be a schedule of {counted(full_depth, 'layer')} and "
            f"{counted(scales, 'scale')}; got one "
            f"of {schedule.full_depth} and {schedule.num_scales}"
        )
    return schedule
