"""Storage of K and V in pages: a plan assigns the pages, the cache allocates and tracks them.

Axes: B sequences, T tokens of this call, H heads, D width of one head, P pages, N tokens in a page,
M page-table entries.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from variant_kernels.arguments import instance, integer, shown, typed
from variant_kernels.kv_quantization import KV8_DTYPE
from variant_kernels.plans.cache_plan import CachePlan, PageAllocator
from variant_kernels.plans.depth_schedule import DepthSchedule
from variant_kernels.wording import counted

# The largest size that torch can count.
MAX_BYTES = 2**63 - 1


@dataclass(frozen=True)
class KVStep:
    """Where K/V of one layer at one scale are written, and which K/V its queries attend to.

    slots_BT: int64, for ``append_paged_kv``.  page_table_BM, kv_lens_B: int32, for
    ``paged_attention``; the lengths include this scale's tokens.  consecutive: the pages of each
    sequence follow one another, also for ``paged_attention``.
    """

    slots_BT: Tensor
    page_table_BM: Tensor
    kv_lens_B: Tensor
    consecutive: bool = False


# By all that decides a table: positions, pages, sequences, sizes, device.
PageTables = dict[Hashable, KVStep]


class PagedKVCache:
    """K/V that later layers and scales still read, in one slab of exactly the planned size.

    For every scale, and for every active layer in ascending order::

        step = cache.open(layer, scale)
        append_paged_kv(k, v, cache.k_pages, cache.v_pages, step.slots_BT, **cache.scales)
        out = paged_attention(
            q, cache.k_pages, cache.v_pages, step.page_table_BM, step.kv_lens_B,
            consecutive=step.consecutive, **cache.scales,
        )
        cache.close(layer, scale)

    ``close`` frees a layer's pages once the layer has run for the last time.

    Args:
        plan: lifetimes and pages of one sequence.
        batch: sequences; classifier-free guidance has two per image.
        num_heads, head_dim: of K and V.
        dtype, device: of the pages. With float8_e4m3fn each head of each token has a scale, one
            byte (see ``kv_quantization``); with other dtypes ``scales`` is empty.
        page_tables: may be shared by caches: tables that are already there are used, missing ones
            are added. None creates a new dictionary.
    Raises:
        TypeError: an argument of another class, or a number that is no integer.
        ValueError: batch, num_heads or head_dim below 1; a dtype that is no floating-point one; a
            device that this machine has not.
        MemoryError: the slab does not fit.
    """

    def __init__(
        self,
        plan: CachePlan,
        batch: int,
        num_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        page_tables: PageTables | None = None,
    ) -> None:
        op = "PagedKVCache"
        self.plan = instance(op, "plan", plan, CachePlan)
        self.batch = batch = integer(op, "batch", batch, 1)
        num_heads = integer(op, "num_heads", num_heads, 1)
        head_dim = integer(op, "head_dim", head_dim, 1)
        if not instance(op, "dtype", dtype, torch.dtype).is_floating_point:
            raise ValueError(f"{op}: dtype must be a floating-point dtype; got {dtype}")
        shape = (2, batch * plan.peak_pages, plan.page_size, num_heads, head_dim)
        scales_shape = shape[:-1] if dtype == KV8_DTYPE else (2, 0)
        size = plan.peak_bytes(batch, num_heads, head_dim, dtype, guidance=False)
        try:
            if size > MAX_BYTES:
                raise torch.OutOfMemoryError  # torch counts elements in 64 bits
            slab_2PNHD = torch.empty(shape, dtype=dtype, device=device)
            scales_2PNH = torch.empty(scales_shape, dtype=torch.uint8, device=device)
        except (RuntimeError, AssertionError, ImportError, TypeError, ValueError) as error:
            # torch's CPU allocator raises a plain RuntimeError.
            if isinstance(error, torch.OutOfMemoryError) or "memory" in str(error):
                mib = size // 2**20 if size > MAX_BYTES else round(size / 2**20, 1)
                raise MemoryError(
                    f"{op}: the plan needs {mib} MiB for {counted(batch, 'sequence')}, more than "
                    f"{device} can allocate; use a smaller batch or depth"
                ) from error
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(
                f"{op}: device must be one that this machine has; got {typed(device)}: "
                f"{str(error).splitlines()[0]}"
            ) from None
        self._slabs = slab_2PNHD, scales_2PNH
        self._set_views()
        self._page_bytes = self.allocated_bytes // shape[1]
        self._full_schedule = plan.schedule
        self._page_tables: PageTables = (
            {} if page_tables is None else instance(op, "page_tables", page_tables, dict)
        )
        self.reset()

    def _set_views(self) -> None:
        slab_2PNHD, scales_2PNH = self._slabs
        self.k_pages, self.v_pages = slab_2PNHD.unbind(0)
        self.scales: dict[str, Tensor] = {}
        if slab_2PNHD.dtype == KV8_DTYPE:
            names = ("k_scales_PNH", "v_scales_PNH")
            self.scales = dict(zip(names, scales_2PNH.unbind(0), strict=True))

    def __getstate__(self) -> dict[str, Any]:
        """Without the views of the slab, which pickle would write again beside it.

        The slab is written as bytes: torch does not unpickle tensors of 8-bit floats.
        """
        views = ("k_pages", "v_pages", "scales")
        state = {name: value for name, value in self.__dict__.items() if name not in views}
        slab_2PNHD, scales_2PNH = self._slabs
        return state | {"_slabs": (slab_2PNHD.view(torch.uint8), slab_2PNHD.dtype, scales_2PNH)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        slab_bytes, dtype, scales_2PNH = state["_slabs"]
        self.__dict__.update(state | {"_slabs": (slab_bytes.view(dtype), scales_2PNH)})
        self._set_views()

    def __copy__(self) -> PagedKVCache:
        """As deep: two caches in one slab would overwrite each other's pages."""
        return copy.deepcopy(self)

    def reset(self) -> None:
        """Free all pages and return to the plan's schedule; keep the slab."""
        self.schedule = self._full_schedule
        self._allocator = PageAllocator(self.plan.page_size, self.plan.placement)
        self._peak_pages = 0
        self._scale, self._layer, self._open = 0, -1, False

    @property
    def allocated_bytes(self) -> int:
        """Bytes of the slab, which is allocated once, including the scales of 8-bit pages."""
        return sum(slab.nbytes for slab in self._slabs)

    @property
    def peak_bytes(self) -> int:
        """The largest :attr:`used_bytes` since the last reset."""
        return self._peak_pages * self.batch * self._page_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes of pages in use now."""
        return self._allocator.used_pages * self.batch * self._page_bytes

    def open(self, layer: int, scale: int) -> KVStep:
        """Allocate pages for the K/V of ``layer`` at ``scale``.

        Raises:
            ValueError: not the next (layer, scale) of the schedule, or the previous one has not
                been closed.
        """
        op = "PagedKVCache.open"
        call = integer(op, "layer", layer), integer(op, "scale", scale)
        expected = self._next()
        wanted = ""
        if self._open:
            wanted = f"expected close{(self._layer, self._scale)}"
        elif expected[1] == self.schedule.num_scales:
            wanted = "every scale has run: call reset() before the next images"
        elif call != expected:
            wanted = f"expected open{expected}"
        if wanted:
            raise ValueError(f"{op}: layers run in the schedule's order; {wanted}; got open{call}")
        layer, scale = call
        pages = self._allocator.grow(layer, self.plan.layout.tokens[scale])
        self._peak_pages = max(self._peak_pages, self._allocator.used_pages)
        self._scale, self._layer, self._open = scale, layer, True
        return self._kv_step(scale, pages)

    def close(self, layer: int, scale: int) -> None:
        """End the attention of ``layer`` at ``scale``; free its pages if it will not run again.

        Raises:
            ValueError: (layer, scale) is not open.
        """
        op = "PagedKVCache.close"
        layer, scale = integer(op, "layer", layer), integer(op, "scale", scale)
        if not self._open or (layer, scale) != (self._layer, self._scale):
            raise ValueError(f"{op}: {(layer, scale)} is not open; open it first")
        self._open = False
        if self.schedule.last_scale(layer) == scale:
            self._allocator.release(layer)

    def switch(self, schedule: DepthSchedule) -> None:
        """Continue with a shallower schedule; free pages of layers that will not run again.

        Call it between scales. The new schedule must equal the old one in the scales that have run,
        and use, at each later scale, a subset of the planned layers, so that the slab is large
        enough.

        Raises:
            TypeError: schedule is no DepthSchedule.
            ValueError: called within a scale, or the schedule does not meet these conditions.
        """
        op = "PagedKVCache.switch"
        instance(
            op, "schedule", schedule, DepthSchedule, "schedule.switched(scale, depth) makes one"
        )
        layer, done = self._next()
        if self._open or (done < self.schedule.num_scales and layer != self._first(done)):
            raise ValueError(f"{op}: switch between scales; scale {self._scale} is not finished")
        old, new = self.schedule, schedule
        if (new.full_depth, new.num_scales) != (old.full_depth, old.num_scales):
            raise ValueError(
                f"{op}: schedule must have {counted(old.full_depth, 'layer')} and "
                f"{counted(old.num_scales, 'scale')}; got {new.full_depth} and {new.num_scales}"
            )
        for k in range(old.num_scales):
            if k < done and new.layers[k] != old.layers[k]:
                raise ValueError(
                    f"{op}: scale {k} has already run with "
                    f"{counted(len(old.layers[k]), 'layer')}; the new "
                    f"schedule gives it {len(new.layers[k])}. Use schedule.switched({done}, depth)"
                )
            if not set(new.layers[k]) <= set(old.layers[k]):
                raise ValueError(
                    f"{op}: layers of scale {k} must be among the {len(old.layers[k])} planned; "
                    f"got {shown(sorted(set(new.layers[k]) - set(old.layers[k])))} besides"
                )
        self.schedule = new
        for layer in list(self._allocator.pages):
            if new.last_scale(layer) < done:
                self._allocator.release(layer)

    def __repr__(self) -> str:
        heads, head_dim = self.k_pages.shape[2:]
        return (
            f"PagedKVCache({self.plan!r}, batch={self.batch}, heads={heads}, head_dim={head_dim}, "
            f"dtype={self.k_pages.dtype}, device={self.k_pages.device}, "
            f"used_bytes={self.used_bytes}, allocated_bytes={self.allocated_bytes})"
        )

    def _first(self, scale: int) -> int:
        return self.schedule.layers[scale][0]

    def _next(self) -> tuple[int | None, int]:
        """The (layer, scale) that must be opened next; no layer after the last scale."""
        for layer in self.schedule.layers[self._scale]:
            if layer > self._layer:
                return layer, self._scale
        following = self._scale + 1
        if following < self.schedule.num_scales:
            return self._first(following), following
        return None, following

    def _kv_step(self, scale: int, pages: tuple[int, ...]) -> KVStep:
        layout, device = self.plan.layout, self.k_pages.device
        first, visible = layout.offsets[scale], layout.visible(scale)
        size, peak_pages = self.plan.page_size, self.plan.peak_pages
        key = first, visible, pages, self.batch, size, peak_pages, device
        if key not in self._page_tables:
            positions = range(first, visible)
            slots_T = [pages[p // size] * size + p % size for p in positions]
            # Sequence b owns the pages from b * peak_pages on; all have the same lifetimes.
            first_B1 = torch.arange(self.batch, device="cpu").unsqueeze(1) * peak_pages
            slots_BT = torch.tensor(slots_T, device="cpu").unsqueeze(0) + first_B1 * size
            table_BM = (torch.tensor(pages, device="cpu").unsqueeze(0) + first_B1).to(torch.int32)
            lens_B = torch.full((self.batch,), visible, dtype=torch.int32, device="cpu")
            self._page_tables[key] = KVStep(
                slots_BT.to(device),
                table_BM.to(device),
                lens_B.to(device),
                pages == tuple(range(pages[0], pages[0] + len(pages))),
            )
        return self._page_tables[key]


PAGE_SIZE = 16


class KVStore(Protocol):
    """Storage of one layer's K and V; tokens: stored per sequence, including this call's."""

    k_pages: Tensor
    v_pages: Tensor
    tokens: int

    def open(self, tokens: int) -> KVStep:
        """Allocate slots for ``tokens`` more."""
        ...

    def close(self) -> None:
        """End the attention of this call."""
        ...


class GrowingPages:
    """Pages of one layer without a plan: the pool doubles when it is full.

    Page p of sequence b is page ``p * batch + b`` of the pool, so that page numbers stay valid when
    the pool grows. A call that failed between ``open`` and ``close`` leaves nothing behind.

    Args:
        qkv_BT3HD: the first projection; sets batch, heads, dtype and device.
    Attributes:
        stored: tokens per sequence of the calls that were closed.
    """

    def __init__(self, qkv_BT3HD: Tensor, page_size: int = PAGE_SIZE) -> None:
        self.batch, self.page_size = qkv_BT3HD.shape[0], page_size
        self.tokens = self.stored = 0
        self._entries = 0
        self._like = qkv_BT3HD.new_empty(0)
        self._sizes = page_size, *qkv_BT3HD.shape[-2:]
        self._grow(0)

    def _grow(self, entries: int) -> None:
        slab_2PNHD = self._like.new_empty(2, entries * self.batch, *self._sizes)
        if self._entries:
            num_pages = self._entries * self.batch
            slab_2PNHD[0, :num_pages].copy_(self.k_pages)
            slab_2PNHD[1, :num_pages].copy_(self.v_pages)
        self.k_pages, self.v_pages = slab_2PNHD.unbind(0)
        self._entries = entries

    def open(self, tokens: int) -> KVStep:
        """Allocate slots for ``tokens`` more; page table and lengths include them."""
        seen = self.stored + tokens
        needed = -(-seen // self.page_size)
        if needed > self._entries:
            self._grow(max(needed, 2 * self._entries))
        device = self._like.device
        sequence_B1 = torch.arange(self.batch, device=device).unsqueeze(1)
        position_T = torch.arange(self.stored, seen, device=device)
        page_BT = position_T // self.page_size * self.batch + sequence_B1
        table_BM = torch.arange(needed, device=device) * self.batch + sequence_B1
        self.tokens = seen
        return KVStep(
            page_BT * self.page_size + position_T % self.page_size,
            table_BM.to(torch.int32),
            torch.full((self.batch,), seen, dtype=torch.int32, device=device),
            self.batch == 1,
        )

    def close(self) -> None:
        """Keep the pages: no other layer uses them."""
        self.stored = self.tokens
