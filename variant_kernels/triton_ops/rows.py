"""Shared by the row kernels: rows per program, warps per block, and accurate math helpers.

Row kernels are bound by memory bandwidth: a program loads one row (or several narrow ones) into
registers at once, and there are many more programs than processors. They are not autotuned.
"""

# Triton's compiler gives a kernel's arguments other types than Python's checker sees.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

from variant_kernels.triton_ops.common import family, padded

# Two loads of 16 bytes for float32, one for 16-bit values.
PER_THREAD = 8
MAX_THREADS = 1024


def num_warps_for(elements: int, device: torch.device, per_thread: int = PER_THREAD) -> int:
    """Warps for a block of ``elements`` (a power of two) with ``per_thread`` for each thread."""
    return warps_for(elements, 64 if family(device) == "amd" else 32, per_thread)


def warps_for(elements: int, lanes: int, per_thread: int) -> int:
    """:func:`num_warps_for` for warps of ``lanes`` threads."""
    return max(1, min(elements // (lanes * per_thread), MAX_THREADS // lanes))


def rows_per_block(width: int, rows: int, elements: int = 1024) -> int:
    """Rows of ``width`` (a power of two) that one program processes at once."""
    return max(1, min(elements // width, 1 << (rows - 1).bit_length()))


# Enough warps to hide the latency of memory; each prefetches one block of rows.
WARPS_PER_PROCESSOR = 32


def rows_per_part(num_rows: int, groups: int, processors: int, num_warps: int, minimum: int) -> int:
    """Rows of each group that one program processes, a multiple of ``minimum``.

    Small enough that every processor has several programs of ``num_warps``, if there are enough
    rows.
    """
    programs = processors * max(4, min(16, WARPS_PER_PROCESSOR // num_warps))
    parts = max(1, -(-programs // groups))
    return -(-num_rows // (parts * minimum)) * minimum


@triton.jit
def reciprocal_root(x):
    """1 / sqrt(x), both correctly rounded: the hardware's rsqrt is off by up to two units."""
    return tl.div_rn(1.0, tl.sqrt_rn(x))


@triton.jit
def accurate_exp(x):
    """exp(x) to one unit in the last place for x < 80; exp2 gets integers and small arguments."""
    x = tl.where(x < -110.0, -110.0, x)  # exp is 0 either way; -inf - -inf would be NaN
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    # log 2 in two parts: the first has enough trailing zeros for n times it to be exact.
    r = (x - n * 0.693145751953125) - n * 1.428606765330187e-06
    return tl.exp2(n) * tl.exp2(r * 1.4426950408889634)


@triton.jit
def power_of_two(x):
    """The largest power of two up to x, for normal x > 0."""
    return (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


# --- heads of a token ---------------------------------------------------------------------------

# float32 of log 100, the largest logarithm of a head's scale.
MAX_LOG_SCALE = tl.constexpr(4.605170249938965)
NORM_EPS = tl.constexpr(1e-12)
# Entries of a token that one program processes, and that one thread does.
BLOCK_ENTRIES = 4096
HEADS_PER_THREAD = 16


def heads_per_block(heads: int, head_dim: int) -> int:
    """Heads of a token that one program processes: all, unless they exceed BLOCK_ENTRIES."""
    return max(1, min(padded(heads), BLOCK_ENTRIES // padded(head_dim)))


@triton.jit
def unit(x):
    """x / max(|x|, 1e-12) along the last axis, 1 / max(|x|, 1e-12), and whether |x| > 1e-12.

    x: (rows, columns), float32.
    """
    norm = tl.sqrt_rn(tl.sum(x * x, 1))
    inverse = tl.div_rn(1.0, tl.maximum(norm, NORM_EPS, propagate_nan=tl.PropagateNan.ALL))
    return x * inverse[:, None], inverse, norm > NORM_EPS


@triton.jit
def unit_gradient(grad, x):
    """The backward pass of n = unit(x), and g . n, for the gradient g of n.

    The gradient of x is (g - n (g . n)) / |x|, or g / 1e-12 where |x| was clamped.

    grad, x: (rows, columns), float32.
    """
    unit_x, inverse, free = unit(x)
    along = tl.sum(grad * unit_x, 1)
    return inverse[:, None] * (grad - unit_x * tl.where(free, along, 0.0)[:, None]), along


@triton.jit
def head_scale(log_scale):
    """exp(min(log_scale, log 100)); NaN stays NaN."""
    return accurate_exp(tl.where(log_scale > MAX_LOG_SCALE, MAX_LOG_SCALE, log_scale))
