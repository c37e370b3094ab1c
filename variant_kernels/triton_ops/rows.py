"""What the row kernels share: how a row is cut among threads and programs, and accurate helpers.

They move bytes and do little else: a program takes a row (narrow rows: several) into registers in
one go, and there are many more programs than processors. Nothing is worth timing.
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
    """Warps for a block of ``elements`` (a power of two), so many for each thread."""
    return warps_for(elements, 64 if family(device) == "amd" else 32, per_thread)


def warps_for(elements: int, lanes: int, per_thread: int) -> int:
    """:func:`num_warps_for` for warps of ``lanes`` threads."""
    return max(1, min(elements // (lanes * per_thread), MAX_THREADS // lanes))


def rows_of_a_block(width: int, rows: int, elements: int = 1024) -> int:
    """How many rows of ``width`` (a power of two) one program takes at once."""
    return max(1, min(elements // width, 1 << (rows - 1).bit_length()))


# Enough of them to hide how long memory takes: each loads one block of rows ahead.
WARPS_OF_A_PROCESSOR = 32


def cut(rows: int, groups: int, processors: int, num_warps: int, least: int) -> int:
    """Into how many rows each group is cut for one program: at least ``least``, a multiple of it.

    Few enough that every processor has programs of ``num_warps`` to switch between, if the rows
    suffice.
    """
    programs = processors * max(4, min(16, WARPS_OF_A_PROCESSOR // num_warps))
    parts = max(1, -(-programs // groups))
    return -(-rows // (parts * least)) * least


@triton.jit
def reciprocal_root(x):
    """1 / sqrt(x), both correctly rounded: the hardware's own is two units off."""
    return tl.div_rn(1.0, tl.sqrt_rn(x))


@triton.jit
def accurate_exp(x):
    """exp(x) to one unit in the last place for x < 80: only small powers go to the hardware."""
    x = tl.where(x < -110.0, -110.0, x)  # 0 either way; infinity less infinity is not
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    # log 2 in two parts: the first has zeros enough for n * it to be exact.
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
# Entries of a token that one program takes, and how many of them a thread.
BLOCK_ENTRIES = 4096
HEADS_PER_THREAD = 16


def heads_of_a_block(heads: int, head_dim: int) -> int:
    """How many of a token's heads one program takes: all, unless they are many and wide."""
    return max(1, min(padded(heads), BLOCK_ENTRIES // padded(head_dim)))


@triton.jit
def unit(x):
    """x / max(|x|, 1e-12) along the last axis, 1 / max(|x|, 1e-12), and whether |x| is the larger.

    x: (rows, columns), float32.
    """
    norm = tl.sqrt_rn(tl.sum(x * x, 1))
    inverse = tl.div_rn(1.0, tl.maximum(norm, NORM_EPS, propagate_nan=tl.PropagateNan.ALL))
    return x * inverse[:, None], inverse, norm > NORM_EPS


@triton.jit
def unit_gradient(grad, x):
    """Of n = unit(x): the gradient of x, (g - n (g . n)) / |x|, or g / 1e-12 where clamped; g . n.

    grad, x: (rows, columns), float32.
    """
    unit_x, inverse, free = unit(x)
    along = tl.sum(grad * unit_x, 1)
    return inverse[:, None] * (grad - unit_x * tl.where(free, along, 0.0)[:, None]), along


@triton.jit
def head_scale(log_scale):
    """exp(min(log_scale, log 100)); NaN stays NaN."""
    return accurate_exp(tl.where(log_scale > MAX_LOG_SCALE, MAX_LOG_SCALE, log_scale))
