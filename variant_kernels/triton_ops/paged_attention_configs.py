"""Block sizes of paged_attention by device family; the first is the default.

Spills and shared memory of every entry: ``python -m variant_kernels.triton_ops.compile_report``.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch

from variant_kernels.triton_ops.common import family
from variant_kernels.triton_ops.tuning import Config

# Candidates by the number of queries of a call.
ConfigsByQueries = dict[int, tuple[Config, ...]]

# For 16-bit queries of heads up to 128 wide. Keys are the number of queries rounded up to a power
# of two; the last entry is used for all larger numbers. A tile of keys spans a few pages, whose
# addresses are loaded together. Those loads use pipeline stages: with fewer than five, the loop
# waits for the tile that it has just asked for (sm_90, Triton 3.6 and 3.9). With more than 128
# registers a processor of sm_90 runs one program of eight warps instead of two.
_CONFIGS: dict[str, ConfigsByQueries] = {
    "sm90": {
        16: (Config(16, 64, 4, 5), Config(16, 128, 4, 5)),
        32: (Config(32, 64, 4, 5), Config(32, 128, 4, 5)),
        64: (Config(64, 64, 4, 5), Config(64, 32, 4, 5)),
        128: (Config(128, 64, 8, 5, maxnreg=128), Config(64, 64, 4, 5)),
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
    # Smaller than the test cases, so that these have several tiles.
    "interpreter": {128: (Config(16, 16, 1, 1),)},
}
# Heads wider than 128, and float32, whose products do not use the tensor cores.
WIDE_OR_FP32 = (Config(16, 32, 4, 1), Config(32, 32, 4, 1), Config(32, 32, 8, 2))
# The largest block_k for 8-bit K and V of heads wider than 64: decoding takes registers.
_MAX_BLOCK_K_WIDE_KV8 = {"sm90": 64}
_DEFAULT_MAX_BLOCK_K_WIDE_KV8 = 32


@cache
def configs_by_queries(kind: str, wide: bool, kv8: bool) -> ConfigsByQueries:
    """Candidates for 16-bit queries of heads up to 128 wide.

    Args:
        kind: device family, see ``common.family``.
        wide: heads are wider than 64.
        kv8: pages are 8 bits wide.
    """
    by_queries = _CONFIGS[kind]
    if not wide:
        return by_queries
    largest = max(config.block_k for configs in by_queries.values() for config in configs)
    if kv8:
        largest = _MAX_BLOCK_K_WIDE_KV8.get(kind, _DEFAULT_MAX_BLOCK_K_WIDE_KV8)
    # One program fills the shared memory of a processor, so a limit of registers gains nothing.
    return {
        num_queries: tuple(
            replace(config, maxnreg=None) for config in configs if config.block_k <= largest
        )
        for num_queries, configs in by_queries.items()
    }


# The loop over consecutive pages has other candidates than the one that looks every token up.
CONSECUTIVE, SCATTERED = "consecutive pages", "scattered pages"


def pages_kind(consecutive: bool) -> str:
    """Which of the two loops; shapes share a choice within one of them only."""
    return CONSECUTIVE if consecutive else SCATTERED


def without_page_numbers(config: Config) -> Config:
    """The config of a loop over consecutive pages: no stages for the loads of page numbers."""
    return replace(config, num_stages=max(config.num_stages - 2, min(config.num_stages, 3)))


def configs_for(q_BTHD: torch.Tensor, kv8: bool, consecutive: bool = False) -> tuple[Config, ...]:
    """The candidates for these queries.

    Args:
        kv8: pages are 8 bits wide.
        consecutive: the pages of a sequence follow one another.
    """
    candidates = _candidates(q_BTHD, kv8)
    if not consecutive:
        return candidates
    return tuple(dict.fromkeys(without_page_numbers(config) for config in candidates))


def _candidates(q_BTHD: torch.Tensor, kv8: bool) -> tuple[Config, ...]:
    kind = family(q_BTHD.device)
    _, num_queries, _, head_dim = q_BTHD.shape
    if kind != "interpreter" and (head_dim > 128 or q_BTHD.dtype == torch.float32):
        return WIDE_OR_FP32
    by_queries = configs_by_queries(kind, head_dim > 64, kv8)
    return by_queries[min((n for n in by_queries if n >= num_queries), default=128)]


def resident_programs(config: Config, head_dim: int) -> int:
    """About how many programs of a config a processor runs at the same time.

    16 warps of up to 128 registers fill it; wider heads take about twice the registers.
    """
    return max(1, (16 if head_dim <= 64 else 8) // config.num_warps)
