"""State of one generation of a patched VAR: scale, K/V pages, projections of the class condition.

Axes: B sequences, T tokens of this call, H heads, D width of one head, 3 queries, keys and values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from variant_kernels.dispatch.request import dtype_name
from variant_kernels.integrations.cast_once import autocast_dtype
from variant_kernels.integrations.runtime import PatchError, Runtime
from variant_kernels.kv_cache import KVStep, KVStore, PagedKVCache, PageTables
from variant_kernels.plans.cache_plan import CachePlan
from variant_kernels.plans.depth_schedule import DepthSchedule
from variant_kernels.plans.scale_layout import ScaleLayout
from variant_kernels.untraced import untraced
from variant_kernels.wording import counted


class Layers:
    """The model's blocks and their attention, as they were when the model was patched.

    Args:
        name: of the model's list of blocks.  attention: name of a block's attention.
        current: returns the blocks in the order in which the model runs them.
    """

    def __init__(self, name: str, attention: str, current: Callable[[], list[nn.Module]]) -> None:
        self._name, self._attention, self._current = name, attention, current
        self._blocks = current()
        self._attentions = [getattr(block, attention) for block in self._blocks]

    def __len__(self) -> int:
        return len(self._blocks)

    def check(self) -> None:
        """Raises: PatchError if a block or its attention is not the one that was patched."""
        blocks = self._current()
        for index, (now, patched) in enumerate(zip_longest(blocks, self._blocks)):
            if now is patched:
                attention = getattr(now, self._attention, None)
                if attention is self._attentions[index]:
                    continue
                what = f"{self._name}[{index}].{self._attention} is another module than"
            elif now is None:
                what = f"the model has {counted(len(blocks), 'block')}, not the {len(self)} of"
            else:
                what = f"{self._name}[{index}] is another module than"
            raise PatchError(
                f"patch: {what} when the model was patched (blocks were replaced, reordered, "
                "added or deleted); call unpatch() first and patch the new model"
            )


class VARRuntime(Runtime):
    """The current scale, the K/V cache of all layers and the projections of the class condition.

    Args:
        layout: tokens per scale.
        layers: the model's blocks.
    """

    def __init__(self, layout: ScaleLayout, layers: Layers) -> None:
        super().__init__(len(layers), layout.num_scales)
        self.layout, self._layers = layout, layers
        self._open_layers: set[int] = set()
        self._page_tables: tuple[Any, PageTables] = (None, {})
        self._clear()

    def _clear(self) -> None:
        self._seen = 0  # tokens of this generation, including the current step
        self._step = -1  # calls of the first layer, from 0
        self._merged: tuple[ScaleLayout, DepthSchedule] | None = None
        self._cache: PagedKVCache | None = None
        self._hoisted: dict[int, tuple[Tensor, Any, Any]] = {}

    # --- begin and end --------------------------------------------------------------------------

    @untraced
    def caching(self, layer: int, enable: bool) -> None:
        """Record that a layer opens or closes its cache.

        The first layer to open starts a generation, the last to close ends it.
        """
        if enable:
            if not self.generating or layer in self._open_layers:
                self._layers.check()
                self._open_layers.clear()
                self._clear()
                self.begin()
            self._open_layers.add(layer)
        elif self.generating:
            self._open_layers.discard(layer)
            if not self._open_layers:
                self._end()

    def _end(self) -> None:
        planned = allocated = 0
        if self._cache is not None:
            pages = self._cache.k_pages
            planned = self._cache.plan.peak_bytes(
                self._cache.batch, pages.shape[2], pages.shape[3], pages.dtype, guidance=False
            )
            allocated = self._cache.allocated_bytes
            if pages.is_cuda:
                torch.cuda.synchronize(pages.device)
        depths = self.schedule(self.layout.num_scales).depths
        self._clear()
        self.finish(planned, allocated, depths)

    # --- scales ---------------------------------------------------------------------------------

    @untraced
    def tokens_for(self, layer: int, tokens: int) -> int:
        """The number of tokens, from the first on, that the layer processes; it skips the rest.

        Raises:
            PatchError: the tokens are not those of one scale (the first call: of several), or
                another thread generates.
        """
        self.check_thread(True)
        if layer == 0:
            self._advance(tokens)
        last = self.schedule(self.layout.num_scales).last_scale(layer)
        end = 0 if last < 0 else self.layout.visible(last)
        return min(max(end - (self._seen - tokens), 0), tokens)

    def _advance(self, tokens: int) -> None:
        begin, end = self._seen, self._seen + tokens
        ends = dict(zip(self.layout.offsets, self._ends, strict=True))
        fits = end in self._ends if begin == 0 else ends.get(begin) == end
        if not fits:
            raise PatchError(
                f"patch: after {counted(begin, 'token')} the model must generate one complete "
                f"scale of {self.layout.tokens} (the first call may have several); got "
                f"{counted(tokens, 'token')}. Other ways to generate need unpatch()"
            )
        self._seen, self._step = end, self._step + 1

    @property
    def _ends(self) -> tuple[int, ...]:
        return (*self.layout.offsets[1:], self.layout.total)

    def _plan(self) -> tuple[ScaleLayout, DepthSchedule]:
        """Layout and schedule by steps: the scales of the first call are one step."""
        if self._merged is None:
            schedule = self.schedule(self.layout.num_scales)
            rest = slice(self._ends.index(self._seen) + 1, None)
            layout = ScaleLayout(((1, self._seen), *self.layout.shapes[rest]))
            layers = [schedule.layers[0], *schedule.layers[rest]]
            self._merged = layout, DepthSchedule.from_depths(layers, full_depth=self.full_depth)
        return self._merged

    # --- K and V --------------------------------------------------------------------------------

    @untraced
    def open_pages(self, qkv_BT3HD: Tensor) -> PagedKVCache:
        """The cache of all layers, created at the first call of a generation.

        Raises:
            PatchError: the batch size changed within the generation.
        """
        if self._cache is None:
            layout, schedule = self._plan()
            batch, _, _, heads, head_dim = qkv_BT3HD.shape
            key = layout, schedule, batch, qkv_BT3HD.device
            if self._page_tables[0] != key:
                self._page_tables = key, {}
            self._cache = PagedKVCache(
                CachePlan(layout, schedule),
                batch,
                heads,
                head_dim,
                qkv_BT3HD.dtype,
                qkv_BT3HD.device,
                page_tables=self._page_tables[1],
            )
        if self._cache.batch != qkv_BT3HD.shape[0]:
            raise PatchError(
                f"patch: the batch size changed from {self._cache.batch} to {qkv_BT3HD.shape[0]} "
                "within a generation; that needs unpatch()"
            )
        if self._cache.k_pages.dtype != qkv_BT3HD.dtype:
            raise PatchError(
                f"patch: the dtype changed from {dtype_name(self._cache.k_pages.dtype)} to "
                f"{dtype_name(qkv_BT3HD.dtype)} within a generation (weights or autocast changed); "
                "generate anew"
            )
        return self._cache

    @property
    def step(self) -> int:
        """The current step, from 0."""
        return self._step

    @property
    def seen(self) -> int:
        """Tokens of this generation so far, including the current step."""
        return self._seen

    # --- projections of the class condition -----------------------------------------------------

    @untraced
    def hoisted(self, key: int, cond: Tensor, compute: Any) -> Any:
        """The result of ``compute()``, computed once per generation and condition.

        It is reused for the same tensor ``cond`` with the same version. Inference tensors have no
        version: they are assumed not to change.
        """
        version = version_of(cond), autocast_dtype(cond.device)
        entry = self._hoisted.get(key)
        if entry is None or entry[0] is not cond or entry[1] != version:
            entry = cond, version, compute()
            self._hoisted[key] = entry
        return entry[2]


def version_of(tensor: Tensor) -> int | None:
    """What changes with each change in place; None of an inference tensor."""
    return None if tensor.is_inference() else tensor._version


class LayerPages(KVStore):
    """The pages of one layer in the planned cache, for one call."""

    def __init__(self, runtime: VARRuntime, layer: int, cache: PagedKVCache) -> None:
        self._runtime, self._layer, self._cache = runtime, layer, cache
        self.k_pages, self.v_pages = cache.k_pages, cache.v_pages
        self.tokens = 0

    @untraced
    def open(self, tokens: int) -> KVStep:
        step = self._cache.open(self._layer, self._runtime.step)
        # The layer processes only some of the first call's scales; its K and V end with this call.
        self.tokens = self._runtime.seen - (step.slots_BT.shape[1] - tokens)
        if step.slots_BT.shape[1] == tokens:
            return step
        lens_B = torch.full_like(step.kv_lens_B, self.tokens)
        return replace(step, slots_BT=step.slots_BT[:, :tokens], kv_lens_B=lens_B)

    @untraced
    def close(self) -> None:
        self._cache.close(self._layer, self._runtime.step)
