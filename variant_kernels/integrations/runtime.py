"""State that the patched objects of one model share while it generates."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from variant_kernels.arguments import integer, sequence
from variant_kernels.packed_linear import can_pack, pack, packed_linear
from variant_kernels.plans.depth_schedule import DepthSchedule, check_schedule, resolve_layers
from variant_kernels.tensors import Memory
from variant_kernels.untraced import untraced


@dataclass(frozen=True)
class Stats:
    """Statistics of the last finished generation of a patched model.

    seconds: from opening the first layer's cache to closing the last layer's; later work, such as
        the decoder, is not included.
    kv_planned_bytes, kv_allocated_bytes: bytes of K/V pages in the plan, and as allocated.
    depth, bridge: as set by the caller; depth None is every layer.
    depths: number of layers that ran at each scale.
    """

    seconds: float
    kv_planned_bytes: int
    kv_allocated_bytes: int
    depth: int | tuple[int, ...] | DepthSchedule | None
    bridge: int | None
    depths: tuple[int, ...]


class _CastWeight(NamedTuple):
    """The copy of a module's weight.

    state, memory: version, address and dtype for which it is right, while the memory is not freed.
    """

    module: nn.Module
    weight: Tensor
    state: tuple[int | None, int, torch.dtype]
    memory: Memory
    cast: Tensor


def default_bridge(num_scales: int) -> int:
    """The default number of scales that run every layer: 60 %, as in VARiant's main tables."""
    return math.ceil(0.6 * num_scales)


class Runtime:
    """Depth, cast weights and statistics of one patched model; subclasses add K/V caches.

    Args:
        full_depth: layers of the model.
        num_scales: scales of every generation; None if they differ between generations.
    """

    def __init__(self, full_depth: int, num_scales: int | None) -> None:
        self.full_depth, self.num_scales = full_depth, num_scales
        self.depth: int | tuple[int, ...] | DepthSchedule | None = None
        self.bridge: int | None = None
        self.last: Stats | None = None
        self.generating = False
        self.closed = False  # for generations, by unpatch
        self.keep_copies = False
        self._copies: dict[int, _CastWeight] = {}
        self._started = 0.0
        self._thread = 0
        self._code: CodeType | None = None  # that begins and runs the generation
        # Whose unfinished generation another thread has taken the place of.
        self._displaced: set[int] = set()
        self._running: tuple[int | tuple[int, ...] | DepthSchedule | None, int | None]
        self._running = (None, None)

    # --- depth ----------------------------------------------------------------------------------

    def set_depth(
        self,
        depth: int | Sequence[int] | DepthSchedule | None,
        bridge: int | None,
        op: str = "set_depth",
    ) -> None:
        """Set the depth of later generations.

        Args:
            op: begins the messages.
        Raises:
            TypeError: depth or bridge of another type.  ValueError: out of range.
        """
        if isinstance(depth, DepthSchedule):
            check_schedule(op, depth, bridge, self.full_depth, self.num_scales)
        elif depth is not None:
            layers = resolve_layers(self.full_depth, depth, op=op)
            # As Python's own: an array or a tensor may change later.
            depth = len(layers) if sequence(depth) is None else layers
        if bridge is not None:
            bridge = integer(op, "bridge", bridge, 0, self.num_scales)
        self.depth, self.bridge = depth, bridge

    def schedule(self, num_scales: int) -> DepthSchedule:
        """The schedule of the running generation, or of the next one, for ``num_scales`` scales."""
        depth, bridge = self._running if self.generating else (self.depth, self.bridge)
        if depth is None:
            return DepthSchedule.full(self.full_depth, num_scales)
        if isinstance(depth, DepthSchedule):
            check_schedule("patch", depth, None, self.full_depth, num_scales)
            return depth
        bridge = default_bridge(num_scales) if bridge is None else bridge
        return DepthSchedule(self.full_depth, num_scales, depth, min(bridge, num_scales))

    # --- a generation ---------------------------------------------------------------------------

    def begin(self) -> None:
        """Start a generation; drop the state of an unfinished one.

        Raises:
            RuntimeError: the model is being unpatched.
        """
        self._drop_copies()
        own = threading.get_ident()
        if self.generating and self._thread != own:
            self._displaced.add(self._thread)
        self._displaced.discard(own)
        self.generating, self._running = True, (self.depth, self.bridge)
        self._started, self._thread = time.perf_counter(), own
        frame = sys._getframe(1)
        while frame.f_back is not None and _is_ours(frame):
            frame = frame.f_back
        self._code = frame.f_code
        # Last: either this thread sees that the runtime is closed, or the closing one sees that
        # the model is generating.
        if self.closed:
            self.generating = False
            raise RuntimeError(
                "patch: another thread is unpatching the model; generate again, after that"
            )

    def close(self, model: nn.Module) -> bool:
        """Refuse generations from now on; if one is running, change nothing and return False."""
        self.closed = True
        self.closed = not self.is_generating(model)
        return self.closed

    def is_generating(self, model: nn.Module) -> bool:
        """Whether the model's function that began the last generation is still running.

        After an interruption :attr:`generating` stays true, but the function's frame is gone.
        """
        frame = sys._current_frames().get(self._thread) if self.generating else None
        while frame is not None:
            if frame.f_code is self._code and frame.f_locals.get("self") is model:
                return True
            frame = frame.f_back
        return False

    def check_thread(self, caching: bool) -> None:
        """Refuses to mix K and V of two threads, or to go on without those of this thread.

        Args:
            caching: whether the layer that is called reads K and V of earlier scales.
        Raises:
            RuntimeError: another thread has begun a generation within that of this thread.
        """
        if not caching and not self._displaced:
            return
        own = threading.get_ident()
        if own in self._displaced or (caching and self._thread != own):
            self._displaced.discard(own)
            raise RuntimeError(
                "patch: another thread has begun a generation of this model meanwhile; one patched "
                "model generates in one thread at a time. Use a lock, or patch a copy.deepcopy of "
                "the model for each thread"
            )

    def finish(self, planned_bytes: int, allocated_bytes: int, depths: Sequence[int]) -> None:
        """End a generation: record its statistics and free its weight copies."""
        seconds = time.perf_counter() - self._started
        self.generating = False
        self._drop_copies()
        self.last = Stats(seconds, planned_bytes, allocated_bytes, *self._running, tuple(depths))

    def _drop_copies(self) -> None:
        """Drop all copies, or only those whose weights may be others at the next generation.

        ``fully_shard``, for instance, makes a module's weight anew at each call, and weights made
        under ``torch.inference_mode()`` have no version that tells of a change.
        """
        kept = self._copies.items() if self.keep_copies else ()
        self._copies = {
            key: entry
            for key, entry in kept
            if entry.module._parameters.get("weight") is entry.weight
            and not entry.weight.is_inference()
        }

    @untraced
    def linear(
        self, x: Tensor, module: nn.Module, bias_O: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """``F.linear`` in another dtype, with the module's weight cast once per generation.

        The module needs a weight that :func:`can_cast_once`; there is one copy per module. With
        keep_copies the weight is cast only once. torch's autocast caches copies only of
        weights that require a gradient, and casts all others at every call. If oneDNN computes the
        product, the copy is packed in oneDNN's layout: a plain copy would be reordered at every
        call.
        """
        weight_OI: Any = module._parameters["weight"]
        x = x.to(dtype)
        bias_O = None if bias_O is None else bias_O.to(dtype)
        packed = can_pack(x.device, dtype)
        version = None if weight_OI.is_inference() else weight_OI._version
        state = version, weight_OI.data_ptr(), dtype
        entry = self._copies.get(id(module))
        if (
            entry is None
            or entry.weight is not weight_OI
            or entry.state != state
            or entry.memory.was_freed
        ):
            cast = weight_OI.detach().to(dtype)
            memory = Memory([weight_OI])
            entry = _CastWeight(module, weight_OI, state, memory, pack(cast) if packed else cast)
            self._copies[id(module)] = entry
        if packed:
            return packed_linear(x, entry.cast, bias_O)
        return F.linear(x, entry.cast, bias_O)


def _is_ours(frame: FrameType) -> bool:
    return frame.f_globals.get("__name__", "").startswith("variant_kernels.")


def can_cast_once(module: nn.Module) -> bool:
    """Whether the module's weight is a parameter of its own, with plain values.

    A weight that is computed at each call (weight norm, LoRA as a parametrization,
    ``functional_call``) has nothing that a copy could be kept for, and a quantised or distributed
    one has its own product.
    """
    return type(module._parameters.get("weight")) is nn.Parameter
