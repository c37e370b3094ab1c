"""One call of the engine: its batches, generated one by one.

Axes: B images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from variant.engine.batches import BatchRunner, Part, Request
from variant.engine.generation import Generation
from variant.engine.graph_replay import GraphReplay

Current = tuple[BatchRunner, "GraphReplay | None"]


@dataclass(frozen=True)
class Run:
    """A checked request, split into batches.

    Args:
        first: the runner of the first batch, and its graphs.
        renew: gives those of a later batch, with the weights of then.
        request: what all batches share.
        labels_B, image_ids_B: (B,) int64 of the whole request, the ids on the device.
        size: images per batch.
        dtype: of the engine.
    """

    first: Current
    renew: Callable[[], Current]
    request: Request
    labels_B: Tensor
    image_ids_B: Tensor
    size: int
    dtype: torch.dtype

    def parts(self) -> Iterator[Part]:
        """Each batch as soon as it is generated."""
        batches = zip(
            self.labels_B.split(self.size), self.image_ids_B.split(self.size), strict=True
        )
        for number, batch in enumerate(batches):
            runner, graphs = self.first if number == 0 else self.renew()
            # No variable keeps the part: it would stay in memory while the next one is generated.
            yield _generate(runner, *batch, self.request, graphs)

    def batches(self) -> Iterator[Generation]:
        """The result of each batch as soon as it is generated."""
        yield from map(self._of_one_part, self.parts())

    def _of_one_part(self, part: Part) -> Generation:
        return self.generation([part], part.seconds)

    def generation(self, parts: Sequence[Part], seconds: float) -> Generation:
        """The result of some parts, which took ``seconds`` together."""
        runner, _ = self.first
        return Generation(
            _joined([part.images for part in parts]),
            _joined([part.tokens_BL for part in parts]),
            runner.stats(parts, self.request, self.dtype, seconds),
            _joined([part.labels_B for part in parts]).to(runner.device),
            _joined([part.image_ids_B for part in parts]),
        )


def _generate(
    runner: BatchRunner,
    labels_B: Tensor,
    image_ids_B: Tensor,
    request: Request,
    graphs: GraphReplay | None,
) -> Part:
    # Both modes end before the part is handed out: the caller's code runs in its own.
    with torch.no_grad(), torch.autocast(runner.device.type, enabled=False):
        return runner.generate(labels_B, image_ids_B, request, graphs)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
