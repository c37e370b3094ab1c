"""The dtype of cached K and V: the engine's, or 8 bits (``variant_kernels/kv_quantization.py``).

Off by default: 8 bits change logits and tokens; :mod:`variant.evaluation.kv_error` measures by how
much.
"""

from __future__ import annotations

from typing import Literal

import torch

from variant.engine.planning import kv_dtype_name
from variant_kernels.kv_quantization import KV8_DTYPE

KVDtype = Literal["fp8"] | torch.dtype | None


def check_kv_dtype(op: str, kv_dtype: object) -> torch.dtype | None:
    """float8_e4m3fn for "fp8" or itself; None for None, which is exact.

    Raises:
        ValueError: anything else.
    """
    return None if kv_dtype_name(op, kv_dtype) is None else KV8_DTYPE
