// Attention of one tile of queries over a run of keys with plain multiply-adds: float32, and 16-bit
// tensors whose rows do not start at multiples of 16 bytes. The same Source as softmax_tiles.cuh.
//
// A warp owns four queries. In the scores a lane holds a key, in the outputs a column, so that both
// products read shared memory without bank conflicts.
#pragma once

#include "elements.cuh"
#include "primitives.h"
#include "reduce.cuh"
#include "softmax_tiles.cuh"

namespace variant::cuda {

// kColumns: columns of a lane, so heads up to 32 * kColumns wide.
template <class T_, int kColumns_>
struct PlainTile {
  using T = T_;
  static constexpr int kColumns = kColumns_, kWidth = kColumns * kWarp;
  static constexpr int kWarps = 4, kThreads = kWarps * kWarp, kPerWarp = 4;
  static constexpr int kQueries = kWarps * kPerWarp, kKeys = kWarp;
  static constexpr int kRow = kWidth + 4;
  static_assert(spreads_over_banks(4 * kRow), "lanes read 16 bytes of different rows");
  // Keys and values use the same memory, one after the other.
  static constexpr int kSharedBytes = (kQueries + kKeys) * kRow * 4;
  // Whether the loop over rows must not be unrolled.
  static constexpr bool kRowByRow = false;

  // Key and value of token s. A default-constructed Row means no row.
  using Row = const T*;
  template <class Source>
  __device__ static Row key(const Source& source, int s) {
    Row k, v;
    source.locate(s, &k, &v);
    return k;
  }
  template <class Source>
  __device__ static Row value(const Source& source, int s) {
    Row k, v;
    source.locate(s, &k, &v);
    return v;
  }
};

template <class T>
__device__ inline bool is_there(const T* row) {
  return row != nullptr;
}
template <class T>
__device__ inline float element_of(const T* row, int column) {
  return widen(row[column]);
}

template <class Tile>
struct PlainState {
  float out[Tile::kPerWarp][Tile::kColumns];
  float total[Tile::kPerWarp], largest[Tile::kPerWarp];
};

// Converts rows to float32. Writes zeros beyond head_dim and where find(row) returns no row.
template <class Tile, class Find>
__device__ inline void widen_rows(float* tile, int rows, int head_dim, const Find& find) {
  const auto read = [&](int r) {
    const auto from = find(r);
#pragma unroll
    for (int c = threadIdx.x % kWarp; c < Tile::kWidth; c += kWarp) {
      tile[r * Tile::kRow + c] = is_there(from) && c < head_dim ? element_of(from, c) : 0.0f;
    }
  };
  if constexpr (Tile::kRowByRow) {
#pragma unroll 1
    for (int r = threadIdx.x / kWarp; r < rows; r += Tile::kWarps) read(r);
  } else {
    for (int r = threadIdx.x / kWarp; r < rows; r += Tile::kWarps) read(r);
  }
}

template <class Tile, class Source>
__device__ inline void attend_plain(float* shared, const Source& source, int first, int last,
                                    int head_dim, float scale_log2, bool negate,
                                    PlainState<Tile>& state) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  float* q_tile = shared;
  float* kv_tile = shared + Tile::kQueries * Tile::kRow;
#pragma unroll
  for (int i = 0; i < Tile::kPerWarp; ++i) {
    state.total[i] = 0.0f;
    state.largest[i] = kMinusInfinity;
#pragma unroll
    for (int c = 0; c < Tile::kColumns; ++c) state.out[i][c] = 0.0f;
  }
  if (first >= last) return;
  widen_rows<Tile>(q_tile, Tile::kQueries, head_dim, [&](int r) { return source.query(r); });
  const float* q_rows = q_tile + warp * Tile::kPerWarp * Tile::kRow;

  for (int begin = first; begin < last; begin += Tile::kKeys) {
    widen_rows<Tile>(kv_tile, Tile::kKeys, head_dim, [&](int r) {
      return begin + r < last ? Tile::key(source, begin + r) : typename Tile::Row();
    });
    __syncthreads();
    float scores[Tile::kPerWarp] = {};
    // Sums of 16 products are added to the score: a single sum of up to 256 rounds more. Columns
    // beyond head_dim are zeros.
    for (int begin_d = 0; begin_d < head_dim; begin_d += 16) {
      float part[Tile::kPerWarp] = {};
#pragma unroll
      for (int d = begin_d; d < begin_d + 16; d += 4) {
        const float4 k = *reinterpret_cast<const float4*>(kv_tile + lane * Tile::kRow + d);
#pragma unroll
        for (int i = 0; i < Tile::kPerWarp; ++i) {
          const float4 q = *reinterpret_cast<const float4*>(q_rows + i * Tile::kRow + d);
          part[i] += q.x * k.x;
          part[i] += q.y * k.y;
          part[i] += q.z * k.z;
          part[i] += q.w * k.w;
        }
      }
#pragma unroll
      for (int i = 0; i < Tile::kPerWarp; ++i) scores[i] += part[i];
    }
#pragma unroll
    for (int i = 0; i < Tile::kPerWarp; ++i) {
      if (negate) scores[i] = -scores[i];
      if (begin + lane >= last) scores[i] = kMinusInfinity;
      const float largest = fmaxf(state.largest[i], reduce_lanes<kWarp>(scores[i], Largest()));
      const float shrink = ex2((state.largest[i] - largest) * scale_log2);
      scores[i] = ex2((scores[i] - largest) * scale_log2);
      state.total[i] = state.total[i] * shrink + scores[i];  // of this lane's keys
      state.largest[i] = largest;
#pragma unroll
      for (int c = 0; c < Tile::kColumns; ++c) state.out[i][c] *= shrink;
    }
    __syncthreads();
    widen_rows<Tile>(kv_tile, Tile::kKeys, head_dim, [&](int r) {
      return begin + r < last ? Tile::value(source, begin + r) : typename Tile::Row();
    });
    __syncthreads();
    // A separate sum for this tile: it is added to the sum of earlier tiles once, which rounds
    // less.
    float sums[Tile::kPerWarp][Tile::kColumns] = {};
#pragma unroll 4
    for (int key = 0; key < Tile::kKeys; ++key) {
      float p[Tile::kPerWarp];
#pragma unroll
      for (int i = 0; i < Tile::kPerWarp; ++i) p[i] = __shfl_sync(kAllLanes, scores[i], key);
#pragma unroll
      for (int c = 0; c < Tile::kColumns; ++c) {
        const float v = kv_tile[key * Tile::kRow + c * kWarp + lane];
#pragma unroll
        for (int i = 0; i < Tile::kPerWarp; ++i) sums[i][c] += p[i] * v;
      }
    }
#pragma unroll
    for (int i = 0; i < Tile::kPerWarp; ++i) {
#pragma unroll
      for (int c = 0; c < Tile::kColumns; ++c) state.out[i][c] += sums[i][c];
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < Tile::kPerWarp; ++i) {
    state.total[i] = reduce_lanes<kWarp>(state.total[i], Plus());
  }
}

// write(row, column, value); total 0 gives zeros.
template <class Tile, class Write>
__device__ inline void write_plain(const PlainState<Tile>& state, int rows, int head_dim,
                                   const Write& write) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
  for (int i = 0; i < Tile::kPerWarp; ++i) {
    const int r = warp * Tile::kPerWarp + i;
    if (r >= rows) continue;
    const float total = state.total[i] == 0.0f ? 1.0f : state.total[i];
#pragma unroll
    for (int c = 0; c < Tile::kColumns; ++c) {
      const int column = c * kWarp + lane;
      if (column < head_dim) write(r, column, state.out[i][c] / total);
    }
  }
}

}  // namespace variant::cuda
