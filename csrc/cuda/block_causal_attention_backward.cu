// Gradients of block-causal attention, without atomics: one kernel loops over the queries for each
// tile of keys (dk, dv), the other over the keys for each tile of queries (dq); both recompute the
// scores (FlashAttention-2, arXiv 2307.08691). A block owns one tile and reads all other tiles that
// meet it; `qk` is a tile of queries or keys, `gv` one of grad_out or values:
//   S = own_qk other_qk^T,  P = exp(softmax_scale S - lse)
//   dP = own_gv other_gv^T,  dS = P (dP - delta)
// Exponents of P end at 0, because no probability exceeds 1: lse keeps 24 bits, and from 2^31 on
// its rounding error may exceed the range of 2^x.
//   a tile of keys:     own = k, v; other = q, grad_out;  dk = softmax_scale dS other_qk,
//                                                         dv = P other_gv
//   a tile of queries:  own = q, grad_out; other = k, v;  dq = softmax_scale dS other_qk
#include <type_traits>

#include "block_causal_attention.h"
#include "launch.h"
#include "softmax_plain.cuh"
#include "softmax_tiles.cuh"

namespace variant::cuda {
namespace {

constexpr float kLog2OfE = 1.4426950408889634f;

struct BackwardParams {
  BlockCausalBackwardArgs a;
  float* delta;
  ScaleEnds ends;
};

// The rows of one head, by token.
template <class T>
struct HeadRows {
  const T* data;
  int64_t stride;

  __device__ const T* row(int64_t t) const { return data + t * stride; }
};
template <class T>
__device__ inline HeadRows<T> rows_of_head(const HeadView& x, int64_t b, int64_t h) {
  return {row<T>(x, b, 0, h), x.token_stride};
}

// The tile of one block: rows [begin, begin + rows), which meet [first, last).
template <class T>
struct BackwardBlock {
  int64_t b, h;
  int begin, rows, first, last;
  HeadRows<T> own_qk, own_gv, other_qk, other_gv;
  const float *lse, *delta;
};

template <class T, bool kForKeys, int kRows>
__device__ inline BackwardBlock<T> tile_of_block(const BackwardParams& p) {
  const BlockCausalBackwardArgs& a = p.a;
  const unsigned heads = static_cast<unsigned>(a.heads);
  const unsigned sequences = static_cast<unsigned>(a.batch) * heads;
  const unsigned tiles = static_cast<unsigned>(ceil_div(a.length, kRows));
  const unsigned sequence = blockIdx.x % sequences, turn = blockIdx.x / sequences;
  BackwardBlock<T> block;
  block.b = sequence / heads;
  block.h = sequence % heads;
  // The longest tiles first: early keys meet the most queries, late queries the most keys.
  block.begin = static_cast<int>(kForKeys ? turn : tiles - 1 - turn) * kRows;
  const int left = static_cast<int>(a.length) - block.begin;
  block.rows = left < kRows ? left : kRows;
  block.first = kForKeys ? p.ends.begin(block.begin) : 0;
  block.last = kForKeys ? static_cast<int>(a.length) : p.ends.visible(block.begin + block.rows - 1);
  block.own_qk = rows_of_head<T>(kForKeys ? a.k : a.q, block.b, block.h);
  block.own_gv = rows_of_head<T>(kForKeys ? a.v : a.grad_out, block.b, block.h);
  block.other_qk = rows_of_head<T>(kForKeys ? a.q : a.k, block.b, block.h);
  block.other_gv = rows_of_head<T>(kForKeys ? a.grad_out : a.v, block.b, block.h);
  const int64_t first_row = (block.b * a.heads + block.h) * a.length;
  block.lse = a.lse + first_row;
  block.delta = p.delta + first_row;
  return block;
}

// Whether the query sees the key and both are inside their tiles. x and y: rows of own and other.
template <bool kForKeys, class Block>
__device__ inline bool sees(const BackwardParams& p, const Block& block, int x, int y) {
  if (x >= block.begin + block.rows || y >= block.last) return false;
  return kForKeys ? x < p.ends.visible(y) : y < p.ends.visible(x);
}

// --- on tensor cores ----------------------------------------------------------------------------

// A warp owns 16 rows of the own tiles; other tiles of kOtherRows rows are copied in two stages.
template <class T_, int kHeadDim_, int kOtherRows_>
struct BackwardTile {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_, kOtherRows = kOtherRows_;
  static constexpr int kWarps = 4, kThreads = kWarps * kWarp, kRows = 16 * kWarps;
  static constexpr int kRow = kHeadDim + kRowPadding;
  static constexpr int kStage = 2 * kOtherRows * kRow;
  static constexpr int kSharedBytes = (2 * kRows * kRow + 2 * kStage) * 2;
};

template <class Tile, class Block>
__device__ inline void copy_other(typename Tile::T* stage, const Block& block, int first,
                                  int head_dim) {
  copy_rows<Tile>(stage, Tile::kOtherRows, head_dim, [&](int r) {
    return first + r < block.last ? block.other_qk.row(first + r) : nullptr;
  });
  copy_rows<Tile>(stage + Tile::kOtherRows * Tile::kRow, Tile::kOtherRows, head_dim, [&](int r) {
    return first + r < block.last ? block.other_gv.row(first + r) : nullptr;
  });
}

// The two products below repeat multiply_step and accumulate of softmax_tiles.cuh: with those, the
// kernel for keys of 128 columns takes another number of registers on sm_90a.

// sums = own other^T for the warp's 16 rows.
template <class Tile>
__device__ inline void multiply_rows(float (&sums)[Tile::kOtherRows / 8][4],
                                     const typename Tile::T* own_tile,
                                     const typename Tile::T* other_tile) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int n = 0; n < Tile::kOtherRows / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[n][i] = 0.0f;
  }
#pragma unroll
  for (int step = 0; step < Tile::kHeadDim / 16; ++step) {
    uint32_t a[4];
    load_queries<Tile>(a, own_tile, step, 0);
#pragma unroll
    for (int n = 0; n < Tile::kOtherRows / 8; n += 2) {
      const int r = n * 8 + lane / 16 * 8 + lane % 8, column = step * 16 + lane / 8 % 2 * 8;
      uint32_t b[4];
      ldmatrix_x4(b, other_tile + r * Tile::kRow + column);
      const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
      mma_m16n8k16<typename Tile::T>(sums[n], a, low);
      mma_m16n8k16<typename Tile::T>(sums[n + 1], a, high);
    }
  }
}

// out += W other, with W the warp's 16 x kOtherRows weights.
template <class Tile>
__device__ inline void add_weighted(float (&out)[Tile::kHeadDim / 8][4],
                                    const float (&weights)[Tile::kOtherRows / 8][4],
                                    const typename Tile::T* other_tile) {
  using T = typename Tile::T;
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int step = 0; step < Tile::kOtherRows / 16; ++step) {
    const float* first_half = weights[2 * step];
    const float* other_half = weights[2 * step + 1];
    const uint32_t a[4] = {
        pack2<T>(first_half[0], first_half[1]), pack2<T>(first_half[2], first_half[3]),
        pack2<T>(other_half[0], other_half[1]), pack2<T>(other_half[2], other_half[3])};
#pragma unroll
    for (int n = 0; n < Tile::kHeadDim / 8; n += 2) {
      const int r = step * 16 + lane % 16, column = n * 8 + lane / 16 * 8;
      uint32_t b[4];
      ldmatrix_x4_trans(b, other_tile + r * Tile::kRow + column);
      const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
      mma_m16n8k16<T>(out[n], a, low);
      mma_m16n8k16<T>(out[n + 1], a, high);
    }
  }
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
    T* to = out + ((block.b * p.a.length + block.begin + r) * p.a.heads + block.h) * head_dim;
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) {
      const int column = n * 8 + lane % 4 * 2;
      if (column >= head_dim) continue;
      *reinterpret_cast<uint32_t*>(to + column) =
          pack2<T>(sums[n][2 * half] * factor, sums[n][2 * half + 1] * factor);
    }
  }
}

template <class Tile, bool kForKeys>
__global__ void __launch_bounds__(Tile::kThreads)
    block_causal_backward_kernel(const __grid_constant__ BackwardParams p) {
  using T = typename Tile::T;
  constexpr int kTiles = Tile::kOtherRows / 8, kColumnTiles = Tile::kHeadDim / 8;
  const BlockCausalBackwardArgs& a = p.a;
  const BackwardBlock<T> block = tile_of_block<T, kForKeys, Tile::kRows>(p);
  const int head_dim = static_cast<int>(a.head_dim);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const float scale_log2 = a.softmax_scale * kLog2OfE;
  T* own_qk_tile = dynamic_shared<T>();
  T* own_gv_tile = own_qk_tile + Tile::kRows * Tile::kRow;
  T* stages = own_gv_tile + Tile::kRows * Tile::kRow;

  float dx[kColumnTiles][4] = {};
  float dv[kForKeys ? kColumnTiles : 1][4] = {};
  copy_rows<Tile>(own_qk_tile, Tile::kRows, head_dim, [&](int r) {
    return r < block.rows ? block.own_qk.row(block.begin + r) : nullptr;
  });
  copy_rows<Tile>(own_gv_tile, Tile::kRows, head_dim, [&](int r) {
    return r < block.rows ? block.own_gv.row(block.begin + r) : nullptr;
  });
  copy_other<Tile>(stages, block, block.first, head_dim);
  cp_async_commit();
  int stage = 0;
  for (int begin = block.first; begin < block.last; begin += Tile::kOtherRows, stage ^= 1) {
    const bool more = begin + Tile::kOtherRows < block.last;
    if (more) {
      copy_other<Tile>(stages + (stage ^ 1) * Tile::kStage, block, begin + Tile::kOtherRows,
                       head_dim);
      cp_async_commit();
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    __syncthreads();
    const T* other_qk_tile = stages + stage * Tile::kStage;
    const T* other_gv_tile = other_qk_tile + Tile::kOtherRows * Tile::kRow;
    float p_tile[kTiles][4], ds_tile[kTiles][4];
    multiply_rows<Tile>(p_tile, own_qk_tile, other_qk_tile);
    multiply_rows<Tile>(ds_tile, own_gv_tile, other_gv_tile);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int x = block.begin + warp * 16 + i / 2 * 8 + lane / 4;
        const int y = begin + n * 8 + lane % 4 * 2 + i % 2;
        const int query = kForKeys ? y : x;
        float weight = 0.0f, slope = 0.0f;
        if (sees<kForKeys>(p, block, x, y)) {
          const float origin = block.lse[query] * kLog2OfE;
          weight = ex2(at_most_zero(fmaf(p_tile[n][i], scale_log2, -origin)));
          slope = weight * (ds_tile[n][i] - block.delta[query]);
        }
        p_tile[n][i] = weight;
        ds_tile[n][i] = slope;
      }
    }
    add_weighted<Tile>(dx, ds_tile, other_qk_tile);
    if constexpr (kForKeys) add_weighted<Tile>(dv, p_tile, other_gv_tile);
    // The next iteration copies into this stage.
    if (more) __syncthreads();
  }
  write_rows(static_cast<T*>(kForKeys ? a.dk : a.dq), p, block, dx, a.softmax_scale);
  if constexpr (kForKeys) write_rows(static_cast<T*>(a.dv), p, block, dv, 1.0f);
}

// --- plain products: float32, wide heads, rows off a boundary of 16 bytes -----------------------

template <class Tile, bool kForKeys>
__global__ void __launch_bounds__(Tile::kThreads)
    block_causal_backward_plain_kernel(const __grid_constant__ BackwardParams p) {
  using T = typename Tile::T;
  constexpr int kRows = Tile::kQueries, kOtherRows = Tile::kKeys;
  const BlockCausalBackwardArgs& a = p.a;
  const BackwardBlock<T> block = tile_of_block<T, kForKeys, kRows>(p);
  const int head_dim = static_cast<int>(a.head_dim);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  float* own_qk_tile = dynamic_shared<float>();
  float* own_gv_tile = own_qk_tile + kRows * Tile::kRow;
  float* other_qk_tile = own_gv_tile + kRows * Tile::kRow;
  float* other_gv_tile = other_qk_tile + kOtherRows * Tile::kRow;
  float dx[Tile::kPerWarp][Tile::kColumns] = {};
  float dv[Tile::kPerWarp][Tile::kColumns] = {};
  widen_rows<Tile>(own_qk_tile, kRows, head_dim, [&](int r) {
    return r < block.rows ? block.own_qk.row(block.begin + r) : nullptr;
  });
  widen_rows<Tile>(own_gv_tile, kRows, head_dim, [&](int r) {
    return r < block.rows ? block.own_gv.row(block.begin + r) : nullptr;
  });
  for (int begin = block.first; begin < block.last; begin += kOtherRows) {
    widen_rows<Tile>(other_qk_tile, kOtherRows, head_dim, [&](int r) {
      return begin + r < block.last ? block.other_qk.row(begin + r) : nullptr;
    });
    widen_rows<Tile>(other_gv_tile, kOtherRows, head_dim, [&](int r) {
      return begin + r < block.last ? block.other_gv.row(begin + r) : nullptr;
    });
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
      const int x = block.begin + warp * Tile::kPerWarp + i, y = begin + lane;
      const int query = kForKeys ? y : x;
      weights[i] = slopes[i] = 0.0f;
      if (sees<kForKeys>(p, block, x, y)) {
        weights[i] = expf(at_most_zero(fmaf(score, a.softmax_scale, -block.lse[query])));
        slopes[i] = weights[i] * (product - block.delta[query]);
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
    const int64_t to = ((block.b * a.length + block.begin + r) * a.heads + block.h) * a.head_dim;
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

// --- launches -----------------------------------------------------------------------------------

constexpr int kDeltaThreads = 128;

// delta = sum over D of grad_out * out; a warp for each row.
template <class T>
__global__ void __launch_bounds__(kDeltaThreads)
    block_causal_delta_kernel(BlockCausalBackwardArgs a, float* delta) {
  const int lane = threadIdx.x % kWarp;
  const int64_t r = int64_t{blockIdx.x} * (kDeltaThreads / kWarp) + threadIdx.x / kWarp;
  if (r >= a.batch * a.heads * a.length) return;
  const int64_t t = r % a.length, h = r / a.length % a.heads, b = r / a.length / a.heads;
  const T *grad = row<T>(a.grad_out, b, t, h), *out = row<T>(a.out, b, t, h);
  float sum = 0.0f;
  for (int64_t d = lane; d < a.head_dim; d += kWarp) sum += widen(grad[d]) * widen(out[d]);
  sum = reduce_lanes<kWarp>(sum, Plus());
  if (lane == 0) delta[r] = sum;
}

template <class Kernel>
int launch_tiles(Kernel kernel, int rows, int threads, int shared_bytes, const BackwardParams& p,
                 void* stream) {
  const int64_t blocks = ceil_div(p.a.length, rows) * p.a.heads * p.a.batch;
  return launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(threads), shared_bytes, stream,
                p);
}

template <class T, int kHeadDim, int kOtherRows>
int launch_width(const BackwardParams& p, void* stream) {
  using Tile = BackwardTile<T, kHeadDim, kOtherRows>;
  const int error = launch_tiles(block_causal_backward_kernel<Tile, true>, Tile::kRows,
                                 Tile::kThreads, Tile::kSharedBytes, p, stream);
  if (error != 0) return error;
  return launch_tiles(block_causal_backward_kernel<Tile, false>, Tile::kRows, Tile::kThreads,
                      Tile::kSharedBytes, p, stream);
}

template <class T, int kColumns>
int launch_plain(const BackwardParams& p, void* stream) {
  using Tile = PlainTile<T, kColumns>;
  constexpr int kSharedBytes = 2 * (Tile::kQueries + Tile::kKeys) * Tile::kRow * 4;
  const int error = launch_tiles(block_causal_backward_plain_kernel<Tile, true>, Tile::kQueries,
                                 Tile::kThreads, kSharedBytes, p, stream);
  if (error != 0) return error;
  return launch_tiles(block_causal_backward_plain_kernel<Tile, false>, Tile::kQueries,
                      Tile::kThreads, kSharedBytes, p, stream);
}

template <class T>
int differentiate(const BackwardParams& p, void* stream) {
  const BlockCausalBackwardArgs& a = p.a;
  const int64_t rows = a.batch * a.heads * a.length;
  const int error = launch(block_causal_delta_kernel<T>,
                           dim3(static_cast<unsigned>(ceil_div(rows, kDeltaThreads / kWarp))),
                           dim3(kDeltaThreads), 0, stream, a, p.delta);
  if (error != 0) return error;
  const int64_t d = a.head_dim;
  if constexpr (sizeof(T) == 2) {
    if (d <= 128 && is_aligned(a.q, 2) && is_aligned(a.k, 2) && is_aligned(a.v, 2) &&
        is_aligned(a.grad_out, 2)) {
      return d <= 32   ? launch_width<T, 32, 32>(p, stream)
             : d <= 64 ? launch_width<T, 64, 32>(p, stream)
             : d <= 96 ? launch_width<T, 96, 16>(p, stream)
                       : launch_width<T, 128, 16>(p, stream);
    }
  }
  return d <= 64    ? launch_plain<T, 2>(p, stream)
         : d <= 128 ? launch_plain<T, 4>(p, stream)
                    : launch_plain<T, 8>(p, stream);
}

int backward(const BlockCausalBackwardCudaArgs& all, void* stream) {
  BackwardParams p = {};
  p.a = all.op;
  p.delta = all.delta;
  if (!p.ends.set(p.a.scale_lengths, p.a.num_scales, p.a.length)) return kInvalidValue;
  switch (p.a.dtype) {
    case DType::kFloat32:
      return differentiate<float>(p, stream);
    case DType::kBFloat16:
      return differentiate<BF16>(p, stream);
    default:
      return differentiate<Half>(p, stream);
  }
}

}  // namespace
}  // namespace variant::cuda

// scale_lengths lies in host memory and is read before this returns.
VARIANT_CUDA_API int variant_cuda_block_causal_attention_backward(
    const variant::cuda::BlockCausalBackwardCudaArgs* args, int64_t args_bytes, int device,
    void* stream) {
  if (args_bytes != sizeof(*args)) return variant::cuda::kInvalidValue;
  const variant::DeviceGuard guard(device);
  return variant::cuda::backward(*args, stream);
}
