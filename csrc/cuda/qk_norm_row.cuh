// One head of one token, held by kLanes neighbouring lanes with eight elements each. Shared by
// qk_norm and its fused op.
#pragma once

#include <type_traits>

#include "../include/qk_norm.h"
#include "elements.cuh"
#include "primitives.h"
#include "reduce.cuh"

namespace variant::cuda {

constexpr int kRowThreads = 256;

// Rows are counted in 32 bits: a 64-bit division takes as long as the rest of a row.
constexpr int64_t kMostRows = (int64_t{1} << 31) - kRowThreads;

struct RowIndex {
  int64_t r, b, t, h;
  bool inside;
};

// The (b, t, h) of this thread's group of lanes.
template <int kLanes, class Args>
__device__ inline RowIndex index_of_row(const Args& a) {
  const unsigned heads = static_cast<unsigned>(a.heads), tokens = static_cast<unsigned>(a.tokens);
  const unsigned rows = static_cast<unsigned>(a.batch) * tokens * heads;
  const unsigned r = blockIdx.x * (kRowThreads / kLanes) + threadIdx.x / kLanes;
  const unsigned token = r / heads;
  return {r, token / tokens, token % tokens, r % heads, r < rows};
}

// exp(min(scale_mul, log 100))
__device__ inline float query_factor(const float* scale_mul, int64_t h) {
  const float limit = static_cast<float>(kMaxLogScale);
  return expf(scale_mul[h] > limit ? limit : scale_mul[h]);
}

template <int kLanes>
__device__ inline float norm_of(const float (&x)[kEight]) {
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kEight; ++i) squares += x[i] * x[i];
  return sqrtf(reduce_lanes<kLanes>(squares, Plus()));
}

// Written so that a NaN norm stays NaN.
__device__ inline float divisor_of(float norm) { return norm < kQkNormEps ? kQkNormEps : norm; }

// x / max(|x|, eps) * factor. float32 is divided, so that unit vectors keep their last bit; 16 bits
// round far above that, and factor / divisor is at most 1e14.
template <class T, int kLanes>
__device__ inline void normalise(float (&x)[kEight], float factor) {
  const float divisor = divisor_of(norm_of<kLanes>(x));
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < kEight; ++i) x[i] = x[i] / divisor * factor;
  } else {
    const float multiplier = factor / divisor;
#pragma unroll
    for (int i = 0; i < kEight; ++i) x[i] *= multiplier;
  }
}

// Calls f(integral constant) with the number of lanes for a head of this width, a power of two.
template <class F>
int with_lanes(int64_t head_dim, const F& f) {
  return head_dim <= 16    ? f(std::integral_constant<int, 2>())
         : head_dim <= 32  ? f(std::integral_constant<int, 4>())
         : head_dim <= 64  ? f(std::integral_constant<int, 8>())
         : head_dim <= 128 ? f(std::integral_constant<int, 16>())
                           : f(std::integral_constant<int, 32>());
}

// Calls f<T>() with the type of a dtype.
template <class F>
int with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float());
    case DType::kBFloat16:
      return f(BF16());
    default:
      return f(Half());
  }
}

}  // namespace variant::cuda
