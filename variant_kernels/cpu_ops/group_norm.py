"""group_norm_silu on a CPU: torch's own kernel, which takes channels-last maps as they are."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def launch_group_norm_silu(
    *,
    x_BYXC: torch.Tensor,
    weight_C: torch.Tensor,
    bias_C: torch.Tensor,
    num_groups: int,
    eps: float,
    silu: bool,
) -> torch.Tensor:
    """Group normalisation over channels-last pixels, then SiLU where ``silu``.

    Returns:
        y_BYXC, contiguous.
    """
    y_BCYX = F.group_norm(x_BYXC.permute(0, 3, 1, 2), num_groups, weight_C, bias_C, eps)
    if silu:
        F.silu(y_BCYX, inplace=True)
    return y_BCYX.permute(0, 2, 3, 1).contiguous()
