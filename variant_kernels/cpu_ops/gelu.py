"""CPU launchers of the tanh-approximated GELU, for contiguous tensors of any shape."""

from __future__ import annotations

import torch

from variant_kernels.cpu_ops.common import KERNELS, dtype_code
from variant_kernels.tensors import empty_as


def launch_gelu_forward(*, x: torch.Tensor) -> torch.Tensor:
    """``x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))``, contiguous, of x's dtype.

    Raises:
        TypeError: the dtype is neither float32 nor bfloat16.
    """
    y = empty_as(x, x.dtype)
    KERNELS.gelu_forward(
        x.numel(), x.data_ptr(), y.data_ptr(), dtype_code("gelu", "x", x), torch.get_num_threads()
    )
    return y


def launch_gelu_backward(*, grad_y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The gradient of launch_gelu_forward, contiguous, of x's dtype."""
    grad_x = empty_as(x, x.dtype)
    KERNELS.gelu_backward(
        x.numel(),
        grad_y.data_ptr(),
        x.data_ptr(),
        grad_x.data_ptr(),
        dtype_code("gelu", "x", x),
        torch.get_num_threads(),
    )
    return grad_x
