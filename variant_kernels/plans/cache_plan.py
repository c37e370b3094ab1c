"""When every piece of K/V is born, when it dies, and how many pages that takes.

K/V of (layer l, scale j) is read at scale k >= j only if l runs at k, so it dies at l's last
active scale; what l writes *at* that scale is needed inside that one attention call only. The
schedule is known before the first token, hence so are all lifetimes. Keeping exactly what will be
read changes no output. Plain integers: no tensor is touched here.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

from variant_kernels.plans.depth_schedule import DepthSchedule
from variant_kernels.plans.scale_layout import ScaleLayout

_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8, "float8_e4m3fn": 1}


def item_bytes(dtype: object) -> int:
    """Bytes of one element of a torch or numpy dtype, or of a dtype given by name."""
    if isinstance(dtype, str):
        if dtype in _ITEM_BYTES:
            return _ITEM_BYTES[dtype]
    elif isinstance(getattr(dtype, "itemsize", None), int):
        return dtype.itemsize  # type: ignore[attr-defined]
    raise TypeError(
        f"item_bytes: dtype must be a torch or numpy dtype or one of {sorted(_ITEM_BYTES)}; "
        f"got {dtype!r}"
    )


def token_bytes(num_heads: int, head_dim: int, dtype: object) -> int:
    """Bytes of one token's K of one layer, or of its V; with a scale byte per head at 8 bits."""
    size = item_bytes(dtype)
    return num_heads * (head_dim * size + (size == 1))


@dataclass(frozen=True)
class KVLifetime:
    """K/V of one (layer, scale): born when that layer runs at that scale, dead after ``dies``.

    ``dies`` is the layer's last active scale; the tokens are free as soon as that layer's
    attention at that scale ends, before the next layer starts.
    """

    layer: int
    scale: int
    tokens: int
    dies: int

    @property
    def kept(self) -> bool:
        """Whether a later scale reads it; if not, it lives inside one attention call."""
        return self.dies > self.scale


class PageAllocator:
    """Pages of one sequence: which layer holds which, and which are free.

    Every sequence of a batch lives the same life, so one allocator serves them all. The lowest
    free page is handed out first: the same schedule always gets the same pages, and a slab of
    ``peak_pages`` pages is always enough.
    """

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.pages: dict[int, list[int]] = {}
        self.tokens: dict[int, int] = {}
        self._free: list[int] = []
        self._created = 0

    @property
    def used_pages(self) -> int:
        """Pages held by layers now."""
        return self._created - len(self._free)

    @property
    def created_pages(self) -> int:
        """Pages ever needed at once."""
        return self._created

    @property
    def used_tokens(self) -> int:
        """Tokens x layers held now."""
        return sum(self.tokens.values())

    def grow(self, layer: int, tokens: int) -> tuple[int, ...]:
        """Make room for ``tokens`` more of ``layer``, first in its own partly filled page."""
        held = self.pages.setdefault(layer, [])
        total = self.tokens.get(layer, 0) + tokens
        for _ in range(-(-total // self.page_size) - len(held)):
            if self._free:
                held.append(heapq.heappop(self._free))
            else:
                held.append(self._created)
                self._created += 1
        self.tokens[layer] = total
        return tuple(held)

    def release(self, layer: int) -> None:
        """Return all pages of ``layer``."""
        for page in self.pages.pop(layer, ()):
            heapq.heappush(self._free, page)
        self.tokens.pop(layer, None)


class CachePlan:
    """The exact K/V plan of one schedule over one layout.

    Args:
        layout: tokens per scale.
        schedule: layers per scale; as many scales as the layout.
        page_size: tokens per page of one layer's K and V of one sequence.
    Raises:
        ValueError: page_size below 1, or layout and schedule disagree about K.
    """

    def __init__(self, layout: ScaleLayout, schedule: DepthSchedule, page_size: int = 16) -> None:
        if page_size < 1:
            raise ValueError(f"CachePlan: page_size must be at least 1; got {page_size}")
        if layout.num_scales != schedule.num_scales:
            raise ValueError(
                f"CachePlan: layout and schedule must have the same number of scales; "
                f"got {layout.num_scales} and {schedule.num_scales}"
            )
        self.layout = layout
        self.schedule = schedule
        self.page_size = page_size
        self.last_scales = tuple(schedule.last_scale(i) for i in range(schedule.full_depth))
        allocator = PageAllocator(page_size)
        peak_tokens = 0
        for layer, scale in self.steps():
            allocator.grow(layer, layout.tokens[scale])
            peak_tokens = max(peak_tokens, allocator.used_tokens)
            if self.last_scales[layer] == scale:
                allocator.release(layer)
        self.peak_tokens: int = peak_tokens
        self.peak_pages: int = allocator.created_pages

    def steps(self) -> Iterator[tuple[int, int]]:
        """(layer, scale) in the order in which they run."""
        for scale, layers in enumerate(self.schedule.layers):
            for layer in layers:
                yield layer, scale

    @property
    def peak_page_tokens(self) -> int:
        """Token slots x layers of one sequence in whole pages: what the cache allocates."""
        return self.peak_pages * self.page_size

    @property
    def paper_tokens(self) -> int:
        """Tokens x layers that the paper's scheme holds in the end: everything ever written."""
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
            guidance: whether unconditional sequences run beside the conditional ones.
        """
        sequences = batch * (2 if guidance else 1)
        return sequences * self.peak_page_tokens * 2 * token_bytes(num_heads, head_dim, dtype)

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

        The defaults are what the paper measured: under autocast the normalised K is float32 and
        is cached as it is, V has 16 bits. ``k_bytes=2`` gives its scheme with 16-bit K and V.
        """
        sequences = batch * (2 if guidance else 1)
        return sequences * self.paper_tokens * num_heads * head_dim * (k_bytes + v_bytes)

    def table(self) -> list[KVLifetime]:
        """The lifetime of every (layer, scale) that runs, in the order in which it is born."""
        return [
            KVLifetime(layer, scale, self.layout.tokens[scale], self.last_scales[layer])
            for layer, scale in self.steps()
        ]

    def __repr__(self) -> str:
        return (
            f"CachePlan({self.schedule!r}, page_size={self.page_size}, "
            f"peak_tokens={self.peak_tokens}, peak_pages={self.peak_pages})"
        )
