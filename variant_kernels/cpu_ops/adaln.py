"""CPU launchers of adaln_modulate and gated_residual_adaln. B batch, T tokens, C width.

x may be float32 beside bfloat16 values. The contract is checked in ops/adaln.py.
"""

from __future__ import annotations

import torch

from variant_kernels.cpu_ops.common import KERNELS, dtype_code
from variant_kernels.tensors import address_and_strides, empty_as, last_contiguous


def launch_adaln_forward(
    *, x_BTC: torch.Tensor, scale_BC: torch.Tensor, shift_BC: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y = (x - mean) * rstd * (1 + scale) + shift; biased variance, float32 statistics.

    Returns:
        y_BTC (scale's dtype), mean_BT and rstd_BT (float32), all contiguous.
    Raises:
        TypeError: a dtype is neither float32 nor bfloat16.
    """
    y_BTC = empty_as(x_BTC, scale_BC.dtype)
    batch, tokens, _ = x_BTC.shape
    mean_BT = torch.empty((batch, tokens), dtype=torch.float32, device="cpu")
    rstd_BT = torch.empty((batch, tokens), dtype=torch.float32, device="cpu")
    KERNELS.adaln_forward(
        tuple(x_BTC.shape),
        address_and_strides(x_BTC),
        address_and_strides(scale_BC),
        address_and_strides(shift_BC),
        y_BTC.data_ptr(),
        mean_BT.data_ptr(),
        rstd_BT.data_ptr(),
        eps,
        dtype_code("adaln_modulate", "x_BTC", x_BTC),
        dtype_code("adaln_modulate", "scale_BC", scale_BC),
        torch.get_num_threads(),
    )
    return y_BTC, mean_BT, rstd_BT


def launch_adaln_backward(
    *,
    grad_y_BTC: torch.Tensor,
    x_BTC: torch.Tensor,
    scale_BC: torch.Tensor,
    mean_BT: torch.Tensor,
    rstd_BT: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of launch_adaln_forward, from its inputs and statistics.

    Returns:
        grad_x_BTC (x's dtype), grad_scale_BC and grad_shift_BC (scale's dtype), all contiguous.
    """
    grad_y_BTC = last_contiguous(grad_y_BTC)
    grad_x_BTC = empty_as(x_BTC, x_BTC.dtype)
    grad_scale_BC = empty_as(scale_BC, scale_BC.dtype)
    grad_shift_BC = empty_as(scale_BC, scale_BC.dtype)
    KERNELS.adaln_backward(
        tuple(x_BTC.shape),
        address_and_strides(grad_y_BTC),
        address_and_strides(x_BTC),
        address_and_strides(scale_BC),
        mean_BT.data_ptr(),
        rstd_BT.data_ptr(),
        grad_x_BTC.data_ptr(),
        grad_scale_BC.data_ptr(),
        grad_shift_BC.data_ptr(),
        dtype_code("adaln_modulate", "x_BTC", x_BTC),
        dtype_code("adaln_modulate", "scale_BC", scale_BC),
        torch.get_num_threads(),
    )
    return grad_x_BTC, grad_scale_BC, grad_shift_BC


def launch_gated_adaln_forward(
    *,
    x_BTC: torch.Tensor,
    y_BTC: torch.Tensor,
    gate_BC: torch.Tensor,
    scale_BC: torch.Tensor,
    shift_BC: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x_out = x + gate * y, rounded to x's dtype; h = adaLN(x_out) from the rounded values.

    Returns:
        x_out_BTC (x's dtype), h_BTC (y's dtype), mean_BT and rstd_BT (float32), all contiguous.
    Raises:
        TypeError: a dtype is neither float32 nor bfloat16.
    """
    x_out_BTC = empty_as(x_BTC, x_BTC.dtype)
    h_BTC = empty_as(x_BTC, y_BTC.dtype)
    batch, tokens, _ = x_BTC.shape
    mean_BT = torch.empty((batch, tokens), dtype=torch.float32, device="cpu")
    rstd_BT = torch.empty((batch, tokens), dtype=torch.float32, device="cpu")
    KERNELS.gated_adaln_forward(
        tuple(x_BTC.shape),
        address_and_strides(x_BTC),
        address_and_strides(y_BTC),
        address_and_strides(gate_BC),
        address_and_strides(scale_BC),
        address_and_strides(shift_BC),
        x_out_BTC.data_ptr(),
        h_BTC.data_ptr(),
        mean_BT.data_ptr(),
        rstd_BT.data_ptr(),
        eps,
        dtype_code("gated_residual_adaln", "x_BTC", x_BTC),
        dtype_code("gated_residual_adaln", "y_BTC", y_BTC),
        torch.get_num_threads(),
    )
    return x_out_BTC, h_BTC, mean_BT, rstd_BT


def launch_gated_adaln_backward(
    *,
    grad_x_out_BTC: torch.Tensor,
    grad_h_BTC: torch.Tensor,
    x_out_BTC: torch.Tensor,
    y_BTC: torch.Tensor,
    gate_BC: torch.Tensor,
    scale_BC: torch.Tensor,
    mean_BT: torch.Tensor,
    rstd_BT: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of launch_gated_adaln_forward.

    Returns:
        grad_x_BTC (x's dtype), grad_y_BTC, grad_gate_BC, grad_scale_BC, grad_shift_BC (y's dtype),
        all contiguous.
    """
    grad_x_out_BTC = last_contiguous(grad_x_out_BTC)
    grad_h_BTC = last_contiguous(grad_h_BTC)
    grad_x_BTC = empty_as(x_out_BTC, x_out_BTC.dtype)
    grad_y_BTC = empty_as(x_out_BTC, y_BTC.dtype)
    grad_gate_BC = empty_as(gate_BC, y_BTC.dtype)
    grad_scale_BC = empty_as(gate_BC, y_BTC.dtype)
    grad_shift_BC = empty_as(gate_BC, y_BTC.dtype)
    KERNELS.gated_adaln_backward(
        tuple(x_out_BTC.shape),
        address_and_strides(grad_x_out_BTC),
        address_and_strides(grad_h_BTC),
        address_and_strides(x_out_BTC),
        address_and_strides(y_BTC),
        address_and_strides(gate_BC),
        address_and_strides(scale_BC),
        mean_BT.data_ptr(),
        rstd_BT.data_ptr(),
        grad_x_BTC.data_ptr(),
        grad_y_BTC.data_ptr(),
        grad_gate_BC.data_ptr(),
        grad_scale_BC.data_ptr(),
        grad_shift_BC.data_ptr(),
        dtype_code("gated_residual_adaln", "x_out_BTC", x_out_BTC),
        dtype_code("gated_residual_adaln", "y_BTC", y_BTC),
        torch.get_num_threads(),
    )
    return grad_x_BTC, grad_y_BTC, grad_gate_BC, grad_scale_BC, grad_shift_BC
