"""CPU launchers of qk_norm. B batch, T tokens, H heads, D head width."""

from __future__ import annotations

import torch

from variant_kernels.cpu_ops.common import KERNELS, dtype_code
from variant_kernels.tensors import address_and_strides, empty_as, last_contiguous


def launch_qk_norm_forward(
    *, q_BTHD: torch.Tensor, k_BTHD: torch.Tensor, scale_mul_1H11: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """q / max(|q|, 1e-12) * exp(min(scale_mul, log 100)) and k / max(|k|, 1e-12).

    Returns:
        q_out_BTHD, k_out_BTHD: contiguous, the inputs' dtype.
    Raises:
        TypeError: the dtype is neither float32 nor bfloat16.
    """
    scale_mul_H = scale_mul_1H11.reshape(-1).float().contiguous()
    q_out_BTHD = empty_as(q_BTHD, q_BTHD.dtype)
    k_out_BTHD = empty_as(k_BTHD, k_BTHD.dtype)
    KERNELS.qk_norm_forward(
        tuple(q_BTHD.shape),
        address_and_strides(q_BTHD),
        address_and_strides(k_BTHD),
        scale_mul_H.data_ptr(),
        q_out_BTHD.data_ptr(),
        k_out_BTHD.data_ptr(),
        dtype_code("qk_norm", "q_BTHD", q_BTHD),
        torch.get_num_threads(),
    )
    return q_out_BTHD, k_out_BTHD


def launch_qk_norm_backward(
    *,
    grad_q_BTHD: torch.Tensor,
    grad_k_BTHD: torch.Tensor,
    q_BTHD: torch.Tensor,
    k_BTHD: torch.Tensor,
    scale_mul_1H11: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of launch_qk_norm_forward.

    A head whose scale_mul lies past log 100 gets no gradient there; a row whose norm was clamped
    gets that of a division by 1e-12.

    Returns:
        dq_BTHD, dk_BTHD (contiguous, the inputs' dtype), dscale_mul_1H11 (scale_mul's dtype).
    """
    grad_q_BTHD = last_contiguous(grad_q_BTHD)
    grad_k_BTHD = last_contiguous(grad_k_BTHD)
    scale_mul_H = scale_mul_1H11.reshape(-1).float().contiguous()
    dq_BTHD = empty_as(q_BTHD, q_BTHD.dtype)
    dk_BTHD = empty_as(k_BTHD, k_BTHD.dtype)
    dscale_mul_H = empty_as(scale_mul_H, torch.float32)
    KERNELS.qk_norm_backward(
        tuple(q_BTHD.shape),
        address_and_strides(grad_q_BTHD),
        address_and_strides(grad_k_BTHD),
        address_and_strides(q_BTHD),
        address_and_strides(k_BTHD),
        scale_mul_H.data_ptr(),
        dq_BTHD.data_ptr(),
        dk_BTHD.data_ptr(),
        dscale_mul_H.data_ptr(),
        dtype_code("qk_norm", "q_BTHD", q_BTHD),
        torch.get_num_threads(),
    )
    dscale_mul_1H11 = dscale_mul_H.view(scale_mul_1H11.shape).to(scale_mul_1H11.dtype)
    return dq_BTHD, dk_BTHD, dscale_mul_1H11
