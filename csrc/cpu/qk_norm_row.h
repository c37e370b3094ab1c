// qk_norm of the heads of one token, shared with the fused op.
#pragma once

#include "../include/qk_norm.h"
#include "parallel.h"
#include "row_pass.h"
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
  Pair squares = {};
  for_pairs<typename OrderOf<T>::Type>(width, [&](int64_t d, auto lanes) {
    const auto value = load(x + d, lanes);
    accumulate(squares, value * value);
  });
  return __builtin_sqrtf(total(squares));
}

// Written so that a NaN norm stays NaN.
inline float divisor_of(float norm) { return norm < kQkNormEps ? kQkNormEps : norm; }

// x / divisor * factor. float32 is divided, not multiplied by a reciprocal: unit vectors keep their
// last bit; float16 is computed as float32 is. bfloat16 rounds far above that; factor / divisor is
// at most 1e14 and cannot overflow.
template <class T>
struct Scaling {
  float divisor, factor;
  template <class X>
  X operator()(X x) const {
    return x / divisor * factor;
  }
};
template <>
struct Scaling<BF16> {
  float multiplier;
  explicit Scaling(float divisor, float factor) : multiplier(factor / divisor) {}
  template <class X>
  X operator()(X x) const {
    return x * multiplier;
  }
};

// y = x / max(|x|, eps) * factor
template <bool kStream, class T>
inline void normalise_row(const T* x, T* y, int64_t width, float factor) {
  using Order = typename OrderOf<T>::Type;
  if (width == 64) {
    // The most frequent width: the row stays in registers.
    constexpr int kPairs = 64 / (2 * kLanes);
    Pair row[kPairs], squares = {};
    for (int i = 0; i < kPairs; ++i) {
      row[i] = load(x + i * 2 * kLanes, Both<Order>{});
      squares = squares + row[i] * row[i];
    }
    const Scaling<T> scaled{divisor_of(__builtin_sqrtf(total(squares))), factor};
    for (int i = 0; i < kPairs; ++i) {
      put<kStream>(y + i * 2 * kLanes, scaled(row[i]), Both<Order>{});
    }
    return;
  }
  const Scaling<T> scaled{divisor_of(norm_of(x, width)), factor};
  for_pairs<Order>(width, [&](int64_t d, auto lanes) {
    put<kStream>(y + d, scaled(load(x + d, lanes)), lanes);
  });
}

// Every head of one token; null factors count as 1. `next`: address of the same heads of the next
// token, for prefetching.
template <bool kStream, class T>
inline void normalise_heads(Heads<const T> x, Heads<T> y, const T* next, int64_t heads,
                            int64_t width, const float* factors) {
  for (int64_t h = 0; h < heads; ++h) {
    prefetch_bytes(next + h * x.stride, width * static_cast<int64_t>(sizeof(T)));
    normalise_row<kStream>(x.data + h * x.stride, y.data + h * y.stride, width,
                           factors ? factors[h] : 1.0f);
  }
}

}  // namespace
}  // namespace variant::VARIANT_ISA_NAMESPACE
