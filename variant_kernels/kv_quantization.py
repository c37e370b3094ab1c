"""8-bit K and V: float8_e4m3fn values with one power-of-two scale per token and head.

Axes: ... any, H heads, D width of one head.

The scale is stored as its biased exponent, one byte (E8M0, as in the OCP Microscaling formats
specification 1.0): s = 2^(byte - 127). Restricting scales to powers of two costs no accuracy: e4m3
is a floating-point format, so its relative precision does not depend on the position in its range,
and ``value * s`` is exact in bfloat16, float32 and float16 (in float16 below 2^16, to which
magnitudes from 63,488 round). All backends therefore read the same K and V in any compute dtype.
The only difference from 16-bit pages is the rounding to four significant bits when a token is
written.
"""

from __future__ import annotations

import torch
from torch import Tensor

KV8_DTYPE = torch.float8_e4m3fn
# Exponent and float32 mantissa bits of e4m3's largest finite value, 448 = 1.75 * 2^8.
_LARGEST_EXPONENT = 8
_LARGEST_MANTISSA = 0x600000


def row_scales(x_HD: Tensor) -> Tensor:
    """E8M0 bytes of the smallest powers of two s with max|x| <= 448 s, per row of the last axis.

    The byte is at least 1 (s = 2^-126), so that 1/s is finite. It is computed from the bits of the
    row's largest magnitude, so that all backends compute the same byte.

    Args:
        x_HD: (..., H, D), float32, float16 or bfloat16.
    Returns:
        (..., H) uint8.
    """
    bits_H = x_HD.float().abs().amax(-1).contiguous().view(torch.int32)
    above_H = (bits_H & 0x7FFFFF) > _LARGEST_MANTISSA
    return ((bits_H >> 23) - _LARGEST_EXPONENT + above_H).clamp(min=1).to(torch.uint8)


def scale_values(scales_H: Tensor) -> Tensor:
    """Decode E8M0 bytes to float32: byte e is 2^(e - 127)."""
    return (scales_H.to(torch.int32) << 23).view(torch.float32)


def quantize_kv(x_HD: Tensor) -> tuple[Tensor, Tensor]:
    """Round rows to 8 bits: ``x / s`` to the nearest e4m3 value, ties to even.

    A row of zeros gives zeros. An entry that is not finite becomes NaN; the other entries of such
    a row are then unspecified.

    Args:
        x_HD: (..., H, D), float32, float16 or bfloat16.
    Returns:
        values (..., H, D) float8_e4m3fn, scales (..., H) uint8.
    """
    scales_H = row_scales(x_HD)
    reciprocal_H = scale_values(254 - scales_H)
    scaled_HD = x_HD.float() * reciprocal_H.unsqueeze(-1)
    # Devices cast infinity to float8_e4m3fn differently.
    scaled_HD = scaled_HD.masked_fill(scaled_HD.isinf(), torch.nan)
    return scaled_HD.to(KV8_DTYPE), scales_H


def dequantize_kv(
    values_HD: Tensor, scales_H: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """``values * s``, the inverse of :func:`quantize_kv` up to rounding: (..., H, D), ``dtype``."""
    return (values_HD.float() * scale_values(scales_H).unsqueeze(-1)).to(dtype)
