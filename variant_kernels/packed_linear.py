"""Linear layers with weights stored in oneDNN's order; torch reorders them at every call."""

from __future__ import annotations

import torch
from torch import Tensor


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN has packed products here: a CPU, float32, or bfloat16 where it is native."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def pack(weight_OI: Tensor) -> Tensor:
    """A copy for :func:`packed_linear`, in the weight's dtype; opaque to everything else."""
    # The second argument would only tune the order for a number of rows: it is the same for all
    # that were tried (2 to 4096).
    return torch.ops.mkldnn._reorder_linear_weight(weight_OI, None)


def packed_linear(
    x: Tensor, packed: Tensor, bias_O: Tensor | None, *, gelu: bool = False
) -> Tensor:
    """``x @ weight.T + bias``, then a tanh-approximated GELU if ``gelu``.

    Args:
        x: (..., I), bias_O: (O,); of the packed weight's dtype.
        packed: a weight (O, I) from :func:`pack`.
    Returns:
        (..., O), a new tensor.
    """
    name, variant = ("gelu", "tanh") if gelu else ("none", "")
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias_O, name, [], variant)
