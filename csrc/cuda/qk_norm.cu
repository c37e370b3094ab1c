// L2 norm of queries and keys: a few lanes for each (token, head).
#include "qk_norm.h"

#include <type_traits>

#include "launch.h"
#include "qk_norm_row.cuh"

namespace variant::cuda {
namespace {

template <class T, int kLanes, bool kAligned>
__global__ void __launch_bounds__(kRowThreads) qk_norm_forward_kernel(QkNormForwardArgs a) {
  const int64_t column = threadIdx.x % kLanes * kEight;
  const RowIndex index = index_of_row<kLanes>(a);
  const int64_t r = index.r, b = index.b, t = index.t, h = index.h;
  // Lanes without work also call the reductions.
  const bool works = index.inside && column < a.head_dim;
  float q[kEight] = {}, k[kEight] = {};
  float factor = 0.0f;
  if (works) {
    load_eight<kAligned>(row<T>(a.q, b, t, h) + column, q);
    load_eight<kAligned>(row<T>(a.k, b, t, h) + column, k);
    factor = query_factor(a.scale_mul, h);
  }
  normalise<T, kLanes>(q, factor);
  normalise<T, kLanes>(k, 1.0f);
  if (!works) return;
  const int64_t out = r * a.head_dim + column;
  store_eight<true>(static_cast<T*>(a.q_out) + out, q);
  store_eight<true>(static_cast<T*>(a.k_out) + out, k);
}

// With u = x / |x|:  dx = factor * (g - u * (g . u)) / |x|. Where the norm was clamped to eps the
// divisor is a constant:  dx = factor * g / eps. x becomes dx. Returns g . (x / divisor).
template <int kLanes>
__device__ inline float backward_row(const float (&g)[kEight], float (&x)[kEight], float factor) {
  const float norm = norm_of<kLanes>(x);
  const bool clamped = norm < kQkNormEps;
  const float divisor = clamped ? kQkNormEps : norm;
  float products = 0.0f;
#pragma unroll
  for (int i = 0; i < kEight; ++i) {
    x[i] /= divisor;
    products += g[i] * x[i];
  }
  const float dot = reduce_lanes<kLanes>(products, Plus());
  const float along = clamped ? 0.0f : dot;
#pragma unroll
  for (int i = 0; i < kEight; ++i) x[i] = (g[i] - x[i] * along) * factor / divisor;
  return dot;
}

// A block processes one head of a piece of the tokens; its groups of lanes take the tokens in turn.
template <class T, int kLanes, bool kAligned>
__global__ void __launch_bounds__(kRowThreads) qk_norm_backward_kernel(QkNormBackwardCudaArgs all) {
  constexpr int kGroups = kRowThreads / kLanes;
  __shared__ float dots[kGroups];
  const QkNormBackwardArgs& a = all.op;
  const int64_t h = blockIdx.x % a.heads, piece = blockIdx.x / a.heads;
  const int64_t rows = a.batch * a.tokens;
  const int64_t begin = piece * kQkNormTokensPerPiece;
  const int64_t column = threadIdx.x % kLanes * kEight;
  const int group = threadIdx.x / kLanes;
  const float factor = query_factor(a.scale_mul, h);
  float sum = 0.0f;
  for (int64_t i = 0; i < kQkNormTokensPerPiece; i += kGroups) {
    const int64_t token = begin + i + group;
    const bool works = i + group < kQkNormTokensPerPiece && token < rows && column < a.head_dim;
    const int64_t b = token / a.tokens, t = token % a.tokens;
    float grad_q[kEight] = {}, grad_k[kEight] = {}, q[kEight] = {}, k[kEight] = {};
    if (works) {
      load_eight<kAligned>(row<T>(a.grad_q, b, t, h) + column, grad_q);
      load_eight<kAligned>(row<T>(a.grad_k, b, t, h) + column, grad_k);
      load_eight<kAligned>(row<T>(a.q, b, t, h) + column, q);
      load_eight<kAligned>(row<T>(a.k, b, t, h) + column, k);
    }
    sum += backward_row<kLanes>(grad_q, q, factor);
    backward_row<kLanes>(grad_k, k, 1.0f);
    if (!works) continue;
    const int64_t out = (token * a.heads + h) * a.head_dim + column;
    store_eight<true>(static_cast<T*>(a.dq) + out, q);
    store_eight<true>(static_cast<T*>(a.dk) + out, k);
  }
  if (threadIdx.x % kLanes == 0) dots[group] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  float total = 0.0f;
  for (int i = 0; i < kGroups; ++i) total += dots[i];
  all.partial[piece * a.heads + h] = total;
}

constexpr int kSumThreads = 64;

// dscale_mul = factor * the sum of the pieces in order; past the clamp nothing.
__global__ void __launch_bounds__(kSumThreads)
    qk_norm_sum_kernel(const float* partial, const float* scale_mul, float* dscale_mul,
                       int64_t pieces, int64_t heads) {
  const int64_t h = int64_t{blockIdx.x} * kSumThreads + threadIdx.x;
  if (h >= heads) return;
  double sum = 0.0;
  for (int64_t piece = 0; piece < pieces; ++piece) sum += partial[piece * heads + h];
  const bool passes = scale_mul[h] <= static_cast<float>(kMaxLogScale);
  dscale_mul[h] = passes ? static_cast<float>(sum * query_factor(scale_mul, h)) : 0.0f;
}

int forward(const QkNormForwardArgs& a, void* stream) {
  const int64_t rows = a.batch * a.tokens * a.heads, bytes = bytes_of(a.dtype);
  if (rows > kMostRows) return kInvalidValue;
  const bool aligned = is_aligned(a.q, bytes) && is_aligned(a.k, bytes);
  return with_type(a.dtype, [&](auto element) {
    using T = decltype(element);
    return with_lanes(a.head_dim, [&](auto lanes) {
      constexpr int kLanes = decltype(lanes)::value;
      const dim3 grid(static_cast<unsigned>(ceil_div(rows, kRowThreads / kLanes)));
      return launch(aligned ? qk_norm_forward_kernel<T, kLanes, true>
                            : qk_norm_forward_kernel<T, kLanes, false>,
                    grid, dim3(kRowThreads), 0, stream, a);
    });
  });
}

int backward(const QkNormBackwardCudaArgs& all, void* stream) {
  const QkNormBackwardArgs& a = all.op;
  const int64_t pieces = ceil_div(a.batch * a.tokens, kQkNormTokensPerPiece);
  const int64_t bytes = bytes_of(a.dtype);
  const bool aligned = is_aligned(a.q, bytes) && is_aligned(a.k, bytes) &&
                       is_aligned(a.grad_q, bytes) && is_aligned(a.grad_k, bytes);
  const int error = with_type(a.dtype, [&](auto element) {
    using T = decltype(element);
    return with_lanes(a.head_dim, [&](auto lanes) {
      constexpr int kLanes = decltype(lanes)::value;
      return launch(aligned ? qk_norm_backward_kernel<T, kLanes, true>
                            : qk_norm_backward_kernel<T, kLanes, false>,
                    dim3(static_cast<unsigned>(pieces * a.heads)), dim3(kRowThreads), 0, stream,
                    all);
    });
  });
  if (error != 0) return error;
  return launch(qk_norm_sum_kernel, dim3(static_cast<unsigned>(ceil_div(a.heads, kSumThreads))),
                dim3(kSumThreads), 0, stream, static_cast<const float*>(all.partial), a.scale_mul,
                a.dscale_mul, pieces, a.heads);
}

}  // namespace
}  // namespace variant::cuda

VARIANT_CUDA_API int variant_cuda_qk_norm_forward(const variant::QkNormForwardArgs* args,
                                                  int64_t args_bytes, int device, void* stream) {
  if (args_bytes != sizeof(*args)) return variant::cuda::kInvalidValue;
  const variant::DeviceGuard guard(device);
  return variant::cuda::forward(*args, stream);
}

VARIANT_CUDA_API int variant_cuda_qk_norm_backward(
    const variant::cuda::QkNormBackwardCudaArgs* args, int64_t args_bytes, int device,
    void* stream) {
  if (args_bytes != sizeof(*args)) return variant::cuda::kInvalidValue;
  const variant::DeviceGuard guard(device);
  return variant::cuda::backward(*args, stream);
}
