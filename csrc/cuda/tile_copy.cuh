// Copies of rows to tiles in shared memory with cp.async, for 16-bit elements.
#pragma once

#include "elements.cuh"
#include "primitives.h"

namespace variant::cuda {

// Elements after each row in shared memory, for spreads_over_banks.
constexpr int kRowPadding = 8;

// Whether copies can take the rows of a view of 16-bit elements.
inline bool fits_tiles(const HeadView& x) {
  return is_aligned(x, 2) && is_short(2, x.token_stride);
}

// Copies `rows` rows of a tile, 16 bytes per thread and iteration. Writes zeros beyond head_dim and
// where find(row) is null.
template <class Tile, class Find>
__device__ inline void copy_rows(typename Tile::T* tile, int rows, int head_dim, const Find& find) {
  constexpr int kChunks = Tile::kHeadDim / kEight;
  for (int i = threadIdx.x; i < rows * kChunks; i += Tile::kThreads) {
    const int r = i / kChunks, column = i % kChunks * kEight;
    const typename Tile::T* from = find(r);
    typename Tile::T* to = tile + r * Tile::kRow + column;
    if (from != nullptr && column < head_dim) {
      cp_async_16(to, from + column);
    } else {
      *reinterpret_cast<uint4*>(to) = make_uint4(0, 0, 0, 0);
    }
  }
}

// Two rows of each token of one head, such as its key and its value: a source for StageLoader.
template <class T, class Step>
struct RowPairs {
  HeadRows<T, Step> first, second;

  __device__ void locate(int t, const T** first_row, const T** second_row) const {
    *first_row = first.row(t);
    *second_row = second.row(t);
  }
  // After this the rows start at `column`.
  __device__ void move_columns(int column) {
    first.data += column;
    second.data += column;
  }
};

constexpr int power_of_two_from(int n) {
  int power = 1;
  while (power < n) power *= 2;
  return power;
}

// Keys and values (or another pair of rows by token) in two stages: cp.async fills one while the
// warps multiply the other.
//
// A thread copies the same 16 bytes of every kRowsPerTurn-th row, so that the loop over the tiles
// computes rows only. Columns from head_dim on never change: start() writes zeros there, once.
template <class Tile, class Source>
class StageLoader {
 public:
  using T = typename Tile::T;
  static constexpr int kLanes = power_of_two_from(Tile::kHeadDim / kEight);
  static constexpr int kRowsPerTurn = Tile::kThreads / kLanes;
  static constexpr int kTurns = (Tile::kKeys + kRowsPerTurn - 1) / kRowsPerTurn;
  static_assert(kTurns == 1 || Tile::kKeys % kRowsPerTurn == 0,
                "a tile is a whole number of turns");

  // stages: 2 * kStage elements. The pairs of rows are those of tokens up to `last`.
  __device__ StageLoader(T* stages, const Source& source, int last, int head_dim)
      : source_(source),
        last_(last),
        head_dim_(head_dim),
        row_(static_cast<int>(threadIdx.x) / kLanes),
        copies_(column() < head_dim && (kRowsPerTurn <= Tile::kKeys || row_ < Tile::kKeys)),
        to_(stages + row_ * Tile::kRow + column()),
        stages_(stages) {
    source_.move_columns(column());
  }

  // Issues the copies of the first tile; the caller commits them.
  __device__ void start(int first) {
    if (column() < Tile::kHeadDim && column() >= head_dim_) clear_columns();
    copy<false>(0, first);
  }

  // The stage that load_stage fills next.
  __device__ T* next_stage() const { return stages_ + (index_ ^ 1) * Tile::kStage; }

  // Issues the copies of the tile after `begin` if there is one, waits for this thread's copies of
  // the tile at `begin`, and returns its stage: keys, then values. A barrier must follow.
  // kWhole: there is a tile after it, and none of its tokens are past `last`.
  template <bool kWhole>
  __device__ const T* load_stage(int begin) {
    const T* stage = stages_ + index_ * Tile::kStage;
    index_ ^= 1;
    if (kWhole || begin + Tile::kKeys < last_) {
      copy<kWhole>(index_, begin + Tile::kKeys);
      cp_async_commit();
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    return stage;
  }

 private:
  // Writes zeros to this thread's columns of both stages.
  __device__ void clear_columns() const {
#pragma unroll 1
    for (int stage = 0; stage < 2; ++stage) {
#pragma unroll 1
      for (int r = row_; r < 2 * Tile::kKeys; r += kRowsPerTurn) {
        T* to = to_ + stage * Tile::kStage + (r - row_) * Tile::kRow;
        *reinterpret_cast<uint4*>(to) = make_uint4(0, 0, 0, 0);
      }
    }
  }

  __device__ static int column() { return static_cast<int>(threadIdx.x) % kLanes * kEight; }

  // Copies the pairs of tokens first..first + kKeys. Rows from `last` on become zeros, because free
  // slots may hold NaN, and a probability of zero times NaN is NaN.
  template <bool kWhole>
  __device__ void copy(int stage, int first) const {
    if (!copies_) return;
    T* to = to_ + stage * Tile::kStage;
#pragma unroll 4
    for (int turn = 0; turn < kTurns; ++turn) {
      const int token = first + row_ + turn * kRowsPerTurn;
      const bool there = kWhole || token < last_;
      const T *k, *v;
      source_.locate(there ? token : last_ - 1, &k, &v);
      cp_async_16(to, k, there ? 16 : 0);
      cp_async_16(to + Tile::kKeys * Tile::kRow, v, there ? 16 : 0);
      to += kRowsPerTurn * Tile::kRow;
    }
  }

  Source source_;
  int last_, head_dim_, row_;
  bool copies_;
  T *to_, *stages_;  // to_: this thread's first place
  int index_ = 0;    // of the stage that is multiplied next
};

}  // namespace variant::cuda
