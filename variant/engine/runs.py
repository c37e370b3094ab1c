"""One call of the engine: its batches, generated one by one.

Axes: B images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypedDict, cast

import torch
from torch import Tensor

from variant.engine.batches import Batch, BatchRunner, Part, Request
from variant.engine.cast_models import CastModels
from variant.engine.generation import Generation, OnScale, Stats
from variant.engine.graph_replay import GraphReplay
from variant.engine.kernels import Launchers
from variant.engine.kv_dtype import KVDtype
from variant.engine.weights import EngineWeights
from variant_kernels import CachePlan, DepthSchedule
from variant_kernels.dispatch.request import dtype_name
from variant_kernels.untraced import untraced


class CallOptions(TypedDict, total=False):
    """The arguments of ``generate`` that do not concern how a token is drawn; see :class:`Call`."""

    depth: int | Sequence[int] | DepthSchedule | None
    bridge: int | None
    image_ids: Sequence[int] | Tensor | None
    tokens: Tensor | Sequence[Tensor] | None
    mask: Tensor | None
    log_probs: bool
    max_batch: int | None
    on_scale: OnScale | None
    decode: bool
    kv_dtype: KVDtype
    image_dtype: torch.dtype | str


@dataclass(frozen=True)
class Call:
    """:class:`CallOptions` with their defaults, as they came."""

    depth: int | Sequence[int] | DepthSchedule | None = None
    bridge: int | None = None
    image_ids: Sequence[int] | Tensor | None = None
    tokens: Tensor | Sequence[Tensor] | None = None
    mask: Tensor | None = None
    log_probs: bool = False
    max_batch: int | None = None
    on_scale: OnScale | None = None
    decode: bool = True
    kv_dtype: KVDtype = None
    image_dtype: torch.dtype | str = torch.float32

    @classmethod
    def of(cls, options: CallOptions) -> Call:
        """The call of some options.  Raises: TypeError for a name that ``generate`` lacks."""
        unknown = [name for name in options if name not in CallOptions.__annotations__]
        if unknown:
            raise TypeError(f"generate: got an unexpected argument {unknown[0]!r}")
        return cls(**options)


Current = tuple[BatchRunner, "GraphReplay | None"]


@dataclass(frozen=True)
class Source:
    """Gives the runner of each batch, and the graphs recorded with its weights.

    launchers: of all batches.
    checked: with the weights of now, cast again if they changed: it looks at every tensor.
    presumed: with those of the last call, which may have changed; None without graphs.
    unchanged: whether weights that ``presumed`` gave are still those of now.
    """

    launchers: Launchers
    checked: Callable[[], Current]
    presumed: Callable[[], tuple[BatchRunner, GraphReplay] | None]
    unchanged: Callable[[EngineWeights], bool]


@dataclass(frozen=True)
class Run:
    """A checked request, split into batches.

    A batch whose graphs are recorded is queued before the weights are looked at, so that a GPU does
    not wait for that; where they changed, its result is discarded and it is generated again.

    Args:
        source: of the runners.
        first: the runner of the first batch, if it is there already; parts() takes it.
        models: of the engine.
        plan: of the K/V cache.
        request: what all batches share.
        whole: labels, image ids and given tokens of all batches.
        size: images per batch.
    """

    source: Source
    first: list[Current]
    models: CastModels
    plan: CachePlan
    request: Request
    whole: Batch
    size: int

    def is_recorded(self) -> bool:
        """Whether graphs of every batch are recorded."""
        presumed = self.source.presumed()
        if presumed is None:
            return False
        runner, graphs = presumed
        rest = len(self.whole.labels_B) % self.size or self.size
        lasts = (next(self.whole.split(size)) for size in {self.size, rest})
        return all(runner.is_recorded(batch, self.request, graphs) for batch in lasts)

    def parts(self) -> Iterator[Part]:
        """Each batch as soon as it is generated."""
        for batch in self.whole.split(self.size):
            # No variable keeps the part: it would stay in memory while the next one is generated.
            yield self._part(batch)

    @untraced
    def _part(self, batch: Batch) -> Part:
        # Both modes end before the part is handed out: the caller's code runs in its own.
        with torch.no_grad(), torch.autocast(self.models.device.type, enabled=False):
            part = None if self.first else self._presumed_part(batch)
            if part is None:  # no variable of this frame holds the weights while they are cast
                runner, graphs = self.first.pop() if self.first else self.source.checked()
                part = cast("Part", runner.generate(batch, self.request, graphs))
            return part

    def _presumed_part(self, batch: Batch) -> Part | None:
        """The batch by recorded graphs; None without them, or where the weights changed."""
        presumed = self.source.presumed()
        if presumed is None or not presumed[0].is_recorded(batch, self.request, presumed[1]):
            return None
        runner, graphs = presumed
        unchanged = partial(self.source.unchanged, runner.weights)
        return runner.generate(batch, self.request, graphs, unchanged)

    def batches(self) -> Iterator[Generation]:
        """The result of each batch as soon as it is generated."""
        yield from map(self._of_one_part, self.parts())

    @untraced
    def _of_one_part(self, part: Part) -> Generation:
        return self.generation([part], part.seconds)

    def generation(self, parts: Sequence[Part], seconds: float) -> Generation:
        """The result of some parts, which took ``seconds`` together."""
        device = self.models.device
        log_probs = [part.log_probs_BL for part in parts if part.log_probs_BL is not None]
        return Generation(
            _joined([part.images for part in parts]),
            _joined([part.tokens_BL for part in parts]),
            self._stats(parts, seconds),
            _own(_joined([part.batch.labels_B for part in parts]).to(device)),
            _own(_joined([part.batch.image_ids_B for part in parts]).to(device)),
            _joined(log_probs) if log_probs else None,
        )

    def _stats(self, parts: Sequence[Part], seconds: float) -> Stats:
        """Measurements of a request from those of its parts."""
        first, last, plan, config = parts[0], parts[-1], self.plan, self.models.var.config
        dtype, guided = self.models.dtype, self.request.sampling.guided
        pages_dtype = self.source.launchers.pages_dtype
        # Of the first part: no other is larger.
        sizes = (len(first.tokens_BL), config.num_heads, config.head_dim)
        item = dtype.itemsize
        return Stats(
            seconds=seconds,
            decode_seconds=sum(part.decode_seconds for part in parts),
            batches=len(parts),
            depths=last.depths,
            postponed=last.postponed,
            dtype=dtype_name(dtype),
            product_dtype=dtype_name(last.product_dtype),
            kv_dtype=dtype_name(pages_dtype),
            packed=last.packed,
            captured=first.captured,
            kv_planned_bytes=plan.peak_bytes(*sizes, pages_dtype, guided),
            kv_allocated_bytes=first.allocated_bytes,
            kv_peak_bytes=max(part.peak_bytes for part in parts),
            kv_paper_bytes=plan.paper_bytes(*sizes, k_bytes=item, v_bytes=item, guidance=guided),
            zone_weight_bytes=last.zone_weight_bytes,
        )


def _own(x: Tensor) -> Tensor:
    """x in memory of its own: a view of one batch is kept, and saved, with those of all batches."""
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone()


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
