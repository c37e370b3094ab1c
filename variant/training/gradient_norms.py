"""Gradient norms of groups of layers, for instance of those that only the full network has."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from variant.training.parallel import unsharded


class GradientNorms:
    """Norms of the gradient of groups of layers.

    The norm of a group is that of one of its layers: the root of the mean over the layers of the
    squared norm, so that groups of few and of many layers compare.

    Args:
        groups: the layers of each group by its name; groups without a layer are left out.
    """

    def __init__(self, groups: Mapping[str, Sequence[nn.Module]]) -> None:
        self._groups = {
            name: ([p for layer in layers for p in layer.parameters()], len(layers))
            for name, layers in groups.items()
            if layers
        }

    def measure(self) -> dict[str, Tensor]:
        """The norm of each group, 0-d on the device; parameters without a gradient count as 0."""
        norms = {}
        for name, (parameters, count) in self._groups.items():
            gradients = [p.grad for p in parameters if p.grad is not None]
            norm = (
                nn.utils.get_total_norm(gradients) if gradients else torch.zeros((), device="cpu")
            )
            norms[name] = unsharded(norm) / math.sqrt(count)
        return norms
