"""CUDA launcher of sample_tokens. B images, T tokens, V codebook entries, R = B * T rows."""

from __future__ import annotations

import struct

import torch

from variant_kernels.cuda_ops import common
from variant_kernels.tensors import address_and_strides, last_contiguous

# SampleTokensArgs
_ARGS = struct.Struct("@6qdqqd7qi0q")


def launch_sample_tokens(
    *,
    logits_2BTV: torch.Tensor,
    guidance: float | torch.Tensor,
    top_k: int,
    top_p: float,
    seed: int | torch.Tensor,
    image_ids_B: torch.Tensor,
    position: int,
    exponential_RV: torch.Tensor | None,
) -> torch.Tensor:
    """Guide, filter and draw one token per row; conditional rows come first in logits_2BTV.

    The draw is by Philox keyed with (seed, image, position + t), or argmax(p / exponential_RV)
    if that is not None (float32, contiguous, rows in (b, t) order). guidance and seed may be 0-d
    tensors (float64, int64), which a captured graph reads at each replay.
    A row that holds NaN or +inf after guidance, or nothing finite, gives token 0.

    Returns:
        tokens_BT: int64.
    Raises:
        RuntimeError: the launch failed.
    """
    logits_2BTV = last_contiguous(logits_2BTV)
    images, tokens, entries = logits_2BTV.shape
    batch = images // 2
    tokens_BT = logits_2BTV.new_empty((batch, tokens), dtype=torch.int64)
    if tokens_BT.numel() == 0:
        return tokens_BT
    common.check_rows("sample_tokens", "logits_2BTV", batch * tokens)
    weight, guidance_address = 0.0, 0
    if isinstance(guidance, torch.Tensor):
        guidance = guidance.to(torch.float64)
        guidance_address = guidance.data_ptr()
    else:
        weight = guidance
    number, seed_address = 0, 0
    if isinstance(seed, torch.Tensor):
        seed = seed.to(torch.int64)
        seed_address = seed.data_ptr()
    else:
        number = seed
    common.launch(
        "sample_tokens",
        "sample_tokens",
        _ARGS,
        (
            *(batch, tokens, entries),
            *address_and_strides(logits_2BTV),
            weight,
            guidance_address,
            top_k,
            top_p,
            number,
            seed_address,
            image_ids_B.data_ptr(),
            image_ids_B.stride(0),
            position,
            0 if exponential_RV is None else exponential_RV.data_ptr(),
            tokens_BT.data_ptr(),
            common.DTYPE_CODES[logits_2BTV.dtype],
        ),
        logits_2BTV,
    )
    return tokens_BT
