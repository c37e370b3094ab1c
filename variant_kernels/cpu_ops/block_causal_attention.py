"""CPU launchers of block_causal_attention. B batch, L tokens of all scales, H heads, D width."""

from __future__ import annotations

import torch

from variant_kernels.cpu_ops.common import KERNELS, dtype_code
from variant_kernels.tensors import address_and_strides, empty_as, last_contiguous


def launch_block_causal_attention_forward(
    *,
    q_BLHD: torch.Tensor,
    k_BLHD: torch.Tensor,
    v_BLHD: torch.Tensor,
    scale_lengths: tuple[int, ...],
    softmax_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in which a token of scale j sees every token of the scales up to and including j.

    Returns:
        out_BLHD (contiguous, q's dtype) and lse_BHL (float32), the natural logarithm of the sum of
        exp(softmax_scale * q.k) over what each query sees.
    Raises:
        TypeError: the dtype is neither float32 nor bfloat16.
    """
    batch, length, heads, _ = q_BLHD.shape
    out_BLHD = empty_as(q_BLHD, q_BLHD.dtype)
    lse_BHL = torch.empty((batch, heads, length), dtype=torch.float32, device="cpu")
    KERNELS.block_causal_attention_forward(
        tuple(q_BLHD.shape),
        address_and_strides(q_BLHD),
        address_and_strides(k_BLHD),
        address_and_strides(v_BLHD),
        scale_lengths,
        out_BLHD.data_ptr(),
        lse_BHL.data_ptr(),
        softmax_scale,
        dtype_code("block_causal_attention", "q_BLHD", q_BLHD),
        torch.get_num_threads(),
    )
    return out_BLHD, lse_BHL


def launch_block_causal_attention_backward(
    *,
    grad_out_BLHD: torch.Tensor,
    q_BLHD: torch.Tensor,
    k_BLHD: torch.Tensor,
    v_BLHD: torch.Tensor,
    out_BLHD: torch.Tensor,
    lse_BHL: torch.Tensor,
    scale_lengths: tuple[int, ...],
    softmax_scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of launch_block_causal_attention_forward; the same bits on every run.

    Returns:
        dq_BLHD, dk_BLHD, dv_BLHD: contiguous, q's dtype.
    """
    grad_out_BLHD = last_contiguous(grad_out_BLHD)
    lse_BHL = lse_BHL.contiguous()
    dq_BLHD = empty_as(q_BLHD, q_BLHD.dtype)
    dk_BLHD = empty_as(q_BLHD, q_BLHD.dtype)
    dv_BLHD = empty_as(q_BLHD, q_BLHD.dtype)
    KERNELS.block_causal_attention_backward(
        tuple(q_BLHD.shape),
        address_and_strides(grad_out_BLHD),
        address_and_strides(q_BLHD),
        address_and_strides(k_BLHD),
        address_and_strides(v_BLHD),
        address_and_strides(out_BLHD),
        lse_BHL.data_ptr(),
        scale_lengths,
        dq_BLHD.data_ptr(),
        dk_BLHD.data_ptr(),
        dv_BLHD.data_ptr(),
        softmax_scale,
        dtype_code("block_causal_attention", "q_BLHD", q_BLHD),
        torch.get_num_threads(),
    )
    return dq_BLHD, dk_BLHD, dv_BLHD
