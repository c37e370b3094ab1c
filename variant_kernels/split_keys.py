"""Into how many parts paged attention on a GPU splits the keys of a sequence."""

from __future__ import annotations

# A second kernel, which combines the parts, is not worth it for fewer keys than this in a part.
MIN_KEYS_PER_SPLIT = 128


def num_splits(blocks: int, processors: int, max_keys: int) -> int:
    """Number of parts, for sequences of at most ``max_keys`` keys.

    One, unless the blocks without a split leave processors idle; then enough for two on each.

    Args:
        blocks: CUDA blocks, or Triton programs, of the kernel without a split.
        processors: streaming multiprocessors of the GPU.
    """
    if blocks >= processors:
        return 1
    return max(1, min(-(-2 * processors // blocks), max_keys // MIN_KEYS_PER_SPLIT))
