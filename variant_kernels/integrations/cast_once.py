"""Linear layers that cast their weights once per generation under autocast."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from variant_kernels.integrations.alterations import has_own_forward
from variant_kernels.integrations.base import Patched
from variant_kernels.integrations.runtime import can_cast_once


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The current autocast dtype on ``device``; None outside autocast."""
    kind = device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


class CastOnceLinear(Patched, nn.Linear):
    """A linear layer whose weights are cast once per generation under autocast.

    The 16-bit copies are kept from the first use to the end of the generation.
    """

    def forward(self, input: Tensor) -> Tensor:
        runtime: Any = self.patch_state.runtime
        dtype = autocast_dtype(input.device)
        if (
            not runtime.generating
            or dtype is None
            or torch.is_grad_enabled()
            or not (can_cast_once(self) and has_own_forward(nn.Linear))
        ):
            return super().forward(input)
        return runtime.linear(input, self, self.bias, dtype)


def without_autocast(module: nn.Module, cond: Tensor) -> Tensor:
    """A projection of the class condition, in the dtype of its weights.

    It runs once per generation on few rows, so casting the weights would cost more than the
    product.
    """
    weight = next(module.parameters(), cond)  # a replica of DataParallel has no parameters
    with torch.autocast(cond.device.type, enabled=False):
        return module(cond.to(weight.dtype))
