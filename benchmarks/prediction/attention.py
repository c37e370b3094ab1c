"""Attention: a tile takes (T + I) / overlap cycles; tiles are spread over the processors in rounds.

The committed machine code of the kernels (``tests/machine_code/expected``) gives the instructions I
that each program issues for a tile, the block sizes give the multiply-adds T of its products, both
in cycles of a processor. These loops hardly overlap the two.
"""

from __future__ import annotations

import heapq
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from benchmarks.prediction.constants import Constants
from variant_kernels.plans.attention_tiles import cut_keys, cut_queries

# Of the Triton release in torch 2.11, which runs on GPUs.
MACHINE_CODE = (
    Path(__file__).parents[2] / "tests" / "machine_code" / "expected" / "triton-3.6.0.json"
)

PROCESSORS, ISSUE_SLOTS, LANES = 132, 4, 32
# Dense bfloat16 multiply-adds of one processor in a cycle: 2 x 2048 x 132 x 1.83 GHz = 989 TFLOP/s,
# NVIDIA's data sheet.
FMA = 2048
# mma.sync (HMMA) instead of wgmma: about five eighths of the rate.
HMMA_SHARE = 0.62
# Products of a tile of queries and a tile of keys.
PRODUCTS = {"forward": 2, "dq": 3, "dkv": 4, "paged": 2}

_KEY = re.compile(
    r"(?:block_causal_)?(?P<attention>attention_(?:forward|dq|dkv)|paged_attention)/"
    r"D (?P<width>\d+), (?P<q>\d+) x (?P<k>\d+)(?P<more>.*), (?P<warps>\d+) warps, "
    r"(?P<stages>\d+) stages"
)


@dataclass(frozen=True)
class Kernel:
    """One attention kernel with its block sizes, from its machine code.

    kind: a key of PRODUCTS.  full, masked: instructions of one tile without and with a mask.
    programs: at once on a processor.  ahead: whether its loop loads ahead.  wgmma: whether its
    products are wgmma.  variant: what else its key says, as ``"consecutive pages, query norm"``.
    """

    key: str
    kind: str
    width: int
    block_q: int
    block_k: int
    num_warps: int
    full: int
    masked: int
    programs: int
    ahead: bool
    wgmma: bool
    variant: str = ""
    num_stages: int = 0

    def tile_cycles(self, c: Constants, *, masked: bool) -> float:
        """Cycles of one processor for one pair of tiles."""
        products = PRODUCTS[self.kind] * self.block_q * self.block_k * self.width / FMA
        issue = (self.masked if masked else self.full) * self.num_warps / ISSUE_SLOTS
        exposed = 0.0 if self.ahead else c.exposed_cycles / self.programs
        return (products / (1 if self.wgmma else HMMA_SHARE) + issue) / c.overlap + exposed

    def seconds(self, c: Constants, tiles: Iterable[tuple[int, int]], copies: int) -> float:
        """Seconds of a launch: ``copies`` (heads of all images) of tiles with (pairs, masked)."""
        each = [
            c.program_cycles
            + (pairs - masked) * self.tile_cycles(c, masked=False)
            + masked * self.tile_cycles(c, masked=True)
            for pairs, masked in tiles
        ]
        return rounds(each, copies, self.programs) / c.clock_hz


# Rounds that are followed program by program; before them all processors are always busy.
FOLLOWED_ROUNDS = 6


def rounds(cycles: Sequence[float], copies: int, resident: int) -> float:
    """Cycles until the last program ends; programs start in order where one has ended.

    Args:
        cycles: of each program of a head, if it has a processor of its own.
        resident: programs that share a processor.
    """
    total = len(cycles) * copies
    sharing = min(resident, -(-total // PROCESSORS))
    slots = min(total, PROCESSORS * sharing)
    followed = min(copies, -(-FOLLOWED_ROUNDS * slots // len(cycles)))
    start = (copies - followed) * sum(cycles) * sharing / slots
    if len(set(cycles)) == 1:
        return start + -(-followed * len(cycles) // slots) * cycles[0] * sharing
    ends = [start] * slots
    for _ in range(followed):
        for one in cycles:
            heapq.heapreplace(ends, ends[0] + one * sharing)
    return max(ends)


@cache
def kernels(path: Path = MACHINE_CODE) -> tuple[Kernel, ...]:
    """The attention kernels of the table."""
    found = []
    for key, figures in json.loads(path.read_text())["cases"].items():
        match = _KEY.match(key)
        if match is None or not figures["loops"]:
            continue
        counts = sorted(loop["instructions"] for loop in figures["loops"])
        found.append(
            Kernel(
                key,
                match["attention"].removeprefix("attention_").removesuffix("_attention"),
                *(int(match[name]) for name in ("width", "q", "k", "warps")),
                full=counts[0],
                masked=counts[-1],
                programs=figures["programs"],
                ahead=0 not in figures["waits"],
                wgmma=all(loop.get("HGMMA") for loop in figures["loops"]),
                variant=match["more"].removeprefix(", "),
                num_stages=int(match["stages"]),
            )
        )
    return tuple(found)


def tiles_of(kernel: Kernel, lengths: tuple[int, ...]) -> list[tuple[int, int]]:
    """(pairs, masked) of each program of a head: as a launcher of block-causal attention cuts."""
    cut = cut_keys if kernel.kind == "dkv" else cut_queries
    tiles = cut(lengths, kernel.block_q, kernel.block_k).tiles
    return [(tile.pairs, tile.masked) for tile in tiles]


def chosen(kind: str, width: int, variant: str = "") -> list[Kernel]:
    """The kernels of all block sizes of one kind, head width and variant."""
    return [k for k in kernels() if (k.kind, k.width, k.variant) == (kind, width, variant)]


@cache
def block_causal_seconds(
    c: Constants,
    kind: str,
    lengths: tuple[int, ...],
    width: int,
    heads: int,
    *,
    qk_norm: bool = False,
) -> float:
    """Seconds of the fastest block sizes. kind: forward, dq or dkv.  heads: of all images."""
    return min(
        kernel.seconds(c, tiles_of(kernel, lengths), heads)
        for kernel in chosen(kind, width, "qk_norm" if qk_norm else "")
    )


def visible_pairs(lengths: Sequence[int]) -> int:
    """Pairs of a query and a key that it attends to, of one head."""
    return sum(length * sum(lengths[: i + 1]) for i, length in enumerate(lengths))


def block_causal_flops(
    c: Constants, direction: str, patch_nums: Sequence[int], width: int, heads: int
) -> float:
    """FLOP/s over visible pairs: two products forward, five backward."""
    lengths = tuple(n * n for n in patch_nums)
    pairs = visible_pairs(lengths)
    kinds = ("forward",) if direction == "forward" else ("dq", "dkv")
    seconds = sum(block_causal_seconds(c, kind, lengths, width, heads) for kind in kinds)
    return (2 if direction == "forward" else 5) * 2 * width * pairs * heads / seconds


# What an engine launches: pages that follow one another, queries normalised as they are loaded.
ENGINE_PAGES = "consecutive pages, query norm"


@cache
def paged_seconds(
    c: Constants, queries: int, keys: int, width: int, heads: int, variant: str = ENGINE_PAGES
) -> float:
    """Seconds of paged attention with the fastest block sizes; keys split where that is faster."""
    times = []
    for kernel in chosen("paged", width, variant):
        if kernel.block_q > max(16, 1 << (queries - 1).bit_length()):
            continue
        pairs, tiles = -(-keys // kernel.block_k), -(-queries // kernel.block_q)
        for splits in range(1, min(4, pairs) + 1):
            part = -(-pairs // splits)
            seconds = kernel.seconds(c, [(part, 1)] * tiles * splits, heads)
            if splits > 1:
                moved = 2 * splits * queries * width * heads * 4
                seconds += c.row_seconds + moved / c.copy_bytes
            times.append(seconds)
    return c.kernel_seconds + min(times)
