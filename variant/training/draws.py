"""What a training step drops: labels, for guidance, and branches of layers (stochastic depth).

The numbers of an image are a function of (seed, step, image): not of the part of the batch, the
process or torch's generators.

Axes: B images of a part, N layers, 2 the branches of a block.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from variant.data.images import Indices, stream
from variant.models.config import VARConfig
from variant.models.var import branch_scales

STREAM_DROPS = 7


class Drops(NamedTuple):
    """Arguments of ``VAR.forward``; None where the model drops nothing of the kind.

    dropped_B: bool.  branch_scales_N2B: float32.
    """

    dropped_B: Tensor | None
    branch_scales_N2B: Tensor | None

    def to(self, device: torch.device) -> Drops:
        """The same on another device."""
        return Drops(*(value if value is None else value.to(device) for value in self))


def draw_drops(config: VARConfig, seed: int, step: int, indices: Indices) -> Drops:
    """The drops of some images at a step.

    Args:
        indices: (B,) of the images in the data set.
    """
    if config.cond_drop_rate == 0 and config.drop_path_rate == 0:
        return Drops(None, None)
    size = 1 + 2 * config.depth
    draws = [
        stream(seed, step, int(index), STREAM_DROPS).random(size, np.float32) for index in indices
    ]
    draws_BD = torch.from_numpy(np.stack(draws))
    dropped_B = draws_BD[:, 0] < config.cond_drop_rate if config.cond_drop_rate > 0 else None
    if config.drop_path_rate == 0:
        return Drops(dropped_B, None)
    uniform_N2B = draws_BD[:, 1:].T.contiguous().view(config.depth, 2, -1)
    return Drops(dropped_B, branch_scales(uniform_N2B, config.drop_path_rate))
