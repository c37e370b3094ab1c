"""How much of the codebook is used at each scale.

Axes: B images, N tokens of one scale, K scales, V codebook entries.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from variant.data.images import Indices
from variant.models.quantizer import MultiScaleQuantizer
from variant.training.distributed import Ranks
from variant.training.meters import histogram_values

# Of a scale's histogram among the measured values of a step, see Meters.
KEY = "codes#"


class CodeUse:
    """Counts the hits of each code in training, over all parts of a batch and all processes.

    Takes over the running mean of the quantiser (``ema_vocab_hit_SV``), which thereby is that of
    the whole batch.

    Args:
        measure: gets (key, hits (V,)) of this process, for the lines of the steps.
    """

    def __init__(
        self, quantizer: MultiScaleQuantizer, ranks: Ranks, measure: Callable[[str, Tensor], None]
    ) -> None:
        self.quantizer, self.ranks, self.measure = quantizer, ranks, measure
        mean_KV = quantizer.get_buffer("ema_vocab_hit_SV")
        self._hits_KV = torch.zeros_like(mean_KV, dtype=torch.int64)
        self._num_scales = 0

    def add(self, tokens_BN: Tensor, k: int) -> None:
        """Count the tokens of scale k of a part of the batch."""
        add_hits(self._hits_KV[k], tokens_BN)
        self._num_scales = max(self._num_scales, k + 1)

    def end_step(self) -> None:
        """Call after the last part of a step's batch."""
        for k in range(self._num_scales):
            self.measure(f"{KEY}{k}", self._hits_KV[k])
        hits_KV = self.ranks.added(self._hits_KV[: self._num_scales])
        for k, hits_V in enumerate(hits_KV):
            self.quantizer.update_mean_hits(hits_V, k)
        self._hits_KV.zero_()
        self._num_scales = 0


class HeldOutUse:
    """Counts the hits of each code over held-out images, each of which counts once.

    Args:
        own: the images of this process.
        shape: (K, V).
    """

    def __init__(self, own: slice, shape: tuple[int, int], device: torch.device) -> None:
        self._next, self._stop = own.start, own.stop
        self._hits_KV = torch.zeros(shape, dtype=torch.int64, device=device)

    def add(self, indices: Indices, tokens_of_scales: list[Tensor]) -> None:
        """Count a part: the next images of this process; others are not counted.

        Args:
            tokens_of_scales: (B, N) of each scale.
        """
        # A process that has no image, or none left, evaluates any one.
        if self._next >= self._stop or int(indices[0]) != self._next:
            return
        self._next += len(indices)
        for hits_V, tokens_BN in zip(self._hits_KV, tokens_of_scales, strict=True):
            add_hits(hits_V, tokens_BN)

    def values(self, ranks: Ranks) -> dict[str, float]:
        """``codes_used/K`` and ``codes_perplexity/K`` of every scale, over all processes."""
        values: dict[str, float] = {}
        for k, hits_V in enumerate(ranks.added(self._hits_KV).tolist()):
            values |= histogram_values(f"{KEY}{k}", hits_V)
        return values


def add_hits(hits_V: Tensor, tokens_BN: Tensor) -> None:
    """Add the number of times that each code occurs; never waits for the device."""
    tokens = tokens_BN.flatten()
    hits_V.scatter_add_(0, tokens, torch.ones_like(tokens))
