// Block-causal attention with the tiles of softmax_tiles.cuh: keys are contiguous, and a query sees
// the keys up to the end of its own scale.
#include "block_causal_attention.h"

#include "launch.h"
#include "softmax_plain.cuh"
#include "softmax_tiles.cuh"

namespace variant::cuda {
namespace {

struct BlockCausalParams {
  BlockCausalForwardArgs a;
  ScaleEnds ends;
  float scale_log2;
  bool negate;
};

template <class T>
struct ContiguousSource {
  const BlockCausalParams& p;
  const T *q, *k, *v;
  int first_query, queries, last;

  __device__ const T* query(int r) const {
    return r < queries ? q + r * p.a.q.token_stride : nullptr;
  }
  // Rows past the tile see the same keys as its last query.
  __device__ int visible(int r) const {
    return r < queries ? p.ends.visible(first_query + r) : last;
  }
  __device__ void locate(int s, const T** k_row, const T** v_row) const {
    *k_row = k + s * p.a.k.token_stride;
    *v_row = v + s * p.a.v.token_stride;
  }
};

// The tile of one block: queries from t on.
struct QueryTile {
  int64_t b, h;
  int t;
};

// The last tiles see the most keys. They get the first blocks, so that all blocks finish together.
template <int kQueries>
__device__ inline QueryTile tile_of_block(const BlockCausalForwardArgs& a) {
  const unsigned heads = static_cast<unsigned>(a.heads);
  const unsigned sequences = static_cast<unsigned>(a.batch) * heads;
  const unsigned tiles = static_cast<unsigned>(ceil_div(a.length, kQueries));
  const unsigned sequence = blockIdx.x % sequences, number = tiles - 1 - blockIdx.x / sequences;
  return {sequence / heads, sequence % heads, static_cast<int>(number) * kQueries};
}

template <class T, int kQueries>
__device__ inline ContiguousSource<T> source_of(const BlockCausalParams& p, QueryTile tile) {
  const BlockCausalForwardArgs& a = p.a;
  const int left = static_cast<int>(a.length) - tile.t;
  const int queries = left < kQueries ? left : kQueries;
  return {p,
          row<T>(a.q, tile.b, tile.t, tile.h),
          row<T>(a.k, tile.b, 0, tile.h),
          row<T>(a.v, tile.b, 0, tile.h),
          tile.t,
          queries,
          p.ends.visible(tile.t + queries - 1)};
}

constexpr float kLog2 = 0.6931471805599453f;

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads)
    block_causal_attention_kernel(const __grid_constant__ BlockCausalParams p) {
  using T = typename Tile::T;
  const BlockCausalForwardArgs& a = p.a;
  const QueryTile tile = tile_of_block<Tile::kQueries>(a);
  const auto source = source_of<T, Tile::kQueries>(p, tile);
  const int head_dim = static_cast<int>(a.head_dim);
  SoftmaxState<Tile> state;
  attend_tile<Tile>(dynamic_shared<T>(), source, 0, source.last, head_dim, p.scale_log2, p.negate,
                    state);
  T* out = static_cast<T*>(a.out);
  write_tile<Tile>(state, source.queries, head_dim,
                   [&](int r, int column, float first, float second) {
                     const int64_t index = (tile.b * a.length + tile.t + r) * a.heads + tile.h;
                     T* to = out + index * a.head_dim + column;
                     *reinterpret_cast<uint32_t*>(to) = pack2<T>(first, second);
                   });
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = static_cast<int>(threadIdx.x) / kWarp * 16 + half * 8 + lane / 4;
    if (lane % 4 != 0 || r >= source.queries) continue;
    a.lse[(tile.b * a.heads + tile.h) * a.length + tile.t + r] =
        (state.largest[half] * p.scale_log2 + log2f(state.total[half])) * kLog2;
  }
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads)
    block_causal_attention_plain_kernel(const __grid_constant__ BlockCausalParams p) {
  using T = typename Tile::T;
  const BlockCausalForwardArgs& a = p.a;
  const QueryTile tile = tile_of_block<Tile::kQueries>(a);
  const auto source = source_of<T, Tile::kQueries>(p, tile);
  const int head_dim = static_cast<int>(a.head_dim);
  PlainState<Tile> state;
  attend_plain<Tile>(dynamic_shared<float>(), source, 0, source.last, head_dim, p.scale_log2,
                     p.negate, state);
  write_plain<Tile>(state, source.queries, head_dim, [&](int r, int column, float value) {
    const int64_t index = (tile.b * a.length + tile.t + r) * a.heads + tile.h;
    static_cast<T*>(a.out)[index * a.head_dim + column] = narrow<T>(value);
  });
#pragma unroll
  for (int i = 0; i < Tile::kPerWarp; ++i) {
    const int r = static_cast<int>(threadIdx.x) / kWarp * Tile::kPerWarp + i;
    if (threadIdx.x % kWarp != 0 || r >= source.queries) continue;
    a.lse[(tile.b * a.heads + tile.h) * a.length + tile.t + r] =
        (state.largest[i] * p.scale_log2 + log2f(state.total[i])) * kLog2;
  }
}

template <class Tile, class Kernel>
int launch_tiles(Kernel kernel, const BlockCausalParams& p, void* stream) {
  const int64_t blocks = ceil_div(p.a.length, Tile::kQueries) * p.a.heads * p.a.batch;
  return launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(Tile::kThreads),
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
    if (is_aligned(a.q, 2) && is_aligned(a.k, 2) && is_aligned(a.v, 2)) {
      return d <= 32    ? launch_width<T, 32, 64>(p, stream)
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

int forward(const BlockCausalForwardArgs& a, void* stream) {
  BlockCausalParams p = {};
  p.a = a;
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
  return variant::cuda::forward(*args, stream);
}
