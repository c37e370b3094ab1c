// Gradients of block-causal attention on the tensor cores, for 16-bit operands.
#pragma once

#include "block_causal_backward.cuh"
#include "softmax_tiles.cuh"

namespace variant::cuda {

// A warp owns 16 rows of the own tiles; other tiles of kKeys rows are copied in two stages. lse and
// delta of the queries follow their two tiles, whether those are the own or the other ones.
template <class T_, int kHeadDim_, int kOtherRows, bool kForKeys_>
struct BackwardTile {
  using T = T_;
  static constexpr bool kForKeys = kForKeys_;
  static constexpr int kHeadDim = kHeadDim_, kKeys = kOtherRows;
  static constexpr int kWarps = 4, kThreads = kWarps * kWarp, kRows = 16 * kWarps;
  static constexpr int kRow = kHeadDim + kRowPadding;
  // Elements of two tiles and of their two floats a row.
  static constexpr int kOwn = 2 * kRows * (kRow + (kForKeys ? 0 : 2));
  static constexpr int kStage = 2 * kKeys * (kRow + (kForKeys ? 2 : 0));
  static constexpr int kSharedBytes = (kOwn + 2 * kStage) * 2;
  // Blocks that a multiprocessor must hold at once: left to itself the compiler gives tiles more
  // registers than they need, or spills registers for one block more.
  static constexpr int kBlocks = kForKeys ? (kHeadDim <= 32   ? 4
                                             : kHeadDim <= 96 ? 3
                                                              : 2)
                                          : (kHeadDim <= 32   ? 7
                                             : kHeadDim <= 64 ? 5
                                                              : 4);
  // Whether the block's numbers are computed again after its loop, because during the loop they
  // would take registers.
  static constexpr bool kFindsAgain = !kForKeys || kHeadDim == 96;
  static_assert(2 * kRows <= kThreads && kKeys <= kRows, "a thread copies one float of a tile");
  static_assert(spreads_over_banks(2 * kRow), "ldmatrix reads eight rows at a time");
  static_assert(kOwn % kEight == 0 && kStage % kEight == 0, "tiles lie at multiples of 16 bytes");
};

// One thread's part of the results, in the layout of SoftmaxState.
template <class Tile>
struct Gradients {
  float dx[Tile::kHeadDim / 8][4];
  float dv[Tile::kForKeys ? Tile::kHeadDim / 8 : 1][4];
};

// The floats after two tiles of kRows rows.
template <class Tile, int kRows>
__device__ inline float* numbers_of(typename Tile::T* tiles) {
  return reinterpret_cast<float*>(tiles + 2 * kRows * Tile::kRow);
}
template <class Tile, int kRows>
__device__ inline const float* numbers_of(const typename Tile::T* tiles) {
  return reinterpret_cast<const float*>(tiles + 2 * kRows * Tile::kRow);
}

// Copies lse, then delta of queries first..first + kRows; zeros from `last` on.
template <int kRows, bool kWhole, class Block>
__device__ inline void copy_numbers(float* to, const Block& block, int first, int last) {
  const int i = threadIdx.x, query = first + i % kRows;
  if (i >= 2 * kRows) return;
  const bool there = kWhole || query < last;
  const float* from = i < kRows ? block.lse : block.delta;
  cp_async_4(to + i, from + (there ? query : last - 1), there ? 4 : 0);
}

// sums = own other^T for the warp's 16 rows.
template <class Tile>
__device__ inline void multiply_rows(float (&sums)[Tile::kKeys / 8][4],
                                     const typename Tile::T* own_tile,
                                     const typename Tile::T* other_tile, int lane) {
#pragma unroll
  for (int n = 0; n < Tile::kKeys / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[n][i] = 0.0f;
  }
#pragma unroll
  for (int step = 0; step < Tile::kHeadDim / 16; ++step) {
    uint32_t a[4];
    load_queries<Tile>(a, own_tile, step, 0);
    multiply_step<Tile>(sums, a, other_tile, step, lane);
  }
}

// Replaces S by P and dP by dS. numbers: lse, then delta, of the queries. Only the first `left`
// other rows count; kWhole: all do.
template <class Tile, bool kWhole>
__device__ inline void weigh(float (&p_tile)[Tile::kKeys / 8][4],
                             float (&ds_tile)[Tile::kKeys / 8][4], const float* numbers, int left,
                             float scale_log2, int lane) {
  // The lane is unknown, so that nothing of this is computed, and kept, before the loop.
  left -= static_cast<int>(unknown(threadIdx.x) % 4 * 2);
  // Of queries in rows: of this lane's two rows.
  float origins[2], deltas[2];
  if constexpr (!Tile::kForKeys) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = static_cast<int>(threadIdx.x) / kWarp * 16 + half * 8 + lane / 4;
      origins[half] = numbers[r] * kLog2OfE;
      deltas[half] = numbers[Tile::kRows + r];
    }
  }
#pragma unroll
  for (int n = 0; n < Tile::kKeys / 8; ++n) {
    // Of queries in columns: of these two.
    if constexpr (Tile::kForKeys) {
      const float* of_columns = numbers + n * 8 + lane % 4 * 2;
      const float2 lse = *reinterpret_cast<const float2*>(of_columns);
      const float2 delta = *reinterpret_cast<const float2*>(of_columns + Tile::kKeys);
      origins[0] = lse.x * kLog2OfE;
      origins[1] = lse.y * kLog2OfE;
      deltas[0] = delta.x;
      deltas[1] = delta.y;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int query = Tile::kForKeys ? i % 2 : i / 2;
      float weight = ex2(at_most_zero(fmaf(p_tile[n][i], scale_log2, -origins[query])));
      float slope = weight * (ds_tile[n][i] - deltas[query]);
      if (!kWhole && n * 8 + i % 2 >= left) weight = slope = 0.0f;
      p_tile[n][i] = weight;
      ds_tile[n][i] = slope;
    }
  }
}

// One other tile. kWhole: the tile after it is whole too; only the last two tiles of a block, which
// may be cut, take the checks.
template <class Tile, bool kWhole, class Loader, class Block>
__device__ inline void add_gradients(Gradients<Tile>& sums, Loader& loader, const Block& block,
                                     const typename Tile::T* own_tiles, int begin, float scale_log2,
                                     int lane) {
  using T = typename Tile::T;
  const bool more = kWhole || begin + Tile::kKeys < block.last;
  if (Tile::kForKeys && more) {
    copy_numbers<Tile::kKeys, kWhole>(numbers_of<Tile, Tile::kKeys>(loader.next_stage()), block,
                                      begin + Tile::kKeys, block.last);
  }
  const T* qk_tile = loader.template load_stage<kWhole>(begin);
  const T* gv_tile = qk_tile + Tile::kKeys * Tile::kRow;
  __syncthreads();
  float p_tile[Tile::kKeys / 8][4], ds_tile[Tile::kKeys / 8][4];
  multiply_rows<Tile>(p_tile, own_tiles, qk_tile, lane);
  multiply_rows<Tile>(ds_tile, own_tiles + Tile::kRows * Tile::kRow, gv_tile, lane);
  const float* numbers = Tile::kForKeys ? numbers_of<Tile, Tile::kKeys>(qk_tile)
                                        : numbers_of<Tile, Tile::kRows>(own_tiles);
  weigh<Tile, kWhole>(p_tile, ds_tile, numbers, block.last - begin, scale_log2, lane);
  accumulate<Tile>(sums.dx, ds_tile, qk_tile, lane);
  if constexpr (Tile::kForKeys) accumulate<Tile>(sums.dv, p_tile, gv_tile, lane);
  // The next iteration copies into this stage.
  if (more) __syncthreads();
}

template <class T, class Block, int kColumnTiles>
__device__ inline void write_rows(T* out, const BackwardParams& p, const Block& block,
                                  const float (&sums)[kColumnTiles][4], float factor) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int head_dim = static_cast<int>(p.a.head_dim);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = warp * 16 + half * 8 + lane / 4;
    if (r >= block.rows) continue;
    T* to = out + block.index(p.a, r) * head_dim;
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) {
      const int column = n * 8 + lane % 4 * 2;
      if (column >= head_dim) continue;
      *reinterpret_cast<uint32_t*>(to + column) =
          pack2<T>(sums[n][2 * half] * factor, sums[n][2 * half + 1] * factor);
    }
  }
}

template <class Tile, class Block>
__device__ inline void write_gradients(const BackwardParams& p, const Block& block,
                                       const Gradients<Tile>& sums) {
  using T = typename Tile::T;
  const float scale = p.a.softmax_scale;
  write_rows(static_cast<T*>(Tile::kForKeys ? p.a.dk : p.a.dq), p, block, sums.dx, scale);
  if constexpr (Tile::kForKeys) write_rows(static_cast<T*>(p.a.dv), p, block, sums.dv, 1.0f);
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    block_causal_backward_kernel(const __grid_constant__ BackwardParams p) {
  using T = typename Tile::T;
  const auto find_block = [&](unsigned number) {
    return tile_of_block<T, uint32_t, Tile::kForKeys, Tile::kRows>(p, number);
  };
  const auto block = find_block(blockIdx.x);
  const int head_dim = static_cast<int>(p.a.head_dim), lane = threadIdx.x % kWarp;

  // First copies
  T* own_tiles = dynamic_shared<T>();
  T* stages = own_tiles + Tile::kOwn;
  StageLoader<Tile, RowPairs<T, uint32_t>> loader(stages, block.other, block.last, head_dim);
  copy_rows<Tile>(own_tiles, Tile::kRows, head_dim, [&](int r) {
    return r < block.rows ? block.own.first.row(block.begin + r) : nullptr;
  });
  copy_rows<Tile>(own_tiles + Tile::kRows * Tile::kRow, Tile::kRows, head_dim, [&](int r) {
    return r < block.rows ? block.own.second.row(block.begin + r) : nullptr;
  });
  loader.start(block.first);
  if constexpr (Tile::kForKeys) {
    copy_numbers<Tile::kKeys, false>(numbers_of<Tile, Tile::kKeys>(stages), block, block.first,
                                     block.last);
  } else {
    copy_numbers<Tile::kRows, false>(numbers_of<Tile, Tile::kRows>(own_tiles), block, block.begin,
                                     block.begin + block.rows);
  }
  cp_async_commit();

  // Other tiles
  Gradients<Tile> sums = {};
  int begin = block.first;
  for (; begin + 2 * Tile::kKeys <= block.last; begin += Tile::kKeys) {
    add_gradients<Tile, true>(sums, loader, block, own_tiles, begin, p.scale_log2, lane);
  }
  for (; begin < block.last; begin += Tile::kKeys) {
    add_gradients<Tile, false>(sums, loader, block, own_tiles, begin, p.scale_log2, lane);
  }
  if constexpr (Tile::kFindsAgain) {
    write_gradients(p, find_block(unknown(blockIdx.x)), sums);
  } else {
    write_gradients(p, block, sums);
  }
}

}  // namespace variant::cuda
