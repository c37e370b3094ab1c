"""The dtype in which matrix products of a dtype run: float32 where the processor has no other.

A CPU without 16-bit products computes them by way of float32, and torch does so without blocking: a
product of 256 x 512 x 512, one thread of a Zen 4, GFLOP/s in float32 / bfloat16 / float16: 88 / 219
/ 10; limited to AVX-512 without BF16: 92 / 34 / 12; limited to AVX2: 84 / 10 / 12.
"""

from __future__ import annotations

import os

import torch

# Values of oneDNN's ONEDNN_MAX_CPU_ISA below its first instruction set with bfloat16 products.
_WITHOUT_BF16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI")
_SIXTEEN_BITS = (torch.bfloat16, torch.float16)


def has_products(device: torch.device | str, dtype: torch.dtype) -> bool:
    """Whether matrix products of ``dtype`` are native on a device; true on every GPU."""
    if torch.device(device).type != "cpu" or dtype not in _SIXTEEN_BITS:
        return True
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    # True for AVX-512 without BF16 too, where oneDNN emulates the products.
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    capabilities = torch.cpu.get_capabilities()
    if capabilities.get("architecture") != "x86_64":
        return True
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or ""
    return limit.upper() not in _WITHOUT_BF16 and any(
        capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "avx10_1", "avx10_2")
    )


def product_dtype(device: torch.device | str, dtype: torch.dtype) -> torch.dtype:
    """``dtype`` itself, or float32 where an engine of it is faster with float32 products.

    So it is where products are emulated, and in float16 on every CPU: the ops between the products
    have no float16 kernel. An engine of float16, four layers of width 512, 256 x 256 pixels, one
    thread of a Xeon with native float16 products: 807 ms with these, 681 ms with float32 products.
    """
    if dtype == torch.float16 and torch.device(device).type == "cpu":
        return torch.float32
    return dtype if has_products(device, dtype) else torch.float32


def slow_products(device: torch.device | str) -> tuple[torch.dtype, ...]:
    """The 16-bit dtypes whose matrix products are emulated on a device."""
    return tuple(dtype for dtype in _SIXTEEN_BITS if not has_products(device, dtype))
