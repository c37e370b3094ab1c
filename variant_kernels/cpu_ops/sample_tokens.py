"""CPU launcher of sample_tokens. B images, T tokens, V codebook entries, R = B * T rows."""

from __future__ import annotations

import torch

from variant_kernels.cpu_ops.common import KERNELS, dtype_code
from variant_kernels.cpu_ops.values import raise_bad_row
from variant_kernels.tensors import address_and_strides, last_contiguous


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
    tensors, which a captured graph reads at each replay.

    Returns:
        tokens_BT: int64.
    Raises:
        ValueError: a row holds NaN or +inf after guidance, or nothing finite.
        TypeError: the dtype is neither float32 nor bfloat16.
    """
    logits_2BTV = last_contiguous(logits_2BTV)
    images, tokens, entries = logits_2BTV.shape
    image_ids_B = image_ids_B.contiguous()
    tokens_BT = torch.empty((images // 2, tokens), dtype=torch.int64, device="cpu")
    status, row = KERNELS.sample_tokens(
        (images // 2, tokens, entries),
        address_and_strides(logits_2BTV),
        float(guidance),
        top_k,
        top_p,
        int(seed) & 0xFFFFFFFFFFFFFFFF,
        image_ids_B.data_ptr(),
        position,
        0 if exponential_RV is None else exponential_RV.data_ptr(),
        tokens_BT.data_ptr(),
        dtype_code("sample_tokens", "logits_2BTV", logits_2BTV),
        torch.get_num_threads(),
    )
    if status:
        raise_bad_row("sample_tokens", *divmod(row, tokens))
    return tokens_BT
