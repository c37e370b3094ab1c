"""One call of the engine: its batches, generated one by one.

Axes: B images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from variant.engine.batches import Batch, BatchRunner, Part, Request
from variant.engine.generation import Generation, OnScale
from variant.engine.graph_replay import GraphReplay
from variant.engine.kv_dtype import KVDtype


class CallOptions(TypedDict, total=False):
    """The arguments of ``generate`` that do not concern how a token is drawn; see :class:`Call`."""

    depth: int | Sequence[int] | None
    bridge: int | None
    image_ids: Sequence[int] | Tensor | None
    tokens: Tensor | None
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

    depth: int | Sequence[int] | None = None
    bridge: int | None = None
    image_ids: Sequence[int] | Tensor | None = None
    tokens: Tensor | None = None
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
class Run:
    """A checked request, split into batches.

    Args:
        first: the runner of the first batch, and its graphs.
        renew: gives those of a later batch, with the weights of then.
        request: what all batches share.
        whole: labels, image ids and given tokens of all batches.
        size: images per batch.
        dtype: of the engine.
    """

    first: Current
    renew: Callable[[], Current]
    request: Request
    whole: Batch
    size: int
    dtype: torch.dtype

    def parts(self) -> Iterator[Part]:
        """Each batch as soon as it is generated."""
        for number, batch in enumerate(self.whole.split(self.size)):
            runner, graphs = self.first if number == 0 else self.renew()
            # No variable keeps the part: it would stay in memory while the next one is generated.
            yield _generate(runner, batch, self.request, graphs)

    def batches(self) -> Iterator[Generation]:
        """The result of each batch as soon as it is generated."""
        yield from map(self._of_one_part, self.parts())

    def _of_one_part(self, part: Part) -> Generation:
        return self.generation([part], part.seconds)

    def generation(self, parts: Sequence[Part], seconds: float) -> Generation:
        """The result of some parts, which took ``seconds`` together."""
        runner, _ = self.first
        log_probs = [part.log_probs_BL for part in parts if part.log_probs_BL is not None]
        return Generation(
            _joined([part.images for part in parts]),
            _joined([part.tokens_BL for part in parts]),
            runner.stats(parts, self.request, self.dtype, seconds),
            _joined([part.batch.labels_B for part in parts]).to(runner.device),
            _joined([part.batch.image_ids_B for part in parts]),
            _joined(log_probs) if log_probs else None,
        )


def _generate(
    runner: BatchRunner, batch: Batch, request: Request, graphs: GraphReplay | None
) -> Part:
    # Both modes end before the part is handed out: the caller's code runs in its own.
    with torch.no_grad(), torch.autocast(runner.device.type, enabled=False):
        return runner.generate(batch, request, graphs)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
