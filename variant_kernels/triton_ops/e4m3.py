"""8-bit K and V in Triton: e4m3 codes and their scales (``kv_quantization``) by integer arithmetic.

Kernels receive pages as bytes: sm_80 and gfx942 have no such format, and compilers cast to it
differently. The arithmetic needs float32's subnormal numbers, which Triton does not flush.
"""

# Triton's compiler gives a kernel's arguments other types than Python's checker sees.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

# A kernel's arguments for the scales, in the order of scale_arguments, for pages without scales:
# compile-time constants, which cost nothing.
NO_SCALES: dict[str, Any] = {
    "k_scales_ptr": None,
    "v_scales_ptr": None,
    "k_scales_stride_p": None,
    "k_scales_stride_n": None,
    "v_scales_stride_p": None,
    "v_scales_stride_n": None,
}


def page_bytes(
    k_pages_PNHD: torch.Tensor, v_pages_PNHD: torch.Tensor, scales_PNH: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pages as kernel arguments: viewed as bytes if they have scales."""
    if scales_PNH is None:
        return k_pages_PNHD, v_pages_PNHD
    return k_pages_PNHD.view(torch.uint8), v_pages_PNHD.view(torch.uint8)


def scale_arguments(
    k_scales_PNH: torch.Tensor | None, v_scales_PNH: torch.Tensor | None
) -> tuple[torch.Tensor | int | None, ...]:
    """Scales and their strides along pages and slots, as kernel arguments."""
    if k_scales_PNH is None or v_scales_PNH is None:
        return tuple(NO_SCALES.values())
    return (k_scales_PNH, v_scales_PNH, *k_scales_PNH.stride()[:2], *v_scales_PNH.stride()[:2])


@triton.jit
def e4m3_decode(codes):
    """Decode e4m3 bytes to float32 (exact); 0x7f and 0xff are NaN."""
    # Move sign, exponent and mantissa into float32's fields. The arithmetic shift also copies the
    # sign into the upper four bits of the exponent; the mask clears these.
    bits = (codes.to(tl.int8, bitcast=True).to(tl.int32) << 20) & -0x78100000
    # float32's exponent bias is larger by 120. Subnormal codes have become subnormal float32
    # numbers, so they need no special case.
    x = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
    return tl.where(tl.abs(x) > 448.0, float("nan"), x)


@triton.jit
def e4m3_encode(x):
    """Round float32 numbers to e4m3 bytes, ties to even; NaN for NaN and magnitudes above 448."""
    bits = x.to(tl.uint32, bitcast=True)
    sign, magnitude = (bits >> 24) & 0x80, bits & 0x7FFFFFFF
    # Add half of the dropped bits' range, less one if the lowest remaining bit is 0: ties round to
    # even. A mantissa that overflows increments the exponent.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 codes are multiples of 2^-9. That is the unit in the last place of 2^14, so adding
    # 2^14 rounds to it.
    shifted = magnitude.to(tl.float32, bitcast=True) + 16384.0
    subnormal = shifted.to(tl.uint32, bitcast=True) - 0x46800000
    code = tl.where(magnitude < 0x3C800000, subnormal, normal)  # 2^-6
    code = tl.where(magnitude > 0x43E00000, 0x7F, code)  # 448
    return (sign | code).to(tl.uint8)


@triton.jit
def scale_of(exponents):
    """Decode E8M0 bytes to float32: byte e is 2^(e - 127)."""
    return (exponents.to(tl.uint32) << 23).to(tl.float32, bitcast=True)


@triton.jit
def quantised(x, inside):
    """Codes of rows, and the byte of each row's scale, as ``kv_quantization.quantize_kv``.

    x: (rows, columns); entries outside the mask ``inside`` do not affect the scale.
    """
    x = x.to(tl.float32)
    largest = tl.cast(tl.max(tl.where(inside, tl.abs(x), 0.0), 1), tl.uint32, bitcast=True)
    # The smallest power of two s with largest <= 448 s = 1.75 * 2^8 s; at least 1 for 2^-126.
    exponents = (largest >> 23) + ((largest & 0x7FFFFF) > 0x600000).to(tl.uint32)
    exponents = tl.maximum(exponents, 9) - 8
    # The scale stays finite for a row that holds NaN or infinity.
    exponents = tl.minimum(exponents, 247)
    codes = e4m3_encode(x * scale_of(254 - exponents)[:, None])
    return codes, exponents.to(tl.uint8)


@triton.jit
def quantised_into(scales, x, inside, h, heads):
    """Return the codes of the heads of one token; store the bytes of their scales at ``scales``."""
    codes, exponents = quantised(x, inside)
    tl.store(scales + h, exponents, mask=h < heads)
    return codes
