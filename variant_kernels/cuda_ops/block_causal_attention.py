"""CUDA launchers of block_causal_attention. B batch, L tokens of all scales, H heads, D width."""

from __future__ import annotations

import struct
from array import array

import torch

from variant_kernels.cuda_ops import common
from variant_kernels.tensors import address_and_strides, empty_as, last_contiguous

# BlockCausalForwardArgs, BlockCausalBackwardCudaArgs
_FORWARD = struct.Struct("@20qfii0q")
_BACKWARD = struct.Struct("@30qfiiq")
# kMostScales
MAX_SCALES = 256


def _lengths(scale_lengths: tuple[int, ...]) -> array[int]:
    """The lengths in host memory, which the launcher reads before it returns."""
    if len(scale_lengths) > MAX_SCALES:
        raise ValueError(
            f'block_causal_attention: backend "cuda" takes a layout of at most {MAX_SCALES} '
            f"scales; got {len(scale_lengths)}"
        )
    return array("q", scale_lengths)


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
        ValueError: more than 256 scales.  RuntimeError: the launch failed.
    """
    batch, length, heads, head_dim = q_BLHD.shape
    out_BLHD = empty_as(q_BLHD, q_BLHD.dtype)
    lse_BHL = q_BLHD.new_empty((batch, heads, length), dtype=torch.float32)
    if out_BLHD.numel() == 0:
        return out_BLHD, lse_BHL
    common.check_rows("block_causal_attention", "q_BLHD", batch * length * heads)
    lengths = _lengths(scale_lengths)
    common.launch(
        "block_causal_attention",
        "block_causal_attention_forward",
        _FORWARD,
        (
            *(batch, length, heads, head_dim),
            *address_and_strides(q_BLHD),
            *address_and_strides(k_BLHD),
            *address_and_strides(v_BLHD),
            *lengths.buffer_info(),
            out_BLHD.data_ptr(),
            lse_BHL.data_ptr(),
            softmax_scale,
            common.DTYPE_CODES[q_BLHD.dtype],
            0,
        ),
        q_BLHD,
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
    Raises:
        ValueError: more than 256 scales.  RuntimeError: the launch failed.
    """
    grad_out_BLHD, lse_BHL = last_contiguous(grad_out_BLHD), lse_BHL.contiguous()
    batch, length, heads, head_dim = q_BLHD.shape
    dq_BLHD = empty_as(q_BLHD, q_BLHD.dtype)
    dk_BLHD = empty_as(q_BLHD, q_BLHD.dtype)
    dv_BLHD = empty_as(q_BLHD, q_BLHD.dtype)
    if dq_BLHD.numel() == 0:
        return dq_BLHD, dk_BLHD, dv_BLHD
    common.check_rows("block_causal_attention", "q_BLHD", batch * length * heads)
    lengths = _lengths(scale_lengths)
    delta_BHL = torch.empty_like(lse_BHL)
    common.launch(
        "block_causal_attention",
        "block_causal_attention_backward",
        _BACKWARD,
        (
            *(batch, length, heads, head_dim),
            *address_and_strides(grad_out_BLHD),
            *address_and_strides(q_BLHD),
            *address_and_strides(k_BLHD),
            *address_and_strides(v_BLHD),
            *address_and_strides(out_BLHD),
            lse_BHL.data_ptr(),
            *lengths.buffer_info(),
            dq_BLHD.data_ptr(),
            dk_BLHD.data_ptr(),
            dv_BLHD.data_ptr(),
            softmax_scale,
            common.DTYPE_CODES[q_BLHD.dtype],
            0,
            delta_BHL.data_ptr(),
        ),
        q_BLHD,
    )
    return dq_BLHD, dk_BLHD, dv_BLHD
