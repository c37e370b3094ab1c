"""Block sizes of paged_attention, by device, the likely best first.

Spills and shared memory of every entry: ``python -m variant_kernels.triton_ops.compile_report``.
"""

from __future__ import annotations

from functools import cache

import torch

from variant_kernels.triton_ops.common import family
from variant_kernels.triton_ops.tuning import Config

Rows = dict[int, tuple[Config, ...]]

# By the queries of a call (rounded up to a power of two, the last row serves more), for heads up
# to 128 wide; a tile of keys is a few pages, whose addresses are looked up in one go. Looking them
# up takes stages: only from five on are there two buffers of K and V (sm_90, Triton 3.6 and 3.9).
_CONFIGS: dict[str, Rows] = {
    "sm90": {
        16: (Config(16, 64, 4, 3), Config(16, 64, 4, 5), Config(16, 128, 4, 5)),
        32: (Config(32, 64, 4, 3), Config(32, 64, 4, 5), Config(32, 128, 4, 5)),
        64: (Config(64, 64, 4, 3), Config(64, 64, 4, 5), Config(64, 32, 4, 5)),
        128: (Config(128, 64, 8, 3), Config(128, 64, 8, 5), Config(64, 64, 4, 5)),
    },
    "nvidia": {
        16: (Config(16, 64, 4, 2), Config(16, 32, 2, 3), Config(16, 32, 4, 3)),
        32: (Config(32, 64, 4, 2), Config(32, 32, 2, 3)),
        64: (Config(64, 64, 4, 2), Config(64, 32, 4, 3)),
        128: (Config(64, 64, 4, 2), Config(128, 32, 4, 3), Config(128, 64, 8, 2)),
    },
    "amd": {
        16: (Config(16, 64, 4, 1), Config(16, 32, 2, 1)),
        32: (Config(32, 64, 4, 1), Config(32, 32, 2, 1)),
        64: (Config(64, 64, 4, 1), Config(64, 32, 4, 1)),
        128: (Config(128, 64, 4, 1), Config(128, 32, 4, 1), Config(64, 64, 4, 1)),
    },
    "other": {
        16: (Config(16, 64, 4, 2), Config(16, 32, 4, 1)),
        128: (Config(32, 32, 4, 2), Config(64, 32, 4, 2)),
    },
    # Smaller than the cases, so that they have several tiles.
    "interpreter": {128: (Config(16, 16, 1, 1),)},
}
# Heads wider than 128, and float32, whose products run outside the tensor cores.
LARGE = (Config(16, 32, 4, 1), Config(32, 32, 4, 1), Config(32, 32, 8, 2))
# Keys of a tile of 8-bit K and V of heads wider than 64: decoding takes registers.
_WIDE_KEYS = {"sm90": 64}
_OTHER_WIDE_KEYS = 32


@cache
def usual(kind: str, wide: bool, kv8: bool) -> Rows:
    """For 16-bit queries of heads up to 128 wide; ``wide``: wider than 64."""
    rows = _CONFIGS[kind]
    if not (wide and kv8):
        return rows
    most = _WIDE_KEYS.get(kind, _OTHER_WIDE_KEYS)
    return {n: tuple(c for c in row if c.block_k <= most) for n, row in rows.items()}


def configs(q_BTHD: torch.Tensor, kv8: bool) -> tuple[Config, ...]:
    """The short list for queries; ``kv8``: pages are 8 bits wide."""
    kind = family(q_BTHD.device)
    _, num_queries, _, head_dim = q_BTHD.shape
    if kind != "interpreter" and (head_dim > 128 or q_BTHD.dtype == torch.float32):
        return LARGE
    rows = usual(kind, head_dim > 64, kv8)
    return rows[min((n for n in rows if n >= num_queries), default=128)]
