"""Block sizes of the block_causal_attention kernels by device family; the first is the default.

The lists are short: each entry costs a compilation and a timing the first time a shape is seen.
Spills and shared memory of every entry: ``python -m variant_kernels.triton_ops.compile_report``.
"""

from __future__ import annotations

import torch

from variant_kernels.triton_ops.common import family, padded
from variant_kernels.triton_ops.tuning import Config

Table = dict[str, dict[int, tuple[Config, ...]]]

# By the padded head width of 16-bit inputs; an entry serves all heads up to its key. With more than
# 128 registers a processor of sm_90 runs one program of eight warps instead of two. Its lists for
# heads of 64 begin with the shortest time that the machine code of Triton 3.6 and the numbers of
# tiles at 680 and 2,240 tokens predict; entries that spill in a loop (with Triton 3.9) are last.
FORWARD: Table = {
    "sm90": {
        64: (
            Config(128, 64, 4, 3),
            Config(128, 64, 8, 3, maxnreg=128),
            Config(64, 64, 4, 3),
            Config(128, 128, 8, 3),
        ),
        128: (Config(128, 64, 8, 3), Config(128, 128, 8, 3), Config(64, 64, 4, 3)),
        256: (Config(64, 32, 4, 2), Config(128, 64, 8, 2)),
    },
    "nvidia": {
        64: (Config(128, 64, 4, 3), Config(128, 32, 4, 3), Config(64, 64, 4, 3)),
        128: (Config(128, 32, 4, 3), Config(128, 64, 8, 2), Config(64, 64, 4, 2)),
        256: (Config(64, 32, 4, 2), Config(64, 32, 4, 1)),
    },
    "amd": {
        64: (Config(128, 64, 4, 1), Config(128, 64, 4, 2), Config(64, 64, 4, 1)),
        128: (Config(128, 64, 4, 1), Config(128, 32, 4, 2), Config(64, 64, 4, 1)),
        256: (Config(64, 32, 4, 1), Config(64, 64, 4, 1)),
    },
    "other": {256: (Config(64, 32, 4, 2), Config(128, 64, 8, 2), Config(32, 32, 4, 1))},
    # Small and unequal, so that small test cases have several tiles of queries and of keys.
    "interpreter": {256: (Config(32, 16, 1, 1),)},
}
DQ: Table = {
    "sm90": {
        64: (
            Config(64, 64, 4, 3),
            Config(128, 128, 8, 3),
            Config(128, 64, 8, 3, maxnreg=128),
        ),
        128: (Config(128, 64, 8, 3), Config(128, 32, 8, 3), Config(64, 32, 4, 3)),
        256: (Config(64, 32, 8, 2), Config(64, 32, 4, 2)),
    },
    "nvidia": {
        64: (Config(64, 64, 4, 2), Config(128, 64, 8, 2), Config(128, 32, 4, 2)),
        128: (Config(64, 32, 4, 2), Config(128, 32, 8, 2)),
        256: (Config(32, 32, 4, 1), Config(64, 32, 8, 1)),
    },
    "amd": {
        64: (Config(128, 64, 4, 1), Config(64, 64, 4, 1)),
        128: (Config(64, 64, 4, 1), Config(64, 32, 4, 1)),
        256: (Config(32, 32, 4, 1),),
    },
    "other": {256: (Config(32, 32, 4, 1), Config(64, 32, 4, 2))},
    "interpreter": {256: (Config(32, 16, 1, 1),)},
}
DKV: Table = {
    "sm90": {
        64: (Config(64, 64, 4, 3), Config(64, 128, 8, 3)),
        128: (Config(32, 128, 8, 3), Config(32, 64, 4, 3)),
        256: (Config(32, 64, 8, 2), Config(32, 32, 4, 2)),
    },
    "nvidia": {
        64: (Config(64, 64, 4, 2), Config(32, 128, 8, 2), Config(64, 128, 8, 2)),
        128: (Config(32, 64, 4, 2), Config(32, 64, 8, 2)),
        256: (Config(16, 64, 8, 1), Config(32, 32, 4, 1)),
    },
    "amd": {
        64: (Config(64, 128, 4, 1), Config(64, 64, 4, 1)),
        128: (Config(32, 64, 4, 1), Config(64, 64, 4, 1)),
        256: (Config(32, 32, 4, 1),),
    },
    "other": {256: (Config(32, 32, 4, 1), Config(32, 64, 4, 2))},
    "interpreter": {256: (Config(16, 32, 1, 1),)},
}
# float32 products do not use the tensor cores, and float32 tiles take twice the memory.
FLOAT32 = (Config(32, 32, 4, 2), Config(64, 32, 8, 1), Config(32, 32, 8, 1))
FLOAT32_WIDE = (Config(16, 16, 4, 1), Config(32, 16, 8, 1), Config(32, 32, 8, 1))


def configs_for(table: Table, x: torch.Tensor) -> tuple[Config, ...]:
    """The candidates for the device, dtype and head width of x."""
    kind, width = family(x.device), padded(x.shape[-1])
    if x.dtype == torch.float32 and kind != "interpreter":
        return FLOAT32 if width <= 64 else FLOAT32_WIDE
    by_width = table[kind]
    return by_width[min(w for w in by_width if w >= width)]
