"""Linear layers with weights packed for oneDNN, which repacks plain weights at every call."""

from __future__ import annotations

import torch
from torch import Tensor


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN can use packed weights: on a CPU in float32, or in bfloat16 if native."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def pack(weight_OI: Tensor) -> Tensor:
    """A packed copy for :func:`packed_linear`, in the weight's dtype; opaque to other functions."""
    # The second argument tunes the layout for a number of input rows; all tested numbers (2 to
    # 4096) give the same layout.
    return torch.ops.mkldnn._reorder_linear_weight(weight_OI, None)


def packed_linear(
    x: Tensor, packed: Tensor, bias_O: Tensor | None, *, gelu: bool = False
) -> Tensor:
    """``x @ weight.T + bias``, followed by a tanh-approximated GELU if ``gelu``.

    Args:
        x, bias_O: (..., I) and (O,), in the packed weight's dtype.
        packed: the result of :func:`pack` for a weight (O, I).
    Returns:
        (..., O), a new tensor.
    """
    name, variant = ("gelu", "tanh") if gelu else ("none", "")
    bias_O = None if bias_O is None else bias_O.contiguous()  # its stride is not looked at
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias_O, name, [], variant)
