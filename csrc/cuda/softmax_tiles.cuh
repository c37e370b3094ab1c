// Attention of one tile of queries over a run of keys, on the tensor cores, for 16-bit operands.
//
// A warp owns 16 queries; all warps of a block share the tiles of keys and values, which cp.async
// copies in two stages. The softmax is the online softmax (Milakov and Gimelshein, arXiv
// 1805.02867; FlashAttention, arXiv 2205.14135), in float32 and base 2. All queries of a block see
// the same keys, which the caller's `Source` locates: only the last tile of keys needs a mask.
#pragma once

#include "elements.cuh"
#include "primitives.h"
#include "reduce.cuh"
#include "tile_copy.cuh"

namespace variant::cuda {

constexpr float kMinusInfinity = -__builtin_huge_valf();

// kHeadDim: the padded width; columns beyond head_dim are zeros.
template <class T_, int kHeadDim_, int kKeys_, int kWarps_>
struct SoftmaxTile {
  // Types
  using T = T_;
  // Fills the shared memory with keys and values. Kv8SoftmaxTile replaces it (kv8_tiles.cuh).
  template <class Tile, class Source>
  using Loader = StageLoader<Tile, Source>;

  // Sizes
  static constexpr int kHeadDim = kHeadDim_, kKeys = kKeys_, kWarps = kWarps_;
  static constexpr int kThreads = kWarps * kWarp, kQueries = 16 * kWarps;

  // Shared memory
  static constexpr int kRow = kHeadDim + kRowPadding;
  static constexpr int kStage = 2 * kKeys * kRow;  // keys, then values
  static constexpr int kSharedBytes = (kQueries * kRow + 2 * kStage) * 2;

  // Registers
  // Wider queries do not fit the registers; they are loaded again for every tile of keys.
  static constexpr bool kKeepQueries = kHeadDim <= 128;
  static constexpr int kQueryFragments = kKeepQueries ? kHeadDim / 16 : 1;
  // Blocks that a multiprocessor must hold at once; 0 leaves it to the compiler, which gives some
  // tiles a few registers more than that. On sm_100a it spills for the fourth block of 64 columns.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  static constexpr int kBlocksOf64 = 3;
#else
  static constexpr int kBlocksOf64 = 4;
#endif
  static constexpr int kBlocks = kWarps == 1 || kHeadDim > 96 ? 0
                                 : kHeadDim <= 32             ? 6
                                 : kHeadDim <= 64             ? kBlocksOf64
                                                              : 4;

  static_assert(sizeof(T) == 2, "the tensor cores multiply 16-bit operands here");
  static_assert(kHeadDim % 16 == 0, "a step of Q K^T takes 16 columns");
  static_assert(kKeys % 16 == 0, "a step of P V takes 16 keys");
  static_assert(spreads_over_banks(2 * kRow), "ldmatrix reads eight rows at a time");
};

// One thread's part of the results: rows lane / 4 and lane / 4 + 8 of its warp's 16 queries,
// columns 8 n + 2 (lane % 4) + {0, 1}.
template <class Tile>
struct SoftmaxState {
  float out[Tile::kHeadDim / 8][4];
  float total[2], largest[2];  // largest: of the unscaled scores
};

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

// sums += A B^T over 16 columns: A is a fragment of 16 rows, B a tile with 8 rows for each entry of
// sums.
template <class Tile, int kTiles>
__device__ inline void multiply_step(float (&sums)[kTiles][4], const uint32_t (&a)[4],
                                     const typename Tile::T* tile, int step, int lane) {
  static_assert(kTiles % 2 == 0, "ldmatrix brings two tiles of 8 rows at a time");
#pragma unroll
  for (int n = 0; n < kTiles; n += 2) {
    // B operand, 16 columns x 2 tiles of 8 rows: the rows are its columns.
    const int r = n * 8 + lane / 16 * 8 + lane % 8, column = step * 16 + lane / 8 % 2 * 8;
    uint32_t b[4];
    ldmatrix_x4(b, tile + r * Tile::kRow + column);
    const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
    mma_m16n8k16<typename Tile::T>(sums[n], a, low);
    mma_m16n8k16<typename Tile::T>(sums[n + 1], a, high);
  }
}

// out += W Y: W holds the warp's 16 rows of weights, 8 columns per entry; Y is a tile.
template <class Tile, int kTiles>
__device__ inline void accumulate(float (&out)[Tile::kHeadDim / 8][4],
                                  const float (&weights)[kTiles][4], const typename Tile::T* tile,
                                  int lane) {
  using T = typename Tile::T;
  static_assert(kTiles % 2 == 0, "a product takes the weights of two tiles of 8 rows");
#pragma unroll
  for (int step = 0; step < kTiles / 2; ++step) {
    // Accumulators of two tiles of 8 rows are the A operand of one product over 16 rows.
    const float* low_rows = weights[2 * step];
    const float* high_rows = weights[2 * step + 1];
    const uint32_t a[4] = {pack2<T>(low_rows[0], low_rows[1]), pack2<T>(low_rows[2], low_rows[3]),
                           pack2<T>(high_rows[0], high_rows[1]),
                           pack2<T>(high_rows[2], high_rows[3])};
#pragma unroll
    for (int n = 0; n < Tile::kHeadDim / 8; n += 2) {
      const int r = step * 16 + lane % 16, column = n * 8 + lane / 16 * 8;
      uint32_t b[4];
      ldmatrix_x4_trans(b, tile + r * Tile::kRow + column);
      const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
      mma_m16n8k16<T>(out[n], a, low);
      mma_m16n8k16<T>(out[n + 1], a, high);
    }
  }
}

template <class Tile>
__device__ inline void clear_state(SoftmaxState<Tile>& state) {
#pragma unroll
  for (int n = 0; n < Tile::kHeadDim / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) state.out[n][i] = 0.0f;
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    state.total[half] = 0.0f;
    state.largest[half] = kMinusInfinity;
  }
}

// scores = Q K^T. q: all fragments of the queries if they are kept, else memory for one.
template <class Tile>
__device__ inline void score_keys(float (&scores)[Tile::kKeys / 8][4],
                                  uint32_t (&q)[Tile::kQueryFragments][4],
                                  const typename Tile::T* q_tile, const typename Tile::T* k_tile,
                                  uint32_t sign, int lane) {
#pragma unroll
  for (int n = 0; n < Tile::kKeys / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[n][i] = 0.0f;
  }
#pragma unroll
  for (int step = 0; step < Tile::kHeadDim / 16; ++step) {
    if constexpr (!Tile::kKeepQueries) load_queries<Tile>(q[0], q_tile, step, sign);
    multiply_step<Tile>(scores, q[Tile::kKeepQueries ? step : 0], k_tile, step, lane);
  }
}

// Sets the scores of all but the tile's first `keys` keys to -inf.
template <int kTiles>
__device__ inline void mask_scores(float (&scores)[kTiles][4], int keys) {
  // The lane is unknown, so that nothing of this is computed, and kept, before the loop.
  const int left = keys - static_cast<int>(unknown(threadIdx.x) % 4 * 2);
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (n * 8 + i % 2 >= left) scores[n][i] = kMinusInfinity;
    }
  }
}

// An origin below this is rounded by at most 2^-12, which multiplies every p of a row by nearly 1:
// less than one rounding of p to 16 bits. From 2^28 on p may exceed float16, from 2^31 on float32.
constexpr float kExactOrigin = 8192.0f;

template <int kTiles>
__device__ inline void subtract_largest(float (&scores)[kTiles][4], const float (&largest)[2]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[n][i] -= largest[i / 2];
  }
}

// Replaces scores by probabilities p = 2^(scale_log2 (s - m')) with m' = max(m, all s), multiplies
// total and out by 2^(scale_log2 (m - m')), and adds this lane's p to total.
//
// scale_log2 s - scale_log2 m' is one multiply-add for each score. Only where scale_log2 m' is too
// large to be rounded, m' is subtracted first: one addition more for each score of such a row, one
// comparison for the others.
template <class Tile>
__device__ inline void online_softmax(float (&scores)[Tile::kKeys / 8][4], float scale_log2,
                                      SoftmaxState<Tile>& state) {
  constexpr int kKeyTiles = Tile::kKeys / 8, kColumns = Tile::kHeadDim / 8;
  float shrink[2], origin[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float largest = state.largest[half];
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n) {
      largest = fmaxf(largest, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
    }
    // The four lanes of a row are neighbours.
    largest = reduce_lanes<4>(largest, Largest());
    shrink[half] = ex2((state.largest[half] - largest) * scale_log2);
    origin[half] = largest * scale_log2;
    state.largest[half] = largest;
  }
  if (fmaxf(fabsf(origin[0]), fabsf(origin[1])) >= kExactOrigin) {
    // A row's result does not depend on the other row of this lane.
    float largest[2];
    for (int half = 0; half < 2; ++half) {
      const bool huge = fabsf(origin[half]) >= kExactOrigin;
      largest[half] = huge ? state.largest[half] : 0.0f;
      if (huge) origin[half] = 0.0f;
    }
    subtract_largest(scores, largest);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i) {
        scores[n][i] = ex2(fmaf(scores[n][i], scale_log2, -origin[half]));
        sum += scores[n][i];
      }
    }
    state.total[half] = state.total[half] * shrink[half] + sum;
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      state.out[n][2 * half] *= shrink[half];
      state.out[n][2 * half + 1] *= shrink[half];
    }
  }
}

// One tile of keys. kWhole: the tile after it is whole too; only the last two tiles of a block,
// which may be cut, take the checks.
template <class Tile, bool kWhole, class Loader>
__device__ inline void attend_keys(Loader& loader, uint32_t (&q)[Tile::kQueryFragments][4],
                                   const typename Tile::T* q_tile, int begin, int last,
                                   float scale_log2, uint32_t sign, int lane,
                                   SoftmaxState<Tile>& state) {
  const typename Tile::T* k_tile = loader.template load_stage<kWhole>(begin);
  const typename Tile::T* v_tile = k_tile + Tile::kKeys * Tile::kRow;
  __syncthreads();
  float scores[Tile::kKeys / 8][4];
  score_keys<Tile>(scores, q, q_tile, k_tile, sign, lane);
  if (!kWhole && begin + Tile::kKeys > last) mask_scores(scores, last - begin);
  online_softmax<Tile>(scores, scale_log2, state);
  accumulate<Tile>(state.out, scores, v_tile, lane);
  // The next iteration copies into this stage.
  if (kWhole || begin + Tile::kKeys < last) __syncthreads();
}

// The parts above take the lane as an argument: computed again in each part, it costs registers.
//
// scale_log2 > 0 multiplies the scores; negate: the queries are negated first. Every query sees
// the keys first..last. Call with all threads.
template <class Tile, class Source>
__device__ inline void attend_tile(typename Tile::T* shared, const Source& source, int first,
                                   int last, int head_dim, float scale_log2, bool negate,
                                   SoftmaxState<Tile>& state) {
  const int lane = threadIdx.x % kWarp;
  clear_state(state);
  if (first >= last) return;

  // First copies
  typename Tile::T* q_tile = shared;
  typename Tile::template Loader<Tile, Source> loader(shared + Tile::kQueries * Tile::kRow, source,
                                                      last, head_dim);
  copy_rows<Tile>(q_tile, Tile::kQueries, head_dim, [&](int r) { return source.query(r); });
  cp_async_commit();
  loader.start(first);
  cp_async_commit();

  // Queries
  const uint32_t sign = negate ? 0x80008000u : 0u;
  uint32_t q[Tile::kQueryFragments][4];
  if constexpr (Tile::kKeepQueries) {
    cp_async_wait<1>();
    __syncthreads();
#pragma unroll
    for (int step = 0; step < Tile::kQueryFragments; ++step) {
      load_queries<Tile>(q[step], q_tile, step, sign);
    }
  }

  // Tiles of keys
  int begin = first;
  for (; begin + 2 * Tile::kKeys <= last; begin += Tile::kKeys) {
    attend_keys<Tile, true>(loader, q, q_tile, begin, last, scale_log2, sign, lane, state);
  }
  for (; begin < last; begin += Tile::kKeys) {
    attend_keys<Tile, false>(loader, q, q_tile, begin, last, scale_log2, sign, lane, state);
  }

  // Row sums
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    state.total[half] = reduce_lanes<4>(state.total[half], Plus());
  }
}

// Calls write(row, column, first, second) for pairs of neighbouring columns; a total of 0 gives
// zeros.
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
