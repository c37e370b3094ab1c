"""CUDA launchers of adaln_modulate and gated_residual_adaln. B batch, T tokens, C width.

x may be float32 beside 16-bit values. The contract is checked in ops/adaln.py.
"""

from __future__ import annotations

import struct

import torch

from variant_kernels.cuda_ops import common
from variant_kernels.tensors import address_and_strides, empty_as, last_contiguous

# AdaLNForwardArgs, AdaLNBackwardCudaArgs, GatedAdaLNForwardArgs, GatedAdaLNBackwardCudaArgs
_FORWARD = struct.Struct("@13qfiii0q")
_BACKWARD = struct.Struct("@16qiiiq")
_GATED_FORWARD = struct.Struct("@19qfiii0q")
_GATED_BACKWARD = struct.Struct("@26qiiiq")
# kAdaLNTokensPerTile
TOKENS_PER_TILE = 16


def _codes(x: torch.Tensor, value: torch.Tensor) -> tuple[int, int, int]:
    """x_dtype, value_dtype and the number of threads, which only the CPU reads."""
    return common.DTYPE_CODES[x.dtype], common.DTYPE_CODES[value.dtype], 0


def _statistics(x_BTC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    shape, device = x_BTC.shape[:2], x_BTC.device
    mean_BT = torch.empty(shape, dtype=torch.float32, device=device)
    return mean_BT, torch.empty_like(mean_BT)


def _partial(x_BTC: torch.Tensor, kinds: int) -> torch.Tensor:
    batch, tokens, width = x_BTC.shape
    shape = (batch, -(-tokens // TOKENS_PER_TILE), kinds, width)
    return torch.empty(shape, dtype=torch.float32, device=x_BTC.device)


def launch_adaln_forward(
    *, x_BTC: torch.Tensor, scale_BC: torch.Tensor, shift_BC: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y = (x - mean) * rstd * (1 + scale) + shift; biased variance, float32 statistics.

    Returns:
        y_BTC (scale's dtype), mean_BT and rstd_BT (float32), all contiguous.
    Raises:
        RuntimeError: the launch failed.
    """
    y_BTC = empty_as(x_BTC, scale_BC.dtype)
    mean_BT, rstd_BT = _statistics(x_BTC)
    if x_BTC.numel() == 0:
        return y_BTC, mean_BT, rstd_BT
    common.check_rows("adaln_modulate", "x_BTC", x_BTC.shape[0] * x_BTC.shape[1])
    common.launch(
        "adaln_modulate",
        "adaln_forward",
        _FORWARD,
        (
            *x_BTC.shape,
            *address_and_strides(x_BTC),
            *address_and_strides(scale_BC),
            *address_and_strides(shift_BC),
            y_BTC.data_ptr(),
            mean_BT.data_ptr(),
            rstd_BT.data_ptr(),
            eps,
            *_codes(x_BTC, scale_BC),
        ),
        x_BTC,
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
    """The gradients of launch_adaln_forward, from its inputs and statistics; no atomics.

    Returns:
        grad_x_BTC (x's dtype), grad_scale_BC and grad_shift_BC (scale's dtype), all contiguous.
    Raises:
        RuntimeError: the launch failed.
    """
    grad_y_BTC = last_contiguous(grad_y_BTC)
    mean_BT, rstd_BT = mean_BT.contiguous(), rstd_BT.contiguous()
    grad_x_BTC = empty_as(x_BTC, x_BTC.dtype)
    grad_scale_BC = empty_as(scale_BC, scale_BC.dtype)
    grad_shift_BC = empty_as(scale_BC, scale_BC.dtype)
    if x_BTC.numel() == 0:
        return grad_x_BTC, grad_scale_BC.zero_(), grad_shift_BC.zero_()
    partial = _partial(x_BTC, 2)
    common.launch(
        "adaln_modulate",
        "adaln_backward",
        _BACKWARD,
        (
            *x_BTC.shape,
            *address_and_strides(grad_y_BTC),
            *address_and_strides(x_BTC),
            *address_and_strides(scale_BC),
            mean_BT.data_ptr(),
            rstd_BT.data_ptr(),
            grad_x_BTC.data_ptr(),
            grad_scale_BC.data_ptr(),
            grad_shift_BC.data_ptr(),
            *_codes(x_BTC, scale_BC),
            partial.data_ptr(),
        ),
        x_BTC,
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
        RuntimeError: the launch failed.
    """
    x_out_BTC = empty_as(x_BTC, x_BTC.dtype)
    h_BTC = empty_as(x_BTC, y_BTC.dtype)
    mean_BT, rstd_BT = _statistics(x_BTC)
    if x_BTC.numel() == 0:
        return x_out_BTC, h_BTC, mean_BT, rstd_BT
    common.check_rows("gated_residual_adaln", "x_BTC", x_BTC.shape[0] * x_BTC.shape[1])
    common.launch(
        "gated_residual_adaln",
        "gated_adaln_forward",
        _GATED_FORWARD,
        (
            *x_BTC.shape,
            *address_and_strides(x_BTC),
            *address_and_strides(y_BTC),
            *address_and_strides(gate_BC),
            *address_and_strides(scale_BC),
            *address_and_strides(shift_BC),
            x_out_BTC.data_ptr(),
            h_BTC.data_ptr(),
            mean_BT.data_ptr(),
            rstd_BT.data_ptr(),
            eps,
            *_codes(x_BTC, y_BTC),
        ),
        x_BTC,
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
    """The gradients of launch_gated_adaln_forward; no atomics.

    Returns:
        grad_x_BTC (x's dtype), grad_y_BTC, grad_gate_BC, grad_scale_BC, grad_shift_BC (y's dtype),
        all contiguous.
    Raises:
        RuntimeError: the launch failed.
    """
    grad_x_out_BTC = last_contiguous(grad_x_out_BTC)
    grad_h_BTC = last_contiguous(grad_h_BTC)
    mean_BT, rstd_BT = mean_BT.contiguous(), rstd_BT.contiguous()
    grad_x_BTC = empty_as(x_out_BTC, x_out_BTC.dtype)
    grad_y_BTC = empty_as(x_out_BTC, y_BTC.dtype)
    grad_gate_BC = empty_as(gate_BC, y_BTC.dtype)
    grad_scale_BC = empty_as(gate_BC, y_BTC.dtype)
    grad_shift_BC = empty_as(gate_BC, y_BTC.dtype)
    grads = (grad_x_BTC, grad_y_BTC, grad_gate_BC, grad_scale_BC, grad_shift_BC)
    if x_out_BTC.numel() == 0:
        for grad in grads:
            grad.zero_()
        return grads
    partial = _partial(x_out_BTC, 3)
    common.launch(
        "gated_residual_adaln",
        "gated_adaln_backward",
        _GATED_BACKWARD,
        (
            *x_out_BTC.shape,
            *address_and_strides(grad_x_out_BTC),
            *address_and_strides(grad_h_BTC),
            *address_and_strides(x_out_BTC),
            *address_and_strides(y_BTC),
            *address_and_strides(gate_BC),
            *address_and_strides(scale_BC),
            mean_BT.data_ptr(),
            rstd_BT.data_ptr(),
            *(grad.data_ptr() for grad in grads),
            *_codes(x_out_BTC, y_BTC),
            partial.data_ptr(),
        ),
        x_out_BTC,
    )
    return grads
