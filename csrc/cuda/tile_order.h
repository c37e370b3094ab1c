// The order of the blocks of attention without pages. A block owns one tile of one head ("head":
// one head of one row of the batch), and all tiles of a head read its keys and values.
//
// Blocks start in the order of their index, and a few hundred run at a time. Heads come in groups
// whose keys and values fit the L2 cache together, so that memory is read once for all tiles of a
// head. Inside a group come the tiles with the most work of all its heads, then the next ones, so
// that no long tile is left for the end.
#pragma once

#include "primitives.h"

namespace variant::cuda {

struct TilePlace {
  unsigned head, tile;
};

struct TileOrder {
  unsigned heads, tiles;  // tiles: of one head
  unsigned heads_in_group;
  bool last_tiles_first;  // later tiles have more work

  __host__ __device__ TilePlace place(unsigned block) const {
    const unsigned blocks_in_group = heads_in_group * tiles;
    const unsigned first_head = block / blocks_in_group * heads_in_group;
    const unsigned left = heads - first_head;
    const unsigned together = left < heads_in_group ? left : heads_in_group;
    const unsigned index = block % blocks_in_group, turn = index / together;
    return {first_head + index % together, last_tiles_first ? tiles - 1 - turn : turn};
  }
};

// Heads whose rows of bytes_of_head bytes take at most a third of the cache; at least one. Two
// groups are in work while one ends and the next begins, and outputs pass through the cache too.
inline unsigned heads_that_fit(int64_t heads, int64_t bytes_of_head, int64_t cache_bytes) {
  const int64_t fitting = cache_bytes / 3 / bytes_of_head;
  return static_cast<unsigned>(fitting < 1 ? 1 : fitting < heads ? fitting : heads);
}

}  // namespace variant::cuda
