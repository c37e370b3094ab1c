"""How K and V are kept: in the engine's dtype, or 8 bits (``variant_kernels/kv_quantization.py``).

Off by default: 8 bits change logits and tokens, by amounts that :mod:`variant.kv_error` measures.
"""

from __future__ import annotations

from typing import Literal

import torch

from variant_kernels.kv_quantization import KV8_DTYPE

KVDtype = Literal["fp8"] | torch.dtype | None


def check_kv_dtype(op: str, kv_dtype: object) -> torch.dtype | None:
    """float8_e4m3fn for "fp8" or itself; None for None, which is exact.

    Raises:
        ValueError: anything else.
    """
    if kv_dtype is None:
        return None
    if (isinstance(kv_dtype, str) and kv_dtype == "fp8") or kv_dtype is KV8_DTYPE:
        return KV8_DTYPE
    raise ValueError(
        f'{op}: kv_dtype must be None (exact: the dtype of the products), "fp8" or '
        f"torch.float8_e4m3fn; got {kv_dtype!r}"
    )
