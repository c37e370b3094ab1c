// The order of blocks, tiles cut at the ends of scales, and division by multiplication: functions
// of integers alone.
#include "../block_causal_attention.h"
#include "../divisor.h"
#include "../tile_order.h"
#include "check_cuda.h"

using namespace variant;
using namespace variant::cuda;

namespace {

void test_every_tile_of_every_head_has_one_block(const TileOrder& order) {
  std::vector<int> blocks(order.heads * order.tiles, 0);
  for (unsigned block = 0; block < order.heads * order.tiles; ++block) {
    const TilePlace place = order.place(block);
    CHECK(place.head < order.heads && place.tile < order.tiles, "block %u is outside", block);
    ++blocks[place.head * order.tiles + place.tile];
  }
  for (int count : blocks) CHECK(count == 1, "a tile has %d blocks", count);
}

// Heads come group by group; in a group all heads' longest tiles come first, then the next ones.
void test_groups_follow_one_another_and_long_tiles_come_first(const TileOrder& order) {
  unsigned group = 0, turn = 0, in_turn = 0;
  for (unsigned block = 0; block < order.heads * order.tiles; ++block) {
    const TilePlace place = order.place(block);
    const unsigned first = group * order.heads_in_group;
    const unsigned heads = std::min(order.heads_in_group, order.heads - first);
    const unsigned tile = order.last_tiles_first ? order.tiles - 1 - turn : turn;
    CHECK(place.head == first + in_turn && place.tile == tile, "block %u: head %u, tile %u", block,
          place.head, place.tile);
    if (++in_turn < heads) continue;
    in_turn = 0;
    if (++turn < order.tiles) continue;
    turn = 0;
    ++group;
  }
}

void test_orders() {
  for (unsigned heads : {1u, 2u, 5u, 30u, 77u}) {
    for (unsigned tiles : {1u, 3u, 16u}) {
      for (unsigned group = 1; group <= heads; ++group) {
        for (bool last_tiles_first : {false, true}) {
          const TileOrder order = {heads, tiles, group, last_tiles_first};
          test_every_tile_of_every_head_has_one_block(order);
          test_groups_follow_one_another_and_long_tiles_come_first(order);
        }
      }
    }
  }
  // The most blocks that a launch may have.
  const TileOrder widest = {0x7ffffe00u, 1, 100, true}, longest = {1, 0x7ffffe00u, 1, true};
  CHECK(widest.place(0x7ffffdffu).head == 0x7ffffdffu, "the last of many heads");
  CHECK(longest.place(0x7ffffdffu).tile == 0, "the first of many tiles comes last");
}

void test_groups_fit_the_cache() {
  const int64_t head = 2 * 680 * 64 * 2, cache = 50 << 20;
  for (int64_t heads : {1, 30, 1920}) {
    const int64_t group = heads_that_fit(heads, head, cache);
    CHECK(group >= 1 && group <= heads, "%ld of %ld heads", group, heads);
    CHECK(group * head <= cache / 3, "%ld heads do not fit", group);
    CHECK(group == heads || (group + 1) * head > cache / 3, "%ld heads leave room", group);
  }
  CHECK(heads_that_fit(8, cache, cache) == 1, "a head larger than its share is alone");
  CHECK(heads_that_fit(8, head, 0) == 1, "a device without an L2 cache");
}

template <int kRows>
void test_tiles_end_where_scales_end(const std::vector<int64_t>& lengths) {
  int64_t length = 0;
  for (int64_t tokens : lengths) length += tokens;
  ScaleEnds ends;
  CHECK(ends.set(lengths.data(), static_cast<int64_t>(lengths.size()), length), "refused");
  int number = 0, begin = 0;
  for (int64_t tokens : lengths) {
    const int scale_begin = begin, scale_end = begin + static_cast<int>(tokens);
    for (; begin < scale_end; ++number) {
      const ScaleTile tile = ends.tile<kRows>(number);
      CHECK(tile.begin == begin, "tile %d: begins at %d, not %d", number, tile.begin, begin);
      CHECK(tile.rows == std::min(kRows, scale_end - begin), "tile %d: %d rows", number, tile.rows);
      CHECK(tile.scale_begin == scale_begin && tile.scale_end == scale_end, "tile %d: scale %d-%d",
            number, tile.scale_begin, tile.scale_end);
      begin += tile.rows;
    }
  }
  CHECK(number == ends.tiles(kRows), "%d tiles, not %d", number, ends.tiles(kRows));
}

void test_quotients_are_exact() {
  std::vector<int64_t> divisors = {1, 2, 3, 5, 6, 7, 10, 16, 25, 64, 100, 641, 65535, 65536, 65537};
  for (int64_t x : {int64_t{1} << 30, (int64_t{1} << 30) + 1, (int64_t{1} << 31) - 1}) {
    divisors.push_back(x);
  }
  const int64_t most = (int64_t{1} << 31) - 1;
  for (int64_t divisor : divisors) {
    const Divisor by = divide_by(static_cast<int>(divisor));
    const auto check = [&](int64_t dividend) {
      if (dividend < 0 || dividend > most) return;
      const int64_t quotient = by.quotient(static_cast<int>(dividend));
      CHECK(quotient == dividend / divisor, "%ld / %ld gave %ld", dividend, divisor, quotient);
    };
    for (int64_t dividend = 0; dividend < 2000; ++dividend) {
      check(dividend);
      check(most - dividend);
      check(most / 2000 * dividend);
      // Where the quotient changes.
      for (int64_t near : {-1, 0, 1}) {
        check(dividend * divisor + near);
        check((most / divisor - dividend) * divisor + near);
      }
    }
  }
}

}  // namespace

int main() {
  test_orders();
  test_groups_fit_the_cache();
  for (const std::vector<int64_t>& lengths : std::vector<std::vector<int64_t>>{
           {1},
           {64},
           {65, 1, 63},
           {1, 4, 9, 16, 25, 36, 64, 100, 169, 256},
           std::vector<int64_t>(kMostScales, 17),
       }) {
    test_tiles_end_where_scales_end<16>(lengths);
    test_tiles_end_where_scales_end<64>(lengths);
  }
  test_quotients_are_exact();
}
