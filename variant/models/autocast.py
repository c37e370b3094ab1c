"""torch.autocast on any device: on "meta", of tensors without values, torch has none and raises."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def autocast_of(tensor: Tensor) -> torch.dtype | None:
    """The dtype of matrix products inside autocast on the tensor's device; None outside of it."""
    device = tensor.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def no_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """No autocast on the tensor's device within the block."""
    device = tensor.device.type
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)
