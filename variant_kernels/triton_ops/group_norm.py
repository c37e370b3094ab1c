"""group_norm_silu in Triton: sums by channel, their combination by group, normalisation.

Axes: B batch, N pixels of a feature map, C channels, G groups, P parts of the pixels.
"""

# Triton's compiler gives a kernel's arguments other types than Python's checker sees.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

from variant_kernels.triton_ops.common import num_processors, on_device_of, padded
from variant_kernels.triton_ops.rows import accurate_exp, reciprocal_root

# Pixels and channels of a tile: lines of 128 bytes in 16 bits.
BLOCK_N, BLOCK_C = 64, 64
NUM_WARPS = 4
# Programs of the first kernel for each processor: more parts cost reads of the second.
PROGRAMS_PER_PROCESSOR = 8
MAX_PARTS = 256


@triton.jit
def group_norm_sums_kernel(
    x_ptr, mean_ptr, square_ptr, pixels, pixels_per_part, parts,
    C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean, and sum of squared distances to it, of each channel in one part of the pixels."""
    columns: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    program, column = tl.program_id(0) // columns, tl.program_id(0) % columns
    channel = column * BLOCK_C + tl.arange(0, BLOCK_C)
    b, part = (program // parts).to(tl.int64), program % parts
    start = part * pixels_per_part
    end = tl.minimum(start + pixels_per_part, pixels)
    held = channel < C
    x_ptr += b * pixels * C
    # Distances to one of the values: sums of squares of large values would cancel.
    shift = tl.load(x_ptr + start.to(tl.int64) * C + channel, mask=held, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_C], tl.float32)
    for first in range(start, end, BLOCK_N):
        pixel = first + tl.arange(0, BLOCK_N)
        inside = (pixel < end)[:, None] & held[None]
        address = pixel.to(tl.int64)[:, None] * C + channel[None]
        x = tl.load(x_ptr + address, mask=inside, other=0.0).to(tl.float32)
        x = tl.where(inside, x - shift[None], 0.0)
        total += tl.sum(x, 0)
        squares += tl.sum(x * x, 0)
    count = (end - start).to(tl.float32)
    out = (b * parts + part) * C + channel
    tl.store(mean_ptr + out, shift + total / count, mask=held)
    tl.store(square_ptr + out, squares - total * total / count, mask=held)


@triton.jit
def group_norm_combine_kernel(
    mean_ptr, square_ptr, group_mean_ptr, group_rstd_ptr, pixels, pixels_per_part, parts, eps,
    C: tl.constexpr, G: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_GC: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / standard deviation of one group of one image, from those of its channels."""
    b, group = (tl.program_id(0) // G).to(tl.int64), tl.program_id(0) % G
    width: tl.constexpr = C // G
    part, column = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_GC)
    held = (part < parts)[:, None] & (column < width)[None]
    address = (b * parts + part)[:, None] * C + group * width + column[None]
    mean = tl.load(mean_ptr + address, mask=held, other=0.0)
    square = tl.load(square_ptr + address, mask=held, other=0.0)
    count = tl.minimum(pixels - part * pixels_per_part, pixels_per_part).to(tl.float32)
    count = tl.where(held, count[:, None], 0.0)
    total = tl.sum(tl.sum(count, 1), 0)
    group_mean = tl.div_rn(tl.sum(tl.sum(mean * count, 1), 0), total)
    distance = mean - group_mean
    square = tl.where(held, square + count * distance * distance, 0.0)
    variance = tl.div_rn(tl.sum(tl.sum(square, 1), 0), total)
    tl.store(group_mean_ptr + b * G + group, group_mean)
    tl.store(group_rstd_ptr + b * G + group, reciprocal_root(variance + eps))


@triton.jit
def group_norm_apply_kernel(
    x_ptr, weight_ptr, bias_ptr, group_mean_ptr, group_rstd_ptr, y_ptr, pixels, tiles,
    C: tl.constexpr, G: tl.constexpr, SILU: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One tile of pixels and channels."""
    columns: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    program, column = tl.program_id(0) // columns, tl.program_id(0) % columns
    channel = column * BLOCK_C + tl.arange(0, BLOCK_C)
    b, pixel = (program // tiles).to(tl.int64), program % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    held = channel < C
    inside = (pixel < pixels)[:, None] & held[None]
    group = b * G + channel // (C // G)
    mean = tl.load(group_mean_ptr + group, mask=held, other=0.0)
    rstd = tl.load(group_rstd_ptr + group, mask=held, other=0.0)
    weight = tl.load(weight_ptr + channel, mask=held, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channel, mask=held, other=0.0).to(tl.float32)
    address = (b * pixels + pixel)[:, None] * C + channel[None]
    x = tl.load(x_ptr + address, mask=inside, other=0.0).to(tl.float32)
    y = (x - mean[None]) * rstd[None] * weight[None] + bias[None]
    if SILU:
        # exp of at most 87: the quotient of the rest is 0 in float32 all the same.
        y = tl.div_rn(y, 1.0 + accurate_exp(tl.minimum(-y, 87.0)))
    tl.store(y_ptr + address, y.to(y_ptr.dtype.element_ty), mask=inside)


def launch_group_norm_silu(
    *,
    x_BYXC: torch.Tensor,
    weight_C: torch.Tensor,
    bias_C: torch.Tensor,
    num_groups: int,
    eps: float,
    silu: bool,
) -> torch.Tensor:
    """Group normalisation over channels-last pixels, then SiLU where ``silu``.

    Returns:
        y_BYXC, contiguous.
    """
    x_BYXC = x_BYXC.contiguous()
    y_BYXC = torch.empty_like(x_BYXC)
    if x_BYXC.numel() == 0:
        return y_BYXC
    weight_C, bias_C = weight_C.contiguous(), bias_C.contiguous()
    batch, height, width, channels = x_BYXC.shape
    pixels = height * width
    with on_device_of(x_BYXC):
        columns = -(-channels // BLOCK_C)
        wanted = num_processors(x_BYXC.device) * PROGRAMS_PER_PROCESSOR // (batch * columns)
        tiles = -(-pixels // BLOCK_N)
        tiles_per_part = -(-tiles // max(1, min(wanted, tiles, MAX_PARTS)))
        parts, pixels_per_part = -(-tiles // tiles_per_part), tiles_per_part * BLOCK_N
        float32 = {"dtype": torch.float32, "device": x_BYXC.device}
        sums_2BPC = torch.empty(2, batch, parts, channels, **float32)
        group_2BG = torch.empty(2, batch, num_groups, **float32)
        group_norm_sums_kernel[(batch * parts * columns,)](
            x_BYXC, *sums_2BPC.unbind(0), pixels, pixels_per_part, parts,
            C=channels, BLOCK_N=BLOCK_N, BLOCK_C=BLOCK_C, num_warps=NUM_WARPS,
        )  # fmt: skip
        group_norm_combine_kernel[(batch * num_groups,)](
            *sums_2BPC.unbind(0), *group_2BG.unbind(0), pixels, pixels_per_part, parts, eps,
            C=channels, G=num_groups, BLOCK_P=padded(parts),
            BLOCK_GC=padded(channels // num_groups), num_warps=NUM_WARPS,
        )  # fmt: skip
        group_norm_apply_kernel[(batch * tiles * columns,)](
            x_BYXC, weight_C, bias_C, *group_2BG.unbind(0), y_BYXC, pixels, tiles,
            C=channels, G=num_groups, SILU=silu, BLOCK_N=BLOCK_N, BLOCK_C=BLOCK_C,
            num_warps=NUM_WARPS,
        )  # fmt: skip
    return y_BYXC
