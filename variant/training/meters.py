"""Means of values that are measured in every step, kept on the device until they are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

# The sum of each value over all processes of a run.
Sums = Callable[[Sequence[float]], list[float]]


def histogram_values(key: str, counts: Sequence[float]) -> dict[str, float]:
    """How evenly counts are spread, e.g. of the codes of a codebook; {} where nothing is counted.

    Of the key ``codes#3``: ``codes_used/3``, the share of the counts that are not 0, and
    ``codes_perplexity/3``, exp(entropy): the number of codes that, evenly used, are as hard to
    predict.
    """
    total = math.fsum(counts)
    if total == 0:
        return {}
    what, _, which = key.partition("#")
    shares = [count / total for count in counts if count]
    entropy = -math.fsum(share * math.log(share) for share in shares)
    return {
        f"{what}_used/{which}": len(shares) / len(counts),
        f"{what}_perplexity/{which}": math.exp(entropy),
    }


class Meters:
    """Weighted sums of values by key, without a wait for the device until they are read.

    A key that ends with "/" is a row of values, which are numbered in the result:
    ``add("loss/", tensor of 2)`` is read as ``loss/0`` and ``loss/1``. A key with "#" is a
    histogram, read as :func:`histogram_values`.

    Args:
        device: of the values.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor | float] = {}

    def add(self, key: str, value: Tensor | float, weight: Tensor | float = 1.0) -> None:
        """Add a value, or a row of them.

        Args:
            weight: in the mean; 0 leaves the value out, which must be finite all the same.
        """
        row = torch.as_tensor(value, dtype=torch.float32, device=self.device).detach().reshape(-1)
        self._sums[key] = row * weight + self._sums.get(key, 0.0)
        self._weights[key] = weight + self._weights.get(key, 0.0)

    def totals(self, sums: Sums = list) -> dict[str, list[float]]:
        """The sums of each key, then its weight; waits for the device.

        Args:
            sums: adds over the processes of the run; all of them must have the same keys.
        """
        if not self._sums:
            return {}
        keys = sorted(self._sums)
        weights = [torch.as_tensor(self._weights[key], device=self.device) for key in keys]
        rows = [
            torch.cat((self._sums[k], w.reshape(1))) for k, w in zip(keys, weights, strict=True)
        ]
        values = sums(torch.cat(rows).tolist())
        totals = {}
        for key, row in zip(keys, rows, strict=True):
            totals[key], values = values[: len(row)], values[len(row) :]
        return totals

    def means(self, sums: Sums = list) -> dict[str, float]:
        """The means by key since the last reading, then forget them; waits for the device."""
        means = {}
        for key, (*row, weight) in self.totals(sums).items():
            if "#" in key:
                means |= histogram_values(key, row)
            elif weight > 0:
                names = [key] if not key.endswith("/") else [f"{key}{k}" for k in range(len(row))]
                means |= {name: value / weight for name, value in zip(names, row, strict=True)}
        self._sums, self._weights = {}, {}
        return means

    def load(self, totals: Mapping[str, Sequence[float]]) -> None:
        """Go on from a value of :meth:`totals`."""
        for key, (*row, weight) in totals.items():
            self._sums[key] = torch.tensor(row, dtype=torch.float32, device=self.device)
            self._weights[key] = weight
