"""Into how many parts paged attention on a GPU splits the keys of a sequence.

A split shortens the longest block and adds a second kernel, which combines the parts. Both are
counted in the time that a block takes for one tile of keys, about a microsecond on an H200 by the
instructions of its loop; nothing here has been measured on a GPU.
"""

from __future__ import annotations

# Launching the second kernel and waiting for it.
COMBINE_TILES = 2.7
# The parts are float32, written by one kernel and read by the other, through the L2 cache.
L2_BYTES_PER_TILE = 4e6


def num_splits(*, blocks: int, resident: int, tiles: int, part_bytes: int) -> int:
    """The number of parts with the shortest estimated time; the smallest of equals.

    Blocks run in rounds of ``resident``. A split that would need more rounds than no split is never
    taken.

    Args:
        blocks: CUDA blocks, or Triton programs, of the kernel without a split.
        resident: blocks that the GPU runs at the same time.
        tiles: tiles of keys of the longest sequence.
        part_bytes: float32 bytes of one part of the output.
    """
    rounds = -(-blocks // resident)
    most = min(rounds * resident // blocks, tiles)

    def cost(splits: int) -> float:
        combine = COMBINE_TILES + splits * 2 * part_bytes / L2_BYTES_PER_TILE
        return rounds * -(-tiles // splits) + (combine if splits > 1 else 0)

    return min(range(1, most + 1), key=cost, default=1)
