// Block-causal attention with the tiles of softmax_tiles.cuh: keys are contiguous, and a query sees
// the keys up to the end of its own scale. Tiles of queries are cut at the ends of scales.
#include "block_causal_attention.h"

#include "launch.h"
#include "softmax_plain.cuh"
#include "softmax_tiles.cuh"
#include "tile_order.h"

namespace variant::cuda {
namespace {

struct BlockCausalParams {
  BlockCausalForwardArgs a;
  ScaleEnds ends;
  TileOrder order;
  int64_t cache_bytes;  // of the device's L2
  float scale_log2;
  bool negate;
};

// The queries of one tile and all keys that they see.
template <class T, class Step>
struct ContiguousSource : RowPairs<T, Step> {
  HeadRows<T, Step> q;
  int queries, last;

  __device__ const T* query(int r) const { return r < queries ? q.row(r) : nullptr; }
};

// The tile of one block.
struct QueryTile {
  int64_t b, h;
  ScaleTile tokens;

  // The index of row r in (B, L, H) and in (B, H, L).
  __device__ int64_t row(const BlockCausalForwardArgs& a, int r) const {
    return (b * a.length + tokens.begin + r) * a.heads + h;
  }
  __device__ int64_t lse(const BlockCausalForwardArgs& a, int r) const {
    return (b * a.heads + h) * a.length + tokens.begin + r;
  }
};

template <int kQueries>
__device__ inline QueryTile tile_of_block(const BlockCausalParams& p, unsigned block) {
  const TilePlace place = p.order.place(block);
  const unsigned heads = static_cast<unsigned>(p.a.heads);
  return {place.head / heads, place.head % heads,
          p.ends.tile<kQueries>(static_cast<int>(place.tile))};
}

template <class T, class Step>
__device__ inline ContiguousSource<T, Step> source_of(const BlockCausalParams& p,
                                                      const QueryTile& tile) {
  HeadRows<T, Step> q = rows_of_head<T, Step>(p.a.q, tile.b, tile.h);
  q.data = q.row(tile.tokens.begin);
  return {
      {rows_of_head<T, Step>(p.a.k, tile.b, tile.h), rows_of_head<T, Step>(p.a.v, tile.b, tile.h)},
      q,
      tile.tokens.rows,
      tile.tokens.scale_end};
}

constexpr float kLog2 = 0.6931471805599453f;

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    block_causal_attention_kernel(const __grid_constant__ BlockCausalParams p) {
  using T = typename Tile::T;
  const BlockCausalForwardArgs& a = p.a;
  const auto source = source_of<T, uint32_t>(p, tile_of_block<Tile::kQueries>(p, blockIdx.x));
  const int head_dim = static_cast<int>(a.head_dim);
  SoftmaxState<Tile> state;
  attend_tile<Tile>(dynamic_shared<T>(), source, 0, source.last, head_dim, p.scale_log2, p.negate,
                    state);
  // Computed again, because during the loop its numbers would take registers.
  const QueryTile tile = tile_of_block<Tile::kQueries>(p, unknown(blockIdx.x));
  T* out = static_cast<T*>(a.out);
  write_tile<Tile>(state, tile.tokens.rows, head_dim,
                   [&](int r, int column, float first, float second) {
                     T* to = out + tile.row(a, r) * a.head_dim + column;
                     *reinterpret_cast<uint32_t*>(to) = pack2<T>(first, second);
                   });
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = static_cast<int>(threadIdx.x) / kWarp * 16 + half * 8 + lane / 4;
    if (lane % 4 != 0 || r >= tile.tokens.rows) continue;
    a.lse[tile.lse(a, r)] = (state.largest[half] * p.scale_log2 + log2f(state.total[half])) * kLog2;
  }
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads)
    block_causal_attention_plain_kernel(const __grid_constant__ BlockCausalParams p) {
  using T = typename Tile::T;
  const BlockCausalForwardArgs& a = p.a;
  const QueryTile tile = tile_of_block<Tile::kQueries>(p, blockIdx.x);
  const auto source = source_of<T, int64_t>(p, tile);
  const int head_dim = static_cast<int>(a.head_dim);
  PlainState<Tile> state;
  attend_plain<Tile>(dynamic_shared<float>(), source, 0, source.last, head_dim, p.scale_log2,
                     p.negate, state);
  write_plain<Tile>(state, source.queries, head_dim, [&](int r, int column, float value) {
    static_cast<T*>(a.out)[tile.row(a, r) * a.head_dim + column] = narrow<T>(value);
  });
#pragma unroll
  for (int i = 0; i < Tile::kPerWarp; ++i) {
    const int r = static_cast<int>(threadIdx.x) / kWarp * Tile::kPerWarp + i;
    if (threadIdx.x % kWarp != 0 || r >= source.queries) continue;
    a.lse[tile.lse(a, r)] = (state.largest[i] * p.scale_log2 + log2f(state.total[i])) * kLog2;
  }
}

template <class Tile, class Kernel>
int launch_tiles(Kernel kernel, BlockCausalParams p, void* stream) {
  const int64_t heads = p.a.batch * p.a.heads;
  const int64_t bytes_of_head = 2 * p.a.length * p.a.head_dim * bytes_of(p.a.dtype);
  p.order = {static_cast<unsigned>(heads), static_cast<unsigned>(p.ends.tiles(Tile::kQueries)),
             heads_that_fit(heads, bytes_of_head, p.cache_bytes), true};
  return launch(kernel, dim3(p.order.heads * p.order.tiles), dim3(Tile::kThreads),
                Tile::kSharedBytes, stream, p);
}

template <class T, int kHeadDim, int kKeys>
int launch_width(const BlockCausalParams& p, void* stream) {
  using Tile = SoftmaxTile<T, kHeadDim, kKeys, 4>;
  return launch_tiles<Tile>(block_causal_attention_kernel<Tile>, p, stream);
}

template <class T, int kColumns>
int launch_plain(const BlockCausalParams& p, void* stream) {
  using Tile = PlainTile<T, kColumns>;
  return launch_tiles<Tile>(block_causal_attention_plain_kernel<Tile>, p, stream);
}

template <class T>
int attend(const BlockCausalParams& p, void* stream) {
  const BlockCausalForwardArgs& a = p.a;
  const int64_t d = a.head_dim;
  if constexpr (sizeof(T) == 2) {
    if (fits_tiles(a.q) && fits_tiles(a.k) && fits_tiles(a.v)) {
      return d <= 32    ? launch_width<T, 32, 32>(p, stream)
             : d <= 64  ? launch_width<T, 64, 64>(p, stream)
             : d <= 96  ? launch_width<T, 96, 32>(p, stream)
             : d <= 128 ? launch_width<T, 128, 32>(p, stream)
                        : launch_width<T, 256, 16>(p, stream);
    }
  }
  return d <= 64    ? launch_plain<T, 2>(p, stream)
         : d <= 128 ? launch_plain<T, 4>(p, stream)
                    : launch_plain<T, 8>(p, stream);
}

int forward(const BlockCausalForwardArgs& a, int device, void* stream) {
  BlockCausalParams p = {};
  p.a = a;
  p.cache_bytes = l2_bytes(device);
  if (!p.ends.set(a.scale_lengths, a.num_scales, a.length)) return kInvalidValue;
  p.negate = a.softmax_scale < 0.0f;
  // A scale of zero would turn masked scores of -inf into NaN; 1e-30 gives the results of zero
  // without that.
  const float size = p.negate ? -a.softmax_scale : a.softmax_scale;
  p.scale_log2 = (size > 1e-30f ? size : 1e-30f) * 1.4426950408889634f;
  switch (a.dtype) {
    case DType::kFloat32:
      return attend<float>(p, stream);
    case DType::kBFloat16:
      return attend<BF16>(p, stream);
    default:
      return attend<Half>(p, stream);
  }
}

}  // namespace
}  // namespace variant::cuda

// scale_lengths lies in host memory and is read before this returns.
VARIANT_CUDA_API int variant_cuda_block_causal_attention_forward(
    const variant::BlockCausalForwardArgs* args, int64_t args_bytes, int device, void* stream) {
  if (args_bytes != sizeof(*args)) return variant::cuda::kInvalidValue;
  const variant::DeviceGuard guard(device);
  return variant::cuda::forward(*args, device, stream);
}
