// Attention of one tile of queries over a run of keys, on the tensor cores, for 16-bit operands.
//
// A warp owns 16 queries; all warps of a block share the tiles of keys and values, which cp.async
// copies in two stages. The softmax is the online softmax (Milakov and Gimelshein, arXiv
// 1805.02867; FlashAttention, arXiv 2205.14135), in float32 and base 2. The caller's `Source`
// locates keys and tells which keys a query sees.
#pragma once

#include "elements.cuh"
#include "primitives.h"
#include "reduce.cuh"

namespace variant::cuda {

template <class Tile>
class StageLoader;

constexpr float kMinusInfinity = -__builtin_huge_valf();

// Elements after each row in shared memory: the eight rows that ldmatrix reads at a time start in
// different banks for every width here.
constexpr int kRowPadding = 8;

// kHeadDim: the padded width; columns beyond head_dim are zeros.
template <class T_, int kHeadDim_, int kKeys_, int kWarps_>
struct SoftmaxTile {
  // Types
  using T = T_;
  // Fills the shared memory with keys and values. Kv8SoftmaxTile replaces it (kv8_tiles.cuh).
  template <class Tile>
  using Loader = StageLoader<Tile>;

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
  // Blocks that a multiprocessor must hold at once; 0 leaves it to the compiler, which gives tiles
  // of 64 columns a few registers more than four blocks have; on sm_100a it spills for the fourth.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  static constexpr int kBlocks = 0;
#else
  static constexpr int kBlocks = kHeadDim == 64 && kWarps > 1 ? 4 : 0;
#endif

  static_assert(sizeof(T) == 2, "the tensor cores multiply 16-bit operands here");
  static_assert(kHeadDim % 16 == 0, "a step of Q K^T takes 16 columns");
  static_assert(kKeys % 16 == 0, "a step of P V takes 16 keys");
  static_assert(kRow % kEight == 0, "cp.async and ldmatrix need rows at multiples of 16 bytes");
};

// One thread's part of the results: rows lane / 4 and lane / 4 + 8 of its warp's 16 queries,
// columns 8 n + 2 (lane % 4) + {0, 1}.
template <class Tile>
struct SoftmaxState {
  float out[Tile::kHeadDim / 8][4];
  float total[2], largest[2];  // largest: of the unscaled scores
};

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

// Copies keys and values of tokens first..first + kKeys. Writes zeros from `last` on, because free
// slots may hold NaN, and a probability of zero times NaN is NaN.
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

// Keys and values in two stages: cp.async fills one while the warps multiply the other.
template <class Tile>
class StageLoader {
 public:
  using T = typename Tile::T;

  // Issues the copies of the first tile into stages, 2 * kStage elements; the caller commits them.
  template <class Source>
  __device__ void start(T* stages, const Source& source, int first, int last, int head_dim) {
    copy_keys<Tile>(stages, source, first, last, head_dim);
  }

  // Issues the copies of the tile after `begin` if there are more, waits for this thread's copies
  // of the tile at `begin`, and returns its stage: keys, then values. A barrier must follow.
  template <class Source>
  __device__ const T* load_stage(T* stages, const Source& source, int begin, bool more, int last,
                                 int head_dim) {
    const T* stage = stages + index_ * Tile::kStage;
    index_ ^= 1;
    if (more) {
      copy_keys<Tile>(stages + index_ * Tile::kStage, source, begin + Tile::kKeys, last, head_dim);
      cp_async_commit();
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    return stage;
  }

 private:
  int index_ = 0;  // of the stage that is multiplied next
};

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

// Sets the scores of keys from visible[half] on to -inf; the tile's first key is `begin`.
template <int kTiles>
__device__ inline void mask_scores(float (&scores)[kTiles][4], const int (&visible)[2], int begin,
                                   int lane) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int key = begin + n * 8 + lane % 4 * 2 + i % 2;
      if (key >= visible[i / 2]) scores[n][i] = kMinusInfinity;
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

// The parts above take the lane, the stages and `more` as arguments: computed again in each part,
// they cost registers.
//
// scale_log2 > 0 multiplies the scores; negate: the queries are negated first. Every query of the
// block sees at least the key `first`. Call with all threads.
template <class Tile, class Source>
__device__ inline void attend_tile(typename Tile::T* shared, const Source& source, int first,
                                   int last, int head_dim, float scale_log2, bool negate,
                                   SoftmaxState<Tile>& state) {
  // Types
  using T = typename Tile::T;
  using Loader = typename Tile::template Loader<Tile>;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;

  // Shared memory
  T* q_tile = shared;
  T* stages = shared + Tile::kQueries * Tile::kRow;
  Loader loader;

  // Registers
  clear_state(state);
  if (first >= last) return;
  const uint32_t sign = negate ? 0x80008000u : 0u;
  int visible[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    visible[half] = source.visible(warp * 16 + half * 8 + lane / 4);
  }
  const int all_see = visible[0] < visible[1] ? visible[0] : visible[1];
  uint32_t q[Tile::kQueryFragments][4];

  // First copies
  copy_rows<Tile>(q_tile, Tile::kQueries, head_dim, [&](int r) { return source.query(r); });
  loader.start(stages, source, first, last, head_dim);
  cp_async_commit();

  // Tiles of keys
  for (int begin = first; begin < last; begin += Tile::kKeys) {
    const bool more = begin + Tile::kKeys < last;
    const T* k_tile = loader.load_stage(stages, source, begin, more, last, head_dim);
    const T* v_tile = k_tile + Tile::kKeys * Tile::kRow;
    __syncthreads();
    if constexpr (Tile::kKeepQueries) {
      if (begin == first) {
#pragma unroll
        for (int step = 0; step < Tile::kQueryFragments; ++step) {
          load_queries<Tile>(q[step], q_tile, step, sign);
        }
      }
    }
    float scores[Tile::kKeys / 8][4];
    score_keys<Tile>(scores, q, q_tile, k_tile, sign, lane);
    if (begin + Tile::kKeys > all_see) mask_scores(scores, visible, begin, lane);
    online_softmax<Tile>(scores, scale_log2, state);
    accumulate<Tile>(state.out, scores, v_tile, lane);
    // The next iteration copies into this stage.
    if (more) __syncthreads();
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
