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

from variant_kernels.triton_ops.common import family

# Two loads of 16 bytes for float32, one for 16-bit values.
PER_THREAD = 8
MAX_THREADS = 1024


def num_warps_for(elements: int, device: torch.device, per_thread: int = PER_THREAD) -> int:
    """Warps for a block of ``elements`` (a power of two), so many for each thread."""
    lanes = 64 if family(device) == "amd" else 32
    return max(1, min(elements // (lanes * per_thread), MAX_THREADS // lanes))


def rows_of_a_block(width: int, rows: int, elements: int = 1024) -> int:
    """How many rows of ``width`` (a power of two) one program takes at once."""
    return max(1, min(elements // width, 1 << (rows - 1).bit_length()))


def cut(rows: int, groups: int, processors: int, least: int) -> int:
    """Into how many rows each group is cut for one program: at least ``least``, a multiple of it.

    Few enough that four programs are there for every processor, if the rows suffice.
    """
    parts = max(1, -(-4 * processors // groups))
    return -(-rows // (parts * least)) * least


@triton.jit
def reciprocal_root(x):
    """1 / sqrt(x), both correctly rounded: the hardware's own is two units off."""
    return tl.div_rn(1.0, tl.sqrt_rn(x))


@triton.jit
def accurate_exp(x):
    """exp(x) to one unit in the last place for |x| < 80: only small powers go to the hardware."""
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    # log 2 in two parts: the first has zeros enough for n * it to be exact.
    r = (x - n * 0.693145751953125) - n * 1.428606765330187e-06
    return tl.exp2(n) * tl.exp2(r * 1.4426950408889634)
