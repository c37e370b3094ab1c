"""8-bit K and V in Triton: e4m3 codes and their scales (``kv_quantization``) by integer arithmetic.

Pages reach the kernels as bytes: sm_80 and gfx942 know no such format, and what a compiler makes of
a cast differs. float32's subnormal numbers are needed; Triton flushes none.
"""

# Triton's compiler gives a kernel's arguments other types than Python's checker sees.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

# A kernel's arguments for the scales, in the order of scale_arguments, for pages without scales:
# compile-time constants, which cost nothing.
NO_SCALES = dict.fromkeys(
    (
        *("k_scales_ptr", "v_scales_ptr", "k_scales_stride_p", "k_scales_stride_n"),
        *("v_scales_stride_p", "v_scales_stride_n"),
    )
)


def page_bytes(
    k_pages_PNHD: torch.Tensor, v_pages_PNHD: torch.Tensor, scales_PNH: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pages as a kernel takes them: bytes where they have scales."""
    if scales_PNH is None:
        return k_pages_PNHD, v_pages_PNHD
    return k_pages_PNHD.view(torch.uint8), v_pages_PNHD.view(torch.uint8)


def scale_arguments(
    k_scales_PNH: torch.Tensor | None, v_scales_PNH: torch.Tensor | None
) -> tuple[torch.Tensor | int | None, ...]:
    """Scales and their strides along pages and slots as a kernel takes them."""
    if k_scales_PNH is None or v_scales_PNH is None:
        return tuple(NO_SCALES.values())
    return (k_scales_PNH, v_scales_PNH, *k_scales_PNH.stride()[:2], *v_scales_PNH.stride()[:2])


@triton.jit
def e4m3_decode(codes):
    """The numbers that bytes stand for, in float32 (exact); 0x7f and 0xff are NaN."""
    # Sign, exponent and mantissa into float32's fields: the shift copies the sign into the first
    # four bits of the exponent, where it is cut out again.
    bits = (codes.to(tl.int8, bitcast=True).to(tl.int32) << 20) & -0x78100000
    # Its bias is larger by 120. A code without exponent has become a subnormal number, so that it
    # needs nothing of its own.
    x = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
    return tl.where(tl.abs(x) > 448.0, float("nan"), x)


@triton.jit
def e4m3_encode(x):
    """The bytes nearest to float32 numbers, ties to the even one; beyond 448 and NaN: NaN."""
    bits = x.to(tl.uint32, bitcast=True)
    sign, magnitude = (bits >> 24) & 0x80, bits & 0x7FFFFFFF
    # Half of what is cut off, a little less where the last bit kept is 0: ties become even. A
    # mantissa that overflows moves the exponent on.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 codes count steps of 2^-9, which is what the last bit of 2^14 is worth.
    steps = magnitude.to(tl.float32, bitcast=True) + 16384.0
    subnormal = steps.to(tl.uint32, bitcast=True) - 0x46800000
    code = tl.where(magnitude < 0x3C800000, subnormal, normal)  # 2^-6
    code = tl.where(magnitude > 0x43E00000, 0x7F, code)  # 448
    return (sign | code).to(tl.uint8)


@triton.jit
def scale_of(exponents):
    """E8M0 bytes as the float32 numbers that they stand for: byte e is 2^(e - 127)."""
    return (exponents.to(tl.uint32) << 23).to(tl.float32, bitcast=True)


@triton.jit
def quantised(x, inside):
    """Codes of rows, and the byte of each row's scale: ``kv_quantization.quantize_kv``.

    x: (rows, columns); what is not ``inside`` counts for nothing.
    """
    x = x.to(tl.float32)
    largest = tl.cast(tl.max(tl.where(inside, tl.abs(x), 0.0), 1), tl.uint32, bitcast=True)
    # The smallest power of two s with largest <= 448 s = 1.75 * 2^8 s; at least 1 for 2^-126.
    exponents = (largest >> 23) + ((largest & 0x7FFFFF) > 0x600000).to(tl.uint32)
    exponents = tl.maximum(exponents, 9) - 8
    # A row that holds NaN or infinity still has a scale that is a number.
    exponents = tl.minimum(exponents, 247)
    codes = e4m3_encode(x * scale_of(254 - exponents)[:, None])
    return codes, exponents.to(tl.uint8)


@triton.jit
def quantised_into(scales, x, inside, h, heads):
    """Codes of the heads of one token; the bytes of their scales go to ``scales``."""
    codes, exponents = quantised(x, inside)
    tl.store(scales + h, exponents, mask=h < heads)
    return codes
