"""Where block-causal attention cuts a sequence into tiles of queries and of keys.

A query attends to all keys up to the end of its scale. One program computes one tile of up to
``block`` rows, and visits every tile of the other axis that one of its rows needs. A tile across
the end of a scale therefore also does the work of its last rows for its first rows, and masks it. A
tile that stops there does not, but has rows without work. ``cut_queries`` and ``cut_keys`` find the
ends of scales at which cutting leaves the least work: tiny early scales share a tile, and a tile
starts with a large scale where this saves pairs of tiles.

With tiles of 128 queries and 64 keys, the 680 tokens of the 256x256 models have 41 pairs of tiles,
cut at 55 and 424 tokens. They have 50 if queries are cut evenly, and 45 if every scale from 64
tokens on has tiles of its own.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

# Work in eighths of one unmasked pair of tiles. A mask adds a quarter to the instructions of a pair
# and nothing to its products; the prologue and the epilogue of a program cost about one pair.
PAIR, MASK, PROGRAM = 8, 1, 8


class Tile(NamedTuple):
    """Rows ``start`` to ``end``, their pairs with tiles of the other axis, and how many are masked.

    The last query tile of a key tile is counted as unmasked: it has a bounds check alone.
    """

    start: int
    end: int
    pairs: int
    masked: int


@dataclass(frozen=True)
class Cuts:
    """Tiles of a sequence, in runs: within a run every tile but the last has ``block`` rows.

    run_ends: the end of each run; the first run starts at 0. run_tiles: number of tiles before the
    end of each run.
    """

    run_ends: tuple[int, ...]
    run_tiles: tuple[int, ...]
    tiles: tuple[Tile, ...]

    @property
    def num_tiles(self) -> int:
        return len(self.tiles)


@lru_cache(maxsize=256)
def cut_queries(scale_lengths: tuple[int, ...], block_q: int, block_k: int) -> Cuts:
    """Tiles of up to ``block_q`` queries with the least work; key tiles start at key 0."""
    ends = list(accumulate(scale_lengths))

    def tile(start: int, end: int) -> Tile:
        full = ends[bisect_right(ends, start)] // block_k
        pairs = -(-ends[bisect_right(ends, end - 1)] // block_k)
        return Tile(start, end, pairs, pairs - full)

    return _cheapest(ends, block_q, tile)


@lru_cache(maxsize=256)
def cut_keys(scale_lengths: tuple[int, ...], block_q: int, block_k: int) -> Cuts:
    """Tiles of up to ``block_k`` keys with the least work; query tiles start at the first viewer.

    The first viewer of a key is the first token of its scale.
    """
    ends = list(accumulate(scale_lengths))
    starts = [0, *ends[:-1]]

    def tile(start: int, end: int) -> Tile:
        first = starts[bisect_right(ends, start)]
        masked = -(-(starts[bisect_right(ends, end - 1)] - first) // block_q)
        return Tile(start, end, max(masked, -(-(ends[-1] - first) // block_q)), masked)

    return _cheapest(ends, block_k, tile)


def _cheapest(ends: list[int], block: int, tile: Callable[[int, int], Tile]) -> Cuts:
    """The cuts at ``ends`` with the least work; of equal ones, the fewest runs."""

    def work(t: Tile) -> int:
        return PAIR * t.pairs + MASK * t.masked + PROGRAM

    # For each end of a scale: the least work up to there, and where its last run starts.
    least: dict[int, tuple[int, int]] = {0: (0, 0)}
    for index, run_start in enumerate([0, *ends[:-1]]):
        total, start = least[run_start][0], run_start
        for end in ends[index:]:
            while start + block <= end:
                total += work(tile(start, start + block))
                start += block
            rest = work(tile(start, end)) if start < end else 0
            if end not in least or total + rest < least[end][0]:
                least[end] = total + rest, run_start
    run_ends = [ends[-1]]
    while (run_start := least[run_ends[0]][1]) > 0:
        run_ends.insert(0, run_start)
    tiles, run_tiles = [], []
    for run_start, end in zip([0, *run_ends], run_ends, strict=False):
        for start in range(run_start, end, block):
            tiles.append(tile(start, min(start + block, end)))
        run_tiles.append(len(tiles))
    return Cuts(tuple(run_ends), tuple(run_tiles), tuple(tiles))
