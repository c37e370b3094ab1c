// Attention of one tile of queries over a run of keys, on the tensor cores, for 16-bit operands.
//
// A warp owns 16 queries; all warps of a block share the tiles of keys and values, which arrive by
// cp.async in two stages. The softmax is the running one (Milakov and Gimelshein, arXiv 1805.02867;
// FlashAttention, arXiv 2205.14135), in float32 and base 2. Where a key lies and which keys a query
// sees is the caller's knowledge: `Source`.
#pragma once

#include <type_traits>

#include "elements.cuh"
#include "primitives.h"
#include "reduce.cuh"

namespace variant::cuda {

// A thread's part of copying 8-bit tiles: kv8_tiles.cuh.
template <class Tile>
struct Kv8Share;
// Stands for it where there are none.
struct NoShare {};

constexpr float kMinusInfinity = -__builtin_huge_valf();

// Elements after each row in shared memory: the eight rows that ldmatrix reads at a time start in
// different banks for every width here.
constexpr int kRowPadding = 8;

// kHeadDim: the width of an instance; narrower heads are filled up with zeros.
template <class T_, int kHeadDim_, int kKeys_, int kWarps_>
struct SoftmaxTile {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_, kKeys = kKeys_, kWarps = kWarps_;
  static constexpr int kThreads = kWarps * kWarp, kQueries = 16 * kWarps;
  static constexpr int kRow = kHeadDim + kRowPadding;
  static constexpr int kStage = 2 * kKeys * kRow;  // keys, then values
  static constexpr int kSharedBytes = (kQueries * kRow + 2 * kStage) * 2;
  // Wider queries would fill the registers: they are read anew for every tile of keys.
  static constexpr bool kKeepQueries = kHeadDim <= 128;
  // Blocks that a multiprocessor must hold at once; 0 leaves it to the compiler.
  static constexpr int kBlocks = 0;
  // Whether keys and values come in 8 bits (kv8_tiles.cuh).
  static constexpr bool kEightBit = false;
  static_assert(kHeadDim % 16 == 0 && kKeys % 16 == 0, "a product takes 16 keys and 16 columns");
};

// One thread's part of the results: rows lane / 4 and lane / 4 + 8 of its warp's 16 queries,
// columns 8 n + 2 (lane % 4) + {0, 1}.
template <class Tile>
struct SoftmaxState {
  float out[Tile::kHeadDim / 8][4];
  float total[2], largest[2];  // largest: of the unscaled scores
};

// Copies `rows` rows of a tile, 16 bytes a thread and turn; zeros beyond head_dim and where
// find(row) is null.
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

// Keys and values of tokens first..first + kKeys; zeros from last on, so that what free slots hold
// cannot matter: a probability of zero would not silence NaN.
template <class Tile, class Source>
__device__ inline void copy_keys(typename Tile::T* stage, const Source& source, int first, int last,
                                 int head_dim) {
  using T = typename Tile::T;
  constexpr int kChunks = Tile::kHeadDim / kEight;
  for (int i = threadIdx.x; i < Tile::kKeys * kChunks; i += Tile::kThreads) {
    const int r = i / kChunks, column = i % kChunks * kEight;
    T* k_to = stage + r * Tile::kRow + column;
    T* v_to = k_to + Tile::kKeys * Tile::kRow;
    if (first + r < last && column < head_dim) {
      const T *k, *v;
      source.locate(first + r, &k, &v);
      cp_async_16(k_to, k + column);
      cp_async_16(v_to, v + column);
    } else {
      *reinterpret_cast<uint4*>(k_to) = make_uint4(0, 0, 0, 0);
      *reinterpret_cast<uint4*>(v_to) = make_uint4(0, 0, 0, 0);
    }
  }
}

// Fragment of 16 queries x 16 columns: the A operand.
template <class Tile>
__device__ inline void load_queries(uint32_t (&a)[4], const typename Tile::T* q_tile, int step,
                                    uint32_t sign) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int r = warp * 16 + lane % 16, column = step * 16 + lane / 16 * 8;
  ldmatrix_x4(a, q_tile + r * Tile::kRow + column);
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] ^= sign;
}

// scale_log2 > 0 multiplies the scores; negate: the queries change their sign before. Every query
// of the block sees at least the key `first`. Call with all threads.
template <class Tile, class Source>
__device__ inline void attend_tile(typename Tile::T* shared, const Source& source, int first,
                                   int last, int head_dim, float scale_log2, bool negate,
                                   SoftmaxState<Tile>& state) {
  using T = typename Tile::T;
  constexpr int kSteps = Tile::kHeadDim / 16, kColumns = Tile::kHeadDim / 8;
  constexpr int kKeyTiles = Tile::kKeys / 8;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  T* q_tile = shared;
  T* stages = shared + Tile::kQueries * Tile::kRow;
  const uint32_t sign = negate ? 0x80008000u : 0u;

#pragma unroll
  for (int n = 0; n < kColumns; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) state.out[n][i] = 0.0f;
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    state.total[half] = 0.0f;
    state.largest[half] = kMinusInfinity;
  }
  if (first >= last) return;

  int visible[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    visible[half] = source.visible(warp * 16 + half * 8 + lane / 4);
  }
  const int all_see = visible[0] < visible[1] ? visible[0] : visible[1];

  copy_rows<Tile>(q_tile, Tile::kQueries, head_dim, [&](int r) { return source.query(r); });
  [[maybe_unused]] std::conditional_t<Tile::kEightBit, Kv8Share<Tile>, NoShare> share;
  [[maybe_unused]] uint8_t* room = reinterpret_cast<uint8_t*>(stages + Tile::kStage);
  if constexpr (Tile::kEightBit) {
    share.fetch(room, source, first, last, head_dim);
  } else {
    copy_keys<Tile>(stages, source, first, last, head_dim);
  }
  cp_async_commit();

  uint32_t q[Tile::kKeepQueries ? kSteps : 1][4];
  int stage = 0;
  for (int begin = first; begin < last; begin += Tile::kKeys, stage ^= 1) {
    const bool more = begin + Tile::kKeys < last;
    if constexpr (Tile::kEightBit) {
      // Each thread widens what it copied itself: no barrier in between, and the room for the copy
      // is free again at once. One tile of 16 bits is enough.
      cp_async_wait<0>();
      share.widen(stages, room);
      if (more) {
        share.fetch(room, source, begin + Tile::kKeys, last, head_dim);
        cp_async_commit();
      }
    } else if (more) {
      copy_keys<Tile>(stages + (stage ^ 1) * Tile::kStage, source, begin + Tile::kKeys, last,
                      head_dim);
      cp_async_commit();
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    __syncthreads();
    if constexpr (Tile::kKeepQueries) {
      if (begin == first) {
#pragma unroll
        for (int step = 0; step < kSteps; ++step) load_queries<Tile>(q[step], q_tile, step, sign);
      }
    }

    const T* k_tile = stages + (Tile::kEightBit ? 0 : stage) * Tile::kStage;
    const T* v_tile = k_tile + Tile::kKeys * Tile::kRow;
    float scores[kKeyTiles][4];
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[n][i] = 0.0f;
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t (&a)[4] = q[Tile::kKeepQueries ? step : 0];
      if constexpr (!Tile::kKeepQueries) load_queries<Tile>(q[0], q_tile, step, sign);
#pragma unroll
      for (int n = 0; n < kKeyTiles; n += 2) {
        // B operand, 16 columns x 2 tiles of 8 keys: rows of K are its columns.
        const int key = n * 8 + lane / 16 * 8 + lane % 8, column = step * 16 + lane / 8 % 2 * 8;
        uint32_t b[4];
        ldmatrix_x4(b, k_tile + key * Tile::kRow + column);
        const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
        mma_m16n8k16<T>(scores[n], a, low);
        mma_m16n8k16<T>(scores[n + 1], a, high);
      }
    }

    if (begin + Tile::kKeys > all_see) {
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int key = begin + n * 8 + lane % 4 * 2 + i % 2;
          if (key >= visible[i / 2]) scores[n][i] = kMinusInfinity;
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float largest = state.largest[half];
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
        largest = fmaxf(largest, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
      }
      // The four lanes of a row are neighbours.
      largest = reduce_lanes<4>(largest, Largest());
      const float shrink = ex2((state.largest[half] - largest) * scale_log2);
      const float origin = largest * scale_log2;
      state.largest[half] = largest;
      float sum = 0.0f;
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          scores[n][i] = ex2(scores[n][i] * scale_log2 - origin);
          sum += scores[n][i];
        }
      }
      state.total[half] = state.total[half] * shrink + sum;
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        state.out[n][2 * half] *= shrink;
        state.out[n][2 * half + 1] *= shrink;
      }
    }

#pragma unroll
    for (int step = 0; step < Tile::kKeys / 16; ++step) {
      // Accumulators of two tiles of 8 keys are the A operand of one product over 16 keys.
      const float* first_keys = scores[2 * step];
      const float* more_keys = scores[2 * step + 1];
      const uint32_t p[4] = {
          pack2<T>(first_keys[0], first_keys[1]), pack2<T>(first_keys[2], first_keys[3]),
          pack2<T>(more_keys[0], more_keys[1]), pack2<T>(more_keys[2], more_keys[3])};
#pragma unroll
      for (int n = 0; n < kColumns; n += 2) {
        const int key = step * 16 + lane % 16, column = n * 8 + lane / 16 * 8;
        uint32_t b[4];
        ldmatrix_x4_trans(b, v_tile + key * Tile::kRow + column);
        const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
        mma_m16n8k16<T>(state.out[n], p, low);
        mma_m16n8k16<T>(state.out[n + 1], p, high);
      }
    }
    // The next turn copies into this stage.
    if (more) __syncthreads();
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    state.total[half] = reduce_lanes<4>(state.total[half], Plus());
  }
}

// write(row, column, first, second): two neighbours of a row of the tile; total 0 gives zeros.
template <class Tile, class Write>
__device__ inline void write_tile(const SoftmaxState<Tile>& state, int rows, int head_dim,
                                  const Write& write) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = warp * 16 + half * 8 + lane / 4;
    if (r >= rows) continue;
    const float share = state.total[half] == 0.0f ? 0.0f : 1.0f / state.total[half];
#pragma unroll
    for (int n = 0; n < Tile::kHeadDim / 8; ++n) {
      const int column = n * 8 + lane % 4 * 2;
      if (column < head_dim) {
        write(r, column, state.out[n][2 * half] * share, state.out[n][2 * half + 1] * share);
      }
    }
  }
}

}  // namespace variant::cuda
