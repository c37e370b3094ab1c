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
#include "block_causal_backward_plain.cuh"
#include "block_causal_backward_tiles.cuh"
#include "launch.h"

namespace variant::cuda {
namespace {

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

// keys: a block owns a tile of keys.
template <class Kernel>
int launch_tiles(Kernel kernel, bool keys, int rows, int threads, int shared_bytes,
                 BackwardParams p, void* stream) {
  const int64_t heads = p.a.batch * p.a.heads;
  const int64_t bytes_of_head = 2 * p.a.length * p.a.head_dim * bytes_of(p.a.dtype);
  // Early keys meet the most queries, late queries the most keys.
  p.order = {static_cast<unsigned>(heads), static_cast<unsigned>(p.ends.tiles(rows)),
             heads_that_fit(heads, bytes_of_head, p.cache_bytes), !keys};
  return launch(kernel, dim3(p.order.heads * p.order.tiles), dim3(threads), shared_bytes, stream,
                p);
}

template <class Tile>
int launch_tile(const BackwardParams& p, void* stream) {
  return launch_tiles(block_causal_backward_kernel<Tile>, Tile::kForKeys, Tile::kRows,
                      Tile::kThreads, Tile::kSharedBytes, p, stream);
}

// kQueries, kKeys: the other rows of a tile of keys, and of a tile of queries.
template <class T, int kHeadDim, int kQueries, int kKeys>
int launch_width(const BackwardParams& p, void* stream) {
  const int error = launch_tile<BackwardTile<T, kHeadDim, kQueries, true>>(p, stream);
  if (error != 0) return error;
  return launch_tile<BackwardTile<T, kHeadDim, kKeys, false>>(p, stream);
}

template <class T, int kColumns>
int launch_plain(const BackwardParams& p, void* stream) {
  using Tile = PlainTile<T, kColumns>;
  constexpr int kSharedBytes = 2 * (Tile::kQueries + Tile::kKeys) * Tile::kRow * 4;
  const int error = launch_tiles(block_causal_backward_plain_kernel<Tile, true>, true,
                                 Tile::kQueries, Tile::kThreads, kSharedBytes, p, stream);
  if (error != 0) return error;
  return launch_tiles(block_causal_backward_plain_kernel<Tile, false>, false, Tile::kQueries,
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
    if (d <= 128 && fits_tiles(a.q) && fits_tiles(a.k) && fits_tiles(a.v) &&
        fits_tiles(a.grad_out)) {
      return d <= 32   ? launch_width<T, 32, 32, 16>(p, stream)
             : d <= 64 ? launch_width<T, 64, 32, 16>(p, stream)
             : d <= 96 ? launch_width<T, 96, 16, 16>(p, stream)
                       : launch_width<T, 128, 16, 16>(p, stream);
    }
  }
  return d <= 64    ? launch_plain<T, 2>(p, stream)
         : d <= 128 ? launch_plain<T, 4>(p, stream)
                    : launch_plain<T, 8>(p, stream);
}

int backward(const BlockCausalBackwardCudaArgs& all, int device, void* stream) {
  BackwardParams p = {};
  p.a = all.op;
  p.delta = all.delta;
  p.cache_bytes = l2_bytes(device);
  p.scale_log2 = p.a.softmax_scale * kLog2OfE;
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
  return variant::cuda::backward(*args, device, stream);
}
