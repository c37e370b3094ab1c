"""What the patched objects of one model share while it generates."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from variant_kernels.packed_linear import can_pack, pack, packed_linear
from variant_kernels.plans.depth_schedule import DepthSchedule, resolve_layers


@dataclass(frozen=True)
class Stats:
    """The last finished generation of a patched model.

    seconds: from the first layer's cache being opened to the last one's being closed; what comes
        after, such as a decoder, is not in it.
    kv_planned_bytes, kv_allocated_bytes: K/V pages by the plan and as really allocated.
    depth, bridge: as set; None is every layer.  depths: layers that ran at each scale.
    """

    seconds: float
    kv_planned_bytes: int
    kv_allocated_bytes: int
    depth: int | tuple[int, ...] | None
    bridge: int | None
    depths: tuple[int, ...]


def default_bridge(num_scales: int) -> int:
    """Scales that run every layer unless told: 6 of 10 (VARiant's main tables), in proportion."""
    return math.ceil(0.6 * num_scales)


class Runtime:
    """Depth, weight copies and figures of one patched model; families add their caches.

    Args:
        full_depth: layers of the model.
        num_scales: scales of every generation, or None where each generation has its own.
    """

    def __init__(self, full_depth: int, num_scales: int | None) -> None:
        self.full_depth, self.num_scales = full_depth, num_scales
        self.depth: int | tuple[int, ...] | None = None
        self.bridge: int | None = None
        self.last: Stats | None = None
        self.generating = False
        self.keep_copies = False
        self._copies: dict[tuple[int, torch.dtype], tuple[Tensor, int | None, Tensor]] = {}
        self._started = 0.0
        self._running: tuple[int | tuple[int, ...] | None, int | None] = (None, None)

    # --- depth ----------------------------------------------------------------------------------

    def set_depth(self, depth: int | Sequence[int] | None, bridge: int | None) -> None:
        """Depth of the generations to come.

        Raises:
            ValueError: depth or bridge out of range.
        """
        if isinstance(depth, Sequence):
            depth = tuple(depth)
        if depth is not None:
            resolve_layers(self.full_depth, depth)
        most = self.num_scales
        wrong = bridge is not None and (bridge < 0 or (most is not None and bridge > most))
        if wrong:
            limit = "0 or more" if most is None else f"in [0, {most}]"
            raise ValueError(f"set_depth: bridge must be {limit}; got {bridge}")
        self.depth, self.bridge = depth, bridge

    def schedule(self, num_scales: int) -> DepthSchedule:
        """Layers per scale of a generation of so many scales: the one under way, or the next."""
        depth, bridge = self._running if self.generating else (self.depth, self.bridge)
        if depth is None:
            return DepthSchedule.full(self.full_depth, num_scales)
        bridge = default_bridge(num_scales) if bridge is None else bridge
        return DepthSchedule(self.full_depth, num_scales, depth, min(bridge, num_scales))

    # --- a generation ---------------------------------------------------------------------------

    def begin(self) -> None:
        """A generation starts; one that was broken off is forgotten."""
        self._drop_copies()
        self.generating, self._running = True, (self.depth, self.bridge)
        self._started = time.perf_counter()

    def finish(self, planned_bytes: int, allocated_bytes: int, depths: Sequence[int]) -> None:
        """A generation ended; what was kept for it is freed."""
        seconds = time.perf_counter() - self._started
        self.generating = False
        self._drop_copies()
        self.last = Stats(seconds, planned_bytes, allocated_bytes, *self._running, tuple(depths))

    def _drop_copies(self) -> None:
        if not self.keep_copies:
            self._copies.clear()

    def linear(
        self, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """``F.linear`` in another dtype, the weight cast once per generation, or once.

        torch's autocast keeps such copies for weights that require a gradient only, and casts all
        others at every call. Where oneDNN computes the product, the copy lies in its order: a plain
        one would be brought into that order at every call.
        """
        x, key = x.to(dtype), (id(weight_OI), dtype)
        bias_O = None if bias_O is None else bias_O.to(dtype)
        packed = can_pack(x.device, dtype)
        version = None if weight_OI.is_inference() else weight_OI._version
        kept = self._copies.get(key)
        if kept is None or kept[0] is not weight_OI or kept[1] != version:
            copy = weight_OI.detach().to(dtype)
            kept = weight_OI, version, pack(copy) if packed else copy
            self._copies[key] = kept
        if packed:
            return packed_linear(x, kept[2], bias_O)
        return F.linear(x, kept[2], bias_O)
