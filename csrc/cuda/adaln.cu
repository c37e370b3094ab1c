// Adaptive layer norm: one block per row in the forward pass, per tile of tokens in the backward
// pass.
#include "adaln.h"

#include <type_traits>

#include "elements.cuh"
#include "launch.h"
#include "primitives.h"
#include "reduce.cuh"

namespace variant::cuda {
namespace {

constexpr int kMostThreads = 512;
constexpr int kMostWarps = kMostThreads / kWarp;

// A thread keeps eight neighbouring columns in registers between passes. It reads them 16 bytes at
// a time (kWide), or one by one if rows are not 16-byte aligned (kNarrow); both have the same order
// of sums, so a view and its copy give the same bits. For widths above 4096 or not divisible by
// eight a thread takes every blockDim.x-th column and reads it again in every pass (kAnew).
constexpr int kWide = 0, kNarrow = 1, kAnew = 2;
template <int kAccess>
constexpr int kColumns = kAccess == kAnew ? 1 : kEight;

template <int kAccess, class F>
__device__ inline void for_columns(int width, const F& f) {
  if constexpr (kAccess != kAnew) {
    const int c = static_cast<int>(threadIdx.x) * kEight;
    if (c < width) f(c);
  } else {
    for (int c = threadIdx.x; c < width; c += blockDim.x) f(c);
  }
}

template <int kAccess, class T, int kCount>
__device__ inline void load_columns(const T* p, float (&x)[kCount]) {
  if constexpr (kCount == kEight) {
    load_eight<kAccess == kWide>(p, x);
  } else {
    x[0] = widen(*p);
  }
}
template <class T, int kCount>
__device__ inline void store_columns(T* p, const float (&x)[kCount]) {
  if constexpr (kCount == kEight) {
    store_eight<true>(p, x);
  } else {
    *p = narrow<T>(x[0]);
  }
}

// y = (x - mean) * rstd * (1 + scale) + shift for one row. first(c, x) reads columns the first
// time, again(c, x) reads them again. The squares are taken around the mean: E[x^2] - E[x]^2 would
// cancel where the mean is large.
template <int kAccess, class T, class First, class Again>
__device__ inline void normalise_row(int width, float eps, const T* scale, const T* shift, T* y,
                                     float* mean_out, float* rstd_out, const First& first,
                                     const Again& again) {
  constexpr int kCount = kColumns<kAccess>;
  __shared__ float scratch[kMostWarps];
  float x[kCount];
  float sum = 0.0f;
  for_columns<kAccess>(width, [&](int c) {
    first(c, x);
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum += x[i];
  });
  const float n = static_cast<float>(width);
  const float mean = reduce_block(sum, scratch, Plus()) / n;
  float squares = 0.0f;
  for_columns<kAccess>(width, [&](int c) {
    if constexpr (kAccess == kAnew) again(c, x);
#pragma unroll
    for (int i = 0; i < kCount; ++i) squares += (x[i] - mean) * (x[i] - mean);
  });
  const float variance = reduce_block(squares, scratch, Plus()) / n;
  const float rstd = 1.0f / sqrtf(variance + eps);
  for_columns<kAccess>(width, [&](int c) {
    if constexpr (kAccess == kAnew) again(c, x);
    float gain[kCount], offset[kCount], out[kCount];
    load_columns<kAccess>(scale + c, gain);
    load_columns<kAccess>(shift + c, offset);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      out[i] = (x[i] - mean) * rstd * (1.0f + gain[i]) + offset[i];
    }
    store_columns(y + c, out);
  });
  if (threadIdx.x == 0) {
    *mean_out = mean;
    *rstd_out = rstd;
  }
}

template <class TX, class T, int kAccess>
__global__ void __launch_bounds__(kMostThreads) adaln_forward_kernel(AdaLNForwardArgs a) {
  const unsigned tokens = static_cast<unsigned>(a.tokens);
  const int64_t r = blockIdx.x, b = blockIdx.x / tokens, t = blockIdx.x % tokens;
  const TX* x_row = row<TX>(a.x, b, t);
  const auto get = [&](int c, float (&x)[kColumns<kAccess>]) {
    load_columns<kAccess>(x_row + c, x);
  };
  normalise_row<kAccess>(static_cast<int>(a.width), a.eps, row<T>(a.scale, b), row<T>(a.shift, b),
                         static_cast<T*>(a.y) + r * a.width, a.mean + r, a.rstd + r, get, get);
}

template <class TX, class T, int kAccess>
__global__ void __launch_bounds__(kMostThreads)
    gated_adaln_forward_kernel(GatedAdaLNForwardArgs a) {
  constexpr int kCount = kColumns<kAccess>;
  const unsigned tokens = static_cast<unsigned>(a.tokens);
  const int64_t r = blockIdx.x, b = blockIdx.x / tokens, t = blockIdx.x % tokens;
  const TX* x_row = row<TX>(a.x, b, t);
  const T* y_row = row<T>(a.y, b, t);
  const T* gate_row = row<T>(a.gate, b);
  TX* out_row = static_cast<TX*>(a.x_out) + r * a.width;
  normalise_row<kAccess>(
      static_cast<int>(a.width), a.eps, row<T>(a.scale, b), row<T>(a.shift, b),
      static_cast<T*>(a.h) + r * a.width, a.mean + r, a.rstd + r,
      [&](int c, float (&x)[kCount]) {
        float y[kCount], gate[kCount];
        load_columns<kAccess>(x_row + c, x);
        load_columns<kAccess>(y_row + c, y);
        load_columns<kAccess>(gate_row + c, gate);
    // Rounded first: the statistics are those of the stored values.
#pragma unroll
        for (int i = 0; i < kCount; ++i) x[i] = widen(narrow<TX>(x[i] + gate[i] * y[i]));
        store_columns(out_row + c, x);
      },
      [&](int c, float (&x)[kCount]) { load_columns<kAccess>(out_row + c, x); });
}

// Two sums at once over the block; every thread gets both.
__device__ inline void reduce_pair(float& first, float& second, float (*scratch)[kMostWarps]) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int warps = blockDim.x / kWarp;
  first = reduce_lanes<kWarp>(first, Plus());
  second = reduce_lanes<kWarp>(second, Plus());
  if (lane == 0) {
    scratch[0][warp] = first;
    scratch[1][warp] = second;
  }
  __syncthreads();
  first = second = 0.0f;
  for (int i = 0; i < warps; ++i) {
    first += scratch[0][i];
    second += scratch[1][i];
  }
  __syncthreads();
}

// Arguments of the backward pass of one tile of tokens; gate null: without the residual.
template <class TX, class T>
struct BackwardTile {
  TokenView grad_h, x, grad_x_out, y;
  const T *scale, *gate;
  const float *mean, *rstd;  // of the image's rows
  TX* grad_x;                // of the image
  T* grad_y;
  float* partial;  // (2 or 3, C) of this tile
  int64_t b, begin, end;
  int width;
};

//   g = grad_h * (1 + scale),  total = rstd * (g - mean(g) - xhat * mean(g * xhat)) [+ grad_x_out]
//   grad_x = total,  grad_y = gate * total
//   grad_scale = sum of grad_h * xhat,  grad_shift = sum of grad_h,  grad_gate = sum of total * y
template <int kAccess, bool kGated, class TX, class T>
__device__ inline void backward_tile(const BackwardTile<TX, T>& a) {
  constexpr int kCount = kColumns<kAccess>, kKinds = kGated ? 3 : 2;
  __shared__ float scratch[2][kMostWarps];
  const float n = static_cast<float>(a.width);
  float sums[kKinds][kCount];
  // Columns held in registers are summed there, others in `partial`.
#pragma unroll
  for (int kind = 0; kind < kKinds; ++kind) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) sums[kind][i] = 0.0f;
    for_columns<kAccess>(a.width, [&](int c) {
      if constexpr (kAccess == kAnew) a.partial[kind * a.width + c] = 0.0f;
    });
  }
  for (int64_t t = a.begin; t < a.end; ++t) {
    const T* grad_h_row = row<T>(a.grad_h, a.b, t);
    const TX* x_row = row<TX>(a.x, a.b, t);
    const float mean = a.mean[t], rstd = a.rstd[t];
    float grad_h[kCount], xhat[kCount], gain[kCount];
    const auto get = [&](int c) {
      load_columns<kAccess>(grad_h_row + c, grad_h);
      load_columns<kAccess>(x_row + c, xhat);
      load_columns<kAccess>(a.scale + c, gain);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        xhat[i] = (xhat[i] - mean) * rstd;
        gain[i] += 1.0f;
      }
    };
    float sum_g = 0.0f, sum_g_xhat = 0.0f;
    for_columns<kAccess>(a.width, [&](int c) {
      get(c);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        sum_g += grad_h[i] * gain[i];
        sum_g_xhat += grad_h[i] * gain[i] * xhat[i];
      }
    });
    reduce_pair(sum_g, sum_g_xhat, scratch);
    const float mean_g = sum_g / n, mean_g_xhat = sum_g_xhat / n;
    for_columns<kAccess>(a.width, [&](int c) {
      if constexpr (kAccess == kAnew) get(c);
      float total[kCount], y[kCount], gate[kCount];
      if constexpr (kGated) {
        load_columns<kAccess>(row<TX>(a.grad_x_out, a.b, t) + c, total);
        load_columns<kAccess>(row<T>(a.y, a.b, t) + c, y);
        load_columns<kAccess>(a.gate + c, gate);
      }
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const float through = (grad_h[i] * gain[i] - mean_g - xhat[i] * mean_g_xhat) * rstd;
        total[i] = kGated ? total[i] + through : through;
        sums[0][i] += grad_h[i] * xhat[i];
        sums[1][i] += grad_h[i];
        if constexpr (kGated) {
          sums[2][i] += total[i] * y[i];
          gate[i] *= total[i];
        }
      }
      store_columns(a.grad_x + t * a.width + c, total);
      if constexpr (kGated) store_columns(a.grad_y + t * a.width + c, gate);
      if constexpr (kAccess == kAnew) {
#pragma unroll
        for (int kind = 0; kind < kKinds; ++kind) {
          a.partial[kind * a.width + c] += sums[kind][0];
          sums[kind][0] = 0.0f;
        }
      }
    });
  }
  if constexpr (kAccess != kAnew) {
    for_columns<kAccess>(a.width, [&](int c) {
#pragma unroll
      for (int kind = 0; kind < kKinds; ++kind) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) a.partial[kind * a.width + c + i] = sums[kind][i];
      }
    });
  }
}

// The tile of one block. grad_h and x: the gradient and the input of the norm. In another
// order of these assignments ptxas takes other registers.
template <bool kGated, class TX, class T, class Args>
__device__ inline BackwardTile<TX, T> tile_of_block(const Args& a, const TokenView& grad_h,
                                                    const TokenView& x, float* partial) {
  const int64_t tiles = ceil_div(a.tokens, kAdaLNTokensPerTile);
  const int64_t b = blockIdx.x / tiles, begin = blockIdx.x % tiles * kAdaLNTokensPerTile;
  const int64_t after = begin + kAdaLNTokensPerTile, first_row = b * a.tokens;
  BackwardTile<TX, T> tile = {};
  tile.grad_h = grad_h;
  tile.x = x;
  if constexpr (kGated) {
    tile.grad_x_out = a.grad_x_out;
    tile.y = a.y;
  }
  tile.scale = row<T>(a.scale, b);
  if constexpr (kGated) tile.gate = row<T>(a.gate, b);
  tile.mean = a.mean + first_row;
  tile.rstd = a.rstd + first_row;
  tile.grad_x = static_cast<TX*>(a.grad_x) + first_row * a.width;
  if constexpr (kGated) tile.grad_y = static_cast<T*>(a.grad_y) + first_row * a.width;
  tile.partial = partial + int64_t{blockIdx.x} * (kGated ? 3 : 2) * a.width;
  tile.b = b;
  tile.begin = begin;
  tile.end = after < a.tokens ? after : a.tokens;
  tile.width = static_cast<int>(a.width);
  return tile;
}

template <class TX, class T, int kAccess>
__global__ void __launch_bounds__(kMostThreads) adaln_backward_kernel(AdaLNBackwardCudaArgs all) {
  const AdaLNBackwardArgs& a = all.op;
  backward_tile<kAccess, false>(tile_of_block<false, TX, T>(a, a.grad_y, a.x, all.partial));
}

template <class TX, class T, int kAccess>
__global__ void __launch_bounds__(kMostThreads)
    gated_adaln_backward_kernel(GatedAdaLNBackwardCudaArgs all) {
  const GatedAdaLNBackwardArgs& a = all.op;
  backward_tile<kAccess, true>(tile_of_block<true, TX, T>(a, a.grad_h, a.x_out, all.partial));
}

constexpr int kSumThreads = 256;

template <class T>
struct SumTargets {
  T* out[3];  // (B, C)
};

// out[kind][b, c] = sum over tiles of partial[b, tile, kind, c], in order.
template <class T>
__global__ void __launch_bounds__(kSumThreads)
    adaln_sum_tiles_kernel(const float* partial, SumTargets<T> targets, int64_t batch,
                           int64_t tiles, int kinds, int64_t width) {
  const int64_t i = int64_t{blockIdx.x} * kSumThreads + threadIdx.x;
  if (i >= batch * width) return;
  const int64_t b = i / width, c = i % width;
  for (int kind = 0; kind < kinds; ++kind) {
    float sum = 0.0f;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      sum += partial[((b * tiles + tile) * kinds + kind) * width + c];
    }
    targets.out[kind][i] = narrow<T>(sum);
  }
}

template <class T>
int sum_tiles(const float* partial, SumTargets<T> targets, int64_t batch, int64_t tokens, int kinds,
              int64_t width, void* stream) {
  return launch(adaln_sum_tiles_kernel<T>,
                dim3(static_cast<unsigned>(ceil_div(batch * width, kSumThreads))),
                dim3(kSumThreads), 0, stream, partial, targets, batch,
                ceil_div(tokens, kAdaLNTokensPerTile), kinds, width);
}

// Threads of a block that holds its columns: eight columns per thread, whole warps.
dim3 threads_for(int64_t width) {
  return dim3(static_cast<unsigned>(ceil_div(ceil_div(width, kEight), kWarp) * kWarp));
}
bool can_hold(int64_t width) { return width % kEight == 0 && width <= kMostThreads * kEight; }
constexpr unsigned kAnewThreads = 256;

// Calls launch_with(access, threads): a view that is not `aligned` is read element by element.
template <class F>
int with_access(int64_t width, bool aligned, const F& launch_with) {
  if (!can_hold(width))
    return launch_with(std::integral_constant<int, kAnew>(), dim3(kAnewThreads));
  return aligned ? launch_with(std::integral_constant<int, kWide>(), threads_for(width))
                 : launch_with(std::integral_constant<int, kNarrow>(), threads_for(width));
}

// x is float32 or of the values' dtype: calls f(element of x, element of the values).
template <class F>
int with_types(DType x_dtype, DType value_dtype, const F& f) {
  switch (value_dtype) {
    case DType::kFloat32:
      return f(float(), float());
    case DType::kBFloat16:
      return x_dtype == DType::kFloat32 ? f(float(), BF16()) : f(BF16(), BF16());
    default:
      return x_dtype == DType::kFloat32 ? f(float(), Half()) : f(Half(), Half());
  }
}

int forward(const AdaLNForwardArgs& a, void* stream) {
  const int64_t x_bytes = bytes_of(a.x_dtype), bytes = bytes_of(a.value_dtype);
  const bool aligned =
      is_aligned(a.x, x_bytes) && is_aligned(a.scale, bytes) && is_aligned(a.shift, bytes);
  const dim3 grid(static_cast<unsigned>(a.batch * a.tokens));
  return with_types(a.x_dtype, a.value_dtype, [&](auto x, auto value) {
    using TX = decltype(x);
    using T = decltype(value);
    return with_access(a.width, aligned, [&](auto access, dim3 threads) {
      return launch(adaln_forward_kernel<TX, T, decltype(access)::value>, grid, threads, 0, stream,
                    a);
    });
  });
}

int gated_forward(const GatedAdaLNForwardArgs& a, void* stream) {
  const int64_t x_bytes = bytes_of(a.x_dtype), bytes = bytes_of(a.value_dtype);
  const bool aligned = is_aligned(a.x, x_bytes) && is_aligned(a.y, bytes) &&
                       is_aligned(a.gate, bytes) && is_aligned(a.scale, bytes) &&
                       is_aligned(a.shift, bytes);
  const dim3 grid(static_cast<unsigned>(a.batch * a.tokens));
  return with_types(a.x_dtype, a.value_dtype, [&](auto x, auto value) {
    using TX = decltype(x);
    using T = decltype(value);
    return with_access(a.width, aligned, [&](auto access, dim3 threads) {
      return launch(gated_adaln_forward_kernel<TX, T, decltype(access)::value>, grid, threads, 0,
                    stream, a);
    });
  });
}

int backward(const AdaLNBackwardCudaArgs& all, void* stream) {
  const AdaLNBackwardArgs& a = all.op;
  const int64_t x_bytes = bytes_of(a.x_dtype), bytes = bytes_of(a.value_dtype);
  const bool aligned =
      is_aligned(a.x, x_bytes) && is_aligned(a.grad_y, bytes) && is_aligned(a.scale, bytes);
  const dim3 grid(static_cast<unsigned>(a.batch * ceil_div(a.tokens, kAdaLNTokensPerTile)));
  return with_types(a.x_dtype, a.value_dtype, [&](auto x, auto value) {
    using TX = decltype(x);
    using T = decltype(value);
    const int error = with_access(a.width, aligned, [&](auto access, dim3 threads) {
      return launch(adaln_backward_kernel<TX, T, decltype(access)::value>, grid, threads, 0, stream,
                    all);
    });
    if (error != 0) return error;
    const SumTargets<T> targets = {
        {static_cast<T*>(a.grad_scale), static_cast<T*>(a.grad_shift), nullptr}};
    return sum_tiles<T>(all.partial, targets, a.batch, a.tokens, 2, a.width, stream);
  });
}

int gated_backward(const GatedAdaLNBackwardCudaArgs& all, void* stream) {
  const GatedAdaLNBackwardArgs& a = all.op;
  const int64_t x_bytes = bytes_of(a.x_dtype), bytes = bytes_of(a.value_dtype);
  const bool aligned = is_aligned(a.x_out, x_bytes) && is_aligned(a.grad_x_out, x_bytes) &&
                       is_aligned(a.grad_h, bytes) && is_aligned(a.y, bytes) &&
                       is_aligned(a.gate, bytes) && is_aligned(a.scale, bytes);
  const dim3 grid(static_cast<unsigned>(a.batch * ceil_div(a.tokens, kAdaLNTokensPerTile)));
  return with_types(a.x_dtype, a.value_dtype, [&](auto x, auto value) {
    using TX = decltype(x);
    using T = decltype(value);
    const int error = with_access(a.width, aligned, [&](auto access, dim3 threads) {
      return launch(gated_adaln_backward_kernel<TX, T, decltype(access)::value>, grid, threads, 0,
                    stream, all);
    });
    if (error != 0) return error;
    const SumTargets<T> targets = {{static_cast<T*>(a.grad_scale), static_cast<T*>(a.grad_shift),
                                    static_cast<T*>(a.grad_gate)}};
    return sum_tiles<T>(all.partial, targets, a.batch, a.tokens, 3, a.width, stream);
  });
}

}  // namespace
}  // namespace variant::cuda

VARIANT_CUDA_API int variant_cuda_adaln_forward(const variant::AdaLNForwardArgs* args,
                                                int64_t args_bytes, int device, void* stream) {
  if (args_bytes != sizeof(*args)) return variant::cuda::kInvalidValue;
  const variant::DeviceGuard guard(device);
  return variant::cuda::forward(*args, stream);
}

VARIANT_CUDA_API int variant_cuda_adaln_backward(const variant::cuda::AdaLNBackwardCudaArgs* args,
                                                 int64_t args_bytes, int device, void* stream) {
  if (args_bytes != sizeof(*args)) return variant::cuda::kInvalidValue;
  const variant::DeviceGuard guard(device);
  return variant::cuda::backward(*args, stream);
}

VARIANT_CUDA_API int variant_cuda_gated_adaln_forward(const variant::GatedAdaLNForwardArgs* args,
                                                      int64_t args_bytes, int device,
                                                      void* stream) {
  if (args_bytes != sizeof(*args)) return variant::cuda::kInvalidValue;
  const variant::DeviceGuard guard(device);
  return variant::cuda::gated_forward(*args, stream);
}

VARIANT_CUDA_API int variant_cuda_gated_adaln_backward(
    const variant::cuda::GatedAdaLNBackwardCudaArgs* args, int64_t args_bytes, int device,
    void* stream) {
  if (args_bytes != sizeof(*args)) return variant::cuda::kInvalidValue;
  const variant::DeviceGuard guard(device);
  return variant::cuda::gated_backward(*args, stream);
}
