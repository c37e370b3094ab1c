// Gradients of block-causal attention with plain products: float32, wide heads, rows off a boundary
// of 16 bytes.
#pragma once

#include "block_causal_backward.cuh"
#include "softmax_plain.cuh"

namespace variant::cuda {

// Shared memory holds four blocks of 128 columns; for a fifth the compiler would spill registers.
template <class Tile>
constexpr int kPlainBlocks = Tile::kColumns == 4 ? 4 : 0;

template <class Tile, bool kForKeys>
__global__ void __launch_bounds__(Tile::kThreads, kPlainBlocks<Tile>)
    block_causal_backward_plain_kernel(const __grid_constant__ BackwardParams p) {
  using T = typename Tile::T;
  constexpr int kRows = Tile::kQueries, kOtherRows = Tile::kKeys;
  const BlockCausalBackwardArgs& a = p.a;
  const auto block = tile_of_block<T, int64_t, kForKeys, kRows>(p, blockIdx.x);
  const int head_dim = static_cast<int>(a.head_dim);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  float* own_qk_tile = dynamic_shared<float>();
  float* own_gv_tile = own_qk_tile + kRows * Tile::kRow;
  float* other_qk_tile = own_gv_tile + kRows * Tile::kRow;
  float* other_gv_tile = other_qk_tile + kOtherRows * Tile::kRow;
  float dx[Tile::kPerWarp][Tile::kColumns] = {};
  float dv[Tile::kPerWarp][Tile::kColumns] = {};
  // Of this lane's row y in turn, or of this warp's own rows.
  float lse[kForKeys ? 1 : Tile::kPerWarp] = {}, delta[kForKeys ? 1 : Tile::kPerWarp] = {};
  if constexpr (!kForKeys) {
#pragma unroll
    for (int i = 0; i < Tile::kPerWarp; ++i) {
      const int r = warp * Tile::kPerWarp + i;
      if (r >= block.rows) continue;
      lse[i] = block.lse[block.begin + r];
      delta[i] = block.delta[block.begin + r];
    }
  }
  widen_rows<Tile>(own_qk_tile, kRows, head_dim, [&](int r) {
    return r < block.rows ? block.own.first.row(block.begin + r) : nullptr;
  });
  widen_rows<Tile>(own_gv_tile, kRows, head_dim, [&](int r) {
    return r < block.rows ? block.own.second.row(block.begin + r) : nullptr;
  });
  for (int begin = block.first; begin < block.last; begin += kOtherRows) {
    widen_rows<Tile>(other_qk_tile, kOtherRows, head_dim, [&](int r) {
      return begin + r < block.last ? block.other.first.row(begin + r) : nullptr;
    });
    widen_rows<Tile>(other_gv_tile, kOtherRows, head_dim, [&](int r) {
      return begin + r < block.last ? block.other.second.row(begin + r) : nullptr;
    });
    const bool there = begin + lane < block.last;
    if (kForKeys && there) {
      lse[0] = block.lse[begin + lane];
      delta[0] = block.delta[begin + lane];
    }
    __syncthreads();
    float weights[Tile::kPerWarp], slopes[Tile::kPerWarp];
#pragma unroll
    for (int i = 0; i < Tile::kPerWarp; ++i) {
      const float* own_qk = own_qk_tile + (warp * Tile::kPerWarp + i) * Tile::kRow;
      const float* own_gv = own_gv_tile + (warp * Tile::kPerWarp + i) * Tile::kRow;
      float score = 0.0f, product = 0.0f;
      for (int d = 0; d < head_dim; ++d) {
        score += own_qk[d] * other_qk_tile[lane * Tile::kRow + d];
        product += own_gv[d] * other_gv_tile[lane * Tile::kRow + d];
      }
      weights[i] = slopes[i] = 0.0f;
      if (there) {
        constexpr bool kOwn = !kForKeys;
        weights[i] = expf(at_most_zero(fmaf(score, a.softmax_scale, -lse[kOwn ? i : 0])));
        slopes[i] = weights[i] * (product - delta[kOwn ? i : 0]);
      }
    }
    // Separate sums for this tile: they are added to the sums of earlier tiles once, which rounds
    // less.
    float dx_part[Tile::kPerWarp][Tile::kColumns] = {};
    float dv_part[Tile::kPerWarp][Tile::kColumns] = {};
    for (int r = 0; r < kOtherRows; ++r) {
      float weight[Tile::kPerWarp], slope[Tile::kPerWarp];
#pragma unroll
      for (int i = 0; i < Tile::kPerWarp; ++i) {
        slope[i] = __shfl_sync(kAllLanes, slopes[i], r);
        if constexpr (kForKeys) weight[i] = __shfl_sync(kAllLanes, weights[i], r);
      }
#pragma unroll
      for (int c = 0; c < Tile::kColumns; ++c) {
        const int at_column = r * Tile::kRow + c * kWarp + lane;
        const float other_qk = other_qk_tile[at_column], other_gv = other_gv_tile[at_column];
#pragma unroll
        for (int i = 0; i < Tile::kPerWarp; ++i) {
          dx_part[i][c] += slope[i] * other_qk;
          if constexpr (kForKeys) dv_part[i][c] += weight[i] * other_gv;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < Tile::kPerWarp; ++i) {
#pragma unroll
      for (int c = 0; c < Tile::kColumns; ++c) {
        dx[i][c] += dx_part[i][c];
        if constexpr (kForKeys) dv[i][c] += dv_part[i][c];
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < Tile::kPerWarp; ++i) {
    const int r = warp * Tile::kPerWarp + i;
    if (r >= block.rows) continue;
    const int64_t to = block.index(a, r) * a.head_dim;
#pragma unroll
    for (int c = 0; c < Tile::kColumns; ++c) {
      const int column = c * kWarp + lane;
      if (column >= head_dim) continue;
      T* dx_out = static_cast<T*>(kForKeys ? a.dk : a.dq);
      dx_out[to + column] = narrow<T>(dx[i][c] * a.softmax_scale);
      if constexpr (kForKeys) static_cast<T*>(a.dv)[to + column] = narrow<T>(dv[i][c]);
    }
  }
}

}  // namespace variant::cuda
