"""Tiles of block-causal attention: every row once, least work, never more than even tiles."""

from itertools import accumulate, pairwise

import pytest
import torch

from variant_kernels.ops.block_causal_attention import dense_mask
from variant_kernels.plans.attention_tiles import MASK, PAIR, PROGRAM, cut_keys, cut_queries
from variant_kernels.plans.scale_layout import ScaleLayout

VAR_256 = ScaleLayout.from_patch_nums((1, 2, 3, 4, 5, 6, 8, 10, 13, 16)).tokens
VAR_512 = ScaleLayout.from_patch_nums((1, 2, 3, 4, 6, 9, 13, 18, 24, 32)).tokens


def random_layouts(count):
    """Scales of one token and more, smaller and larger than tiles, in any order."""
    generator = torch.Generator().manual_seed(9)
    for _ in range(count):
        scales = int(torch.randint(1, 8, (), generator=generator))
        yield tuple(
            int(torch.randint(1, (2, 20, 90)[kind], (), generator=generator))
            for kind in torch.randint(0, 3, (scales,), generator=generator)
        )


def work(tiles):
    return sum(PAIR * tile.pairs + MASK * tile.masked + PROGRAM for tile in tiles)


def covered(cuts, block):
    """The tiles that a program finds from its index, as the kernels do."""
    rows = []
    for index in range(cuts.num_tiles):
        start, end = index * block, cuts.run_ends[0]
        for run in range(1, len(cuts.run_ends)):
            if index >= cuts.run_tiles[run - 1]:
                start = cuts.run_ends[run - 1] + (index - cuts.run_tiles[run - 1]) * block
                end = cuts.run_ends[run]
        rows.append((start, min(start + block, end)))
    return rows


@pytest.mark.parametrize("blocks", [(16, 16), (32, 16), (16, 32)])
@pytest.mark.parametrize("cut", [cut_queries, cut_keys])
def test_tiles_cover_every_row_once_and_visit_every_visible_pair(cut, blocks):
    block, other = blocks if cut is cut_queries else blocks[::-1]
    for lengths in random_layouts(40):
        cuts, total = cut(lengths, *blocks), sum(lengths)
        rows = [(tile.start, tile.end) for tile in cuts.tiles]
        assert rows == covered(cuts, block)
        assert [row for start, end in rows for row in range(start, end)] == list(range(total))
        seen = dense_mask(lengths) if cut is cut_queries else dense_mask(lengths).T
        for start, end, pairs, masked in cuts.tiles:
            assert 0 < end - start <= block
            needed = seen[start:end].any(0).nonzero().flatten()
            first = 0 if cut is cut_queries else int(needed[0])
            assert first + (pairs - 1) * other <= int(needed[-1]) < first + pairs * other
            whole = seen[start:end].all(0)
            parts = [whole[at : at + other] for at in range(first, total, other)][:pairs]
            full = [bool(p.all()) and (cut is cut_keys or len(p) == other) for p in parts]
            # Masked tiles come last for queries, first for keys.
            count = len(full) - masked
            assert all(full[:count] if cut is cut_queries else full[masked:])


@pytest.mark.parametrize("blocks", [(16, 16), (32, 16), (16, 32), (128, 64)])
@pytest.mark.parametrize("cut", [cut_queries, cut_keys])
def test_no_other_cuts_at_ends_of_scales_are_less_work(cut, blocks):
    block = blocks[0] if cut is cut_queries else blocks[1]
    for lengths in random_layouts(12):
        if len(lengths) > 6:
            continue
        least = work(cut(lengths, *blocks).tiles)
        ends = list(accumulate(lengths))
        for chosen in range(2 ** (len(ends) - 1)):
            cuts = [0, *(e for i, e in enumerate(ends[:-1]) if chosen >> i & 1), ends[-1]]
            tiles = []
            for run_start, end in pairwise(cuts):
                for start in range(run_start, end, block):
                    tiles.append(tile_of(cut, lengths, blocks, start, min(start + block, end)))
            assert least <= sum(tiles)


def tile_of(cut, lengths, blocks, start, end):
    """The work of one tile, counted in the dense mask."""
    seen = dense_mask(lengths) if cut is cut_queries else dense_mask(lengths).T
    some, whole = seen[start:end].any(0), seen[start:end].all(0)
    if cut is cut_queries:
        pairs, full = -(-int(some.sum()) // blocks[1]), int(whole.sum()) // blocks[1]
        return PAIR * pairs + MASK * (pairs - full) + PROGRAM
    masked = -(-(int(some.sum()) - int(whole.sum())) // blocks[0])
    return PAIR * max(masked, -(-int(some.sum()) // blocks[0])) + MASK * masked + PROGRAM


# Pairs of tiles of evenly cut sequences: 50, 85, 429 and 806. masked: of the loop with a mask.
@pytest.mark.parametrize(
    ("lengths", "blocks", "pairs", "masked", "runs"),
    [
        (VAR_256, (128, 64), 41, 11, (55, 424, 680)),
        (VAR_256, (64, 64), 77, 16, (55, 424, 680)),
        (VAR_512, (128, 64), 413, 12, (1216, 2240)),
        (VAR_512, (64, 64), 806, 14, (2240,)),
    ],
)
def test_query_tiles_of_the_published_layouts(lengths, blocks, pairs, masked, runs):
    cuts = cut_queries(lengths, *blocks)
    assert sum(tile.pairs for tile in cuts.tiles) == pairs
    assert sum(tile.masked for tile in cuts.tiles) == masked
    assert cuts.run_ends == runs
