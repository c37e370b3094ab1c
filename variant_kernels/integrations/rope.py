"""Rotary position embeddings as other codebases apply them, in float32.

Axes: B batch, T tokens of this call, H heads, D width of one head, F = D/2 pairs, L tokens of all
scales, 2 cosines and sines.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotate_pairs(x_BTHD: Tensor, cos_sin_2TF: Tensor) -> Tensor:
    """Rotate each pair of neighbouring channels by its token's angle.

        y[2f] = cos * x[2f] - sin * x[2f + 1],  y[2f + 1] = sin * x[2f] + cos * x[2f + 1]

    Source: RoFormer (arXiv 2104.09864) with interleaved channels; two-dimensional as in Infinity
    (arXiv 2412.04431): the first half of the angles is for the row, the second for the column.

    Args:
        x_BTHD: any floating dtype; D even.
        cos_sin_2TF: float32, cosines then sines.
    Returns:
        (B, T, H, D) float32.
    """
    # A complex product computes both equations in one pass.
    pairs_BTHF = torch.view_as_complex(x_BTHD.float().contiguous().unflatten(-1, (-1, 2)))
    turn_TF = torch.complex(cos_sin_2TF[0], cos_sin_2TF[1])
    return torch.view_as_real(pairs_BTHF * turn_TF.unsqueeze(1)).flatten(-2)
