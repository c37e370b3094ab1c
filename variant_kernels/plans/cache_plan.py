"""Lifetimes of K/V, and the number of pages that they need.

K/V of (layer l, scale j) is read at scale k >= j only if l runs at k, so it can be freed after l's
last active scale; what l writes *at* that scale is needed within that one attention call only. The
schedule is known before the first token, and with it all lifetimes. The plan keeps exactly the K/V
that will be read, so outputs do not change. This module works on integers, without tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from variant_kernels.arguments import boolean, instance, integer, shown
from variant_kernels.plans.depth_schedule import DepthSchedule
from variant_kernels.plans.page_placement import PageLifetimes, place_pages
from variant_kernels.plans.scale_layout import MAX_TOKENS, ScaleLayout

_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8, "float8_e4m3fn": 1}


def item_bytes(dtype: object, op: str = "item_bytes") -> int:
    """Bytes of one element of a torch or numpy dtype, or of a dtype given by name.

    Raises:
        TypeError: no such dtype; the message starts with ``op``.
    """
    if isinstance(dtype, type) and dtype.__module__ == "numpy":  # a class, such as numpy.float32
        dtype = dtype.__name__
    if isinstance(dtype, str):
        if dtype in _ITEM_BYTES:
            return _ITEM_BYTES[dtype]
    elif isinstance(getattr(dtype, "itemsize", None), int):
        return dtype.itemsize  # type: ignore[attr-defined]
    raise TypeError(
        f"{op}: dtype must be a torch or numpy dtype or one of {sorted(_ITEM_BYTES)}; "
        f"got {shown(dtype)}"
    )


def token_bytes(num_heads: int, head_dim: int, dtype: object, op: str = "token_bytes") -> int:
    """Bytes of K (or of V) of one token in one layer; 8 bits add one scale byte per head."""
    size = item_bytes(dtype, op)
    return num_heads * (head_dim * size + (size == 1))


@dataclass(frozen=True)
class KVLifetime:
    """K/V of one (layer, scale): written when the layer runs at that scale, freed at ``dies``.

    ``dies`` is the layer's last active scale; the tokens are freed as soon as the layer's attention
    at that scale ends, before the next layer starts.
    """

    layer: int
    scale: int
    tokens: int
    dies: int

    @property
    def kept(self) -> bool:
        """Whether a later scale reads it; if not, it is needed within one attention call only."""
        return self.dies > self.scale


class PageAllocator:
    """Pages of one sequence: the pages of each layer, and the free ones.

    All sequences of a batch have the same lifetimes, so one allocator serves them all. It assigns
    the page of the placement if that is free, else the lowest free page: the same schedule always
    gets the same pages, and a slab of ``peak_pages`` pages is always enough.

    Args:
        placement: by layer, the page for each page of its tokens; None and what is missing have no
            preference. See ``CachePlan.placement``.
    """

    def __init__(
        self, page_size: int, placement: Mapping[int, tuple[int | None, ...]] | None = None
    ) -> None:
        self.page_size = page_size
        self.pages: dict[int, list[int]] = {}
        self.tokens: dict[int, int] = {}
        self._placement = placement or {}
        # Bit p is 1 while page p is in use.
        self._used = 0
        self._most = 0

    @property
    def used_pages(self) -> int:
        """Pages in use now."""
        return self._used.bit_count()

    @property
    def created_pages(self) -> int:
        """The largest number of pages in use at once."""
        return self._most

    @property
    def used_tokens(self) -> int:
        """Tokens x layers stored now."""
        return sum(self.tokens.values())

    def grow(self, layer: int, tokens: int) -> tuple[int, ...]:
        """Allocate slots for ``tokens`` more of ``layer``; its partly filled page is used first.

        Returns:
            All pages of ``layer``, in the order of its tokens.
        """
        pages = self.pages.setdefault(layer, [])
        total = self.tokens.get(layer, 0) + tokens
        wanted = self._placement.get(layer, ())
        for index in range(len(pages), _pages(total, self.page_size)):
            page = wanted[index] if index < len(wanted) else None
            if page is None or self._used >> page & 1:
                page = (self._used ^ (self._used + 1)).bit_length() - 1  # the lowest 0
            pages.append(page)
            self._used |= 1 << page
        self._most = max(self._most, self.used_pages)
        self.tokens[layer] = total
        return tuple(pages)

    def release(self, layer: int) -> None:
        """Free all pages of ``layer``."""
        for page in self.pages.pop(layer, ()):
            self._used ^= 1 << page
        self.tokens.pop(layer, None)


class CachePlan:
    """The exact K/V plan of one schedule over one layout.

    Args:
        layout: tokens per scale.
        schedule: layers per scale; as many scales as the layout.
        page_size: tokens per page of one layer's K and V of one sequence.
    Raises:
        TypeError: an argument of another class.
        ValueError: page_size below 1, or layout and schedule differ in the number of scales.
    """

    def __init__(self, layout: ScaleLayout, schedule: DepthSchedule, page_size: int = 16) -> None:
        op = "CachePlan"
        instance(op, "layout", layout, ScaleLayout, "ScaleLayout.from_patch_nums makes one")
        instance(op, "schedule", schedule, DepthSchedule)
        page_size = integer(op, "page_size", page_size, 1, MAX_TOKENS)
        if layout.num_scales != schedule.num_scales:
            raise ValueError(
                f"{op}: layout and schedule must have the same number of scales; "
                f"got {layout.num_scales} and {schedule.num_scales}"
            )
        self.layout = layout
        self.schedule = schedule
        self.page_size = page_size
        self.last_scales = tuple(schedule.last_scale(i) for i in range(schedule.full_depth))
        # PageAllocator reuses free pages, so that it needs as many as are in use at once; counting
        # them takes no time for each page. Both numbers only grow between two releases.
        self.peak_tokens = self.peak_pages = 0
        tokens, pages = [0] * schedule.full_depth, [0] * schedule.full_depth
        used_tokens = used_pages = 0
        for scale, layers in enumerate(schedule.layers):
            added = layout.tokens[scale]
            for layer in layers:
                tokens[layer] += added
                used_tokens += added
                used_pages -= pages[layer]
                pages[layer] = -(-tokens[layer] // page_size)  # as in _pages
                used_pages += pages[layer]
                if self.last_scales[layer] == scale:
                    self.peak_tokens = max(self.peak_tokens, used_tokens)
                    self.peak_pages = max(self.peak_pages, used_pages)
                    used_tokens -= tokens[layer]
                    used_pages -= pages[layer]

    def layer_scale_order(self) -> Iterator[tuple[int, int]]:
        """Every (layer, scale) that runs, in execution order."""
        for scale, layers in enumerate(self.schedule.layers):
            for layer in layers:
                yield layer, scale

    @cached_property
    def placement(self) -> dict[int, tuple[int | None, ...]]:
        """For ``PageAllocator``: consecutive pages of each layer wherever ``peak_pages`` allow.

        Computed at first use: a tenth of a second at most.
        """
        births: dict[int, list[int]] = {}
        stored = dict.fromkeys(range(self.schedule.full_depth), 0)
        steps = tuple(self.layer_scale_order())
        dies = {layer: step for step, (layer, _) in enumerate(steps)}
        for step, (layer, scale) in enumerate(steps):
            stored[layer] += self.layout.tokens[scale]
            pages = births.setdefault(layer, [])
            pages += [step] * (_pages(stored[layer], self.page_size) - len(pages))
        lifetimes = {i: PageLifetimes(tuple(pages), dies[i]) for i, pages in births.items()}
        return place_pages(lifetimes, self.peak_pages, len(steps))

    @property
    def peak_page_tokens(self) -> int:
        """Token slots x layers of one sequence in whole pages, as the cache allocates them."""
        return self.peak_pages * self.page_size

    @property
    def paper_tokens(self) -> int:
        """Tokens x layers that the paper's scheme stores at the end: everything ever written."""
        return sum(
            tokens * len(layers)
            for tokens, layers in zip(self.layout.tokens, self.schedule.layers, strict=True)
        )

    def peak_bytes(
        self, batch: int, num_heads: int, head_dim: int, dtype: object, guidance: bool = True
    ) -> int:
        """Bytes of K and V pages for ``batch`` images.

        Args:
            batch: images; classifier-free guidance doubles the sequences.
            dtype: of K and V; a torch or numpy dtype, or its name. 8 bits (float8_e4m3fn) have
                a scale of one byte per token and head.
            guidance: whether unconditional sequences run in addition to the conditional ones.
        Raises:
            TypeError: a number that is no integer, or an unknown dtype.
            ValueError: a number below 1.
        """
        op = "CachePlan.peak_bytes"
        sequences = _sequences(op, batch, guidance)
        num_heads = integer(op, "num_heads", num_heads, 1)
        head_dim = integer(op, "head_dim", head_dim, 1)
        return sequences * self.peak_page_tokens * 2 * token_bytes(num_heads, head_dim, dtype, op)

    def paper_bytes(
        self,
        batch: int,
        num_heads: int,
        head_dim: int,
        *,
        k_bytes: int = 4,
        v_bytes: int = 2,
        guidance: bool = True,
    ) -> int:
        """Bytes of the paper's scheme for ``batch`` images.

        The defaults are the paper's measured setting: under autocast the normalised K is cached in
        float32, V in 16 bits. ``k_bytes=2`` gives its scheme with 16-bit K and V.

        Raises:
            TypeError: a number that is no integer.  ValueError: a number below 1.
        """
        op = "CachePlan.paper_bytes"
        sequences = _sequences(op, batch, guidance)
        width = integer(op, "num_heads", num_heads, 1) * integer(op, "head_dim", head_dim, 1)
        item = integer(op, "k_bytes", k_bytes, 1) + integer(op, "v_bytes", v_bytes, 1)
        return sequences * self.paper_tokens * width * item

    def table(self) -> list[KVLifetime]:
        """The lifetime of every (layer, scale) that runs, in execution order."""
        return [
            KVLifetime(layer, scale, self.layout.tokens[scale], self.last_scales[layer])
            for layer, scale in self.layer_scale_order()
        ]

    def __repr__(self) -> str:
        return (
            f"CachePlan({self.schedule!r}, page_size={self.page_size}, "
            f"peak_tokens={self.peak_tokens}, peak_pages={self.peak_pages})"
        )


def _pages(tokens: int, page_size: int) -> int:
    return -(-tokens // page_size)


def _sequences(op: str, batch: int, guidance: bool) -> int:
    """Classifier-free guidance runs two sequences for each image."""
    return integer(op, "batch", batch, 1) * (2 if boolean(op, "guidance", guidance) else 1)
