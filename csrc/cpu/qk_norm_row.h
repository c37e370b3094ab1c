// The heads of one token: what qk_norm and its fused form share.
#pragma once

#include "../include/qk_norm.h"
#include "parallel.h"
#include "simd.h"

namespace variant::VARIANT_ISA_NAMESPACE {
namespace {

// exp(min(scale_mul, log 100)), as float32.
inline void query_factors(const float* scale_mul, int64_t heads, float* factors) {
  const float limit = static_cast<float>(kMaxLogScale);
  for (int64_t h = 0; h < heads; ++h) {
    const float log_scale = scale_mul[h] > limit ? limit : scale_mul[h];
    factors[h] = static_cast<float>(__builtin_exp(log_scale));
  }
}

template <class T>
inline float norm_of(const T* x, int64_t width) {
  VecF squares = {};
  for_vectors(width, [&](int64_t d, auto lanes) {
    const VecF value = load(x + d, lanes);
    squares += value * value;
  });
  return __builtin_sqrtf(sum_lanes(squares));
}

// Written so that a NaN norm stays NaN.
inline float divisor_of(float norm) { return norm < kQkNormEps ? kQkNormEps : norm; }

// y = x / max(|x|, eps) * factor. float32 is divided, not multiplied by a reciprocal: unit vectors
// keep their last bit. bfloat16 rounds far above that.
template <class T>
inline void normalise_row(const T* x, T* y, int64_t width, float factor) {
  const float divisor = divisor_of(norm_of(x, width));
  if constexpr (sizeof(T) == 2) {
    // factor / divisor is at most 1e14: it cannot overflow, and zero rows stay zero.
    const float multiplier = factor / divisor;
    for_vectors(width, [&](int64_t d, auto lanes) {
      store(y + d, load(x + d, lanes) * multiplier, lanes);
    });
  } else {
    for_vectors(width, [&](int64_t d, auto lanes) {
      store(y + d, load(x + d, lanes) / divisor * factor, lanes);
    });
  }
}

// Every head of one token; factors null: 1.
template <class T>
inline void normalise_heads(const T* x, int64_t x_stride, T* y, int64_t y_stride, int64_t heads,
                            int64_t width, const float* factors) {
  for (int64_t h = 0; h < heads; ++h) {
    normalise_row(x + h * x_stride, y + h * y_stride, width, factors ? factors[h] : 1.0f);
  }
}

template <class T>
inline void copy_heads(const T* x, int64_t x_stride, T* y, int64_t y_stride, int64_t heads,
                       int64_t width) {
  if (x_stride == width && y_stride == width) {
    __builtin_memcpy(y, x, heads * width * sizeof(T));
    return;
  }
  for (int64_t h = 0; h < heads; ++h) {
    __builtin_memcpy(y + h * y_stride, x + h * x_stride, width * sizeof(T));
  }
}

}  // namespace
}  // namespace variant::VARIANT_ISA_NAMESPACE
