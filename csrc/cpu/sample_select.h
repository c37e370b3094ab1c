// The thresholds of top-k and top-p in one row: the k-th largest value, and the value below which a
// share of the weight lies. Both bisect an interval of values with vector operations and copy the
// entries inside the interval after a few halvings. Nothing is sorted, and no table must be
// cleared.
//
// Every sum has 16 interleaved parts for every vector width, and products must not be fused into
// sums: all instruction sets give the same bits.
#pragma once

#include "parallel.h"
#include "simd.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace variant::VARIANT_ISA_NAMESPACE {
namespace {

// As many doubles as fill one vector.
constexpr int kWideLanes = kLanes / 2;
typedef double VecD __attribute__((vector_size(kWideLanes * 8)));
typedef int64_t VecL __attribute__((vector_size(kWideLanes * 8)));

inline VecD load_wide(const double* p) {
  VecD x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
inline void store_wide(double* p, VecD x) { __builtin_memcpy(p, &x, sizeof x); }
inline VecD splat_wide(double x) { return x - VecD{}; }
// kWideLanes floats as doubles. Without intrinsics gcc 12 converts the lanes one by one.
inline VecD load_widened(const float* p) {
#if defined(__AVX512F__)
  return (VecD)_mm512_maskz_cvtps_pd(0xff, _mm256_loadu_ps(p));
#elif defined(__AVX2__)
  if constexpr (kWideLanes == 4) return (VecD)_mm256_cvtps_pd(_mm_loadu_ps(p));
#endif
  VecD x;
  for (int i = 0; i < kWideLanes; ++i) x[i] = p[i];
  return x;
}

// exp for x <= 0 in double, to about 3e-10: far below the last place of float32. Only products,
// sums and shifts of lanes, so every instruction set gives the same bits. Below -700: 0.
inline VecD exp_wide(VecD x) {
  const VecD clamped = x < -700.0 ? splat_wide(-700.0) : x;
  const VecD shifted = clamped * 1.4426950408889634 + 6755399441055744.0;
  const VecD n = shifted - 6755399441055744.0;
  // log 2 in two parts: n times the first is exact, because its last bits are zero.
  const VecD r = (clamped - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10;
  VecD p = r * (1.0 / 40320) + 1.0 / 5040;
  p = p * r + 1.0 / 720;
  p = p * r + 1.0 / 120;
  p = p * r + 1.0 / 24;
  p = p * r + 1.0 / 6;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  const VecL exponent = (VecL)shifted - 0x4338000000000000;
  p = p * (VecD)((exponent + 1023) << 52);
  return x < -700.0 ? VecD{} : p;
}

// 16 sums side by side.
constexpr int kSums = 16;
struct WideSums {
  VecD part[kSums / kWideLanes] = {};

  double total() const {
    double sums[kSums];
    __builtin_memcpy(sums, part, sizeof sums);
    for (int half = kSums / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
    }
    return sums[0];
  }
};

// Copies the entries of x in [low, high) and returns their number. Writes up to kLanes - 1 elements
// past them.
inline int64_t compact_range(const float* x, int64_t padded, float low, float high, float* out) {
  int64_t count = 0;
#if defined(__AVX512F__)
  for (int64_t i = 0; i < padded; i += kLanes) {
    const __m512 value = (__m512)load(x + i);
    const __mmask16 above = _mm512_cmp_ps_mask(value, _mm512_set1_ps(low), _CMP_GE_OQ);
    const __mmask16 kept = _mm512_mask_cmp_ps_mask(above, value, _mm512_set1_ps(high), _CMP_LT_OQ);
    _mm512_storeu_ps(out + count, _mm512_maskz_compress_ps(kept, value));
    count += __builtin_popcount(kept);
  }
#else
  for (int64_t i = 0; i < padded; ++i) {
    const float value = x[i];
    out[count] = value;
    count += (value >= low) & (value < high);
  }
#endif
  return count;
}

// Copies the entries of x that are >= low and their indices, and returns their number. Writes up to
// kLanes - 1 elements past them.
inline int64_t compact_ge(const float* x, int64_t padded, float low, float* out, int32_t* index) {
  int64_t count = 0;
#if defined(__AVX512F__)
  __m512i indices = (__m512i)lane_index();
  for (int64_t i = 0; i < padded; i += kLanes) {
    const __m512 value = (__m512)load(x + i);
    const __mmask16 kept = _mm512_cmp_ps_mask(value, _mm512_set1_ps(low), _CMP_GE_OQ);
    // Compresses in a register and stores all of it: a compressing store is microcode on Zen 4.
    _mm512_storeu_ps(out + count, _mm512_maskz_compress_ps(kept, value));
    _mm512_storeu_si512(index + count, _mm512_maskz_compress_epi32(kept, indices));
    indices = _mm512_maskz_add_epi32(kAllLanes, indices, _mm512_set1_epi32(kLanes));
    count += __builtin_popcount(kept);
  }
#else
  for (int64_t i = 0; i < padded; ++i) {
    out[count] = x[i];
    index[count] = static_cast<int32_t>(i);
    count += x[i] >= low;
  }
#endif
  return count;
}

// Copies the entries with d in (low, high] and their weights, and returns their number. Writes up
// to kWideLanes - 1 elements past them. Source and target may be the same.
inline int64_t compact_weighted_range(const double* d, const double* w, int64_t padded, double low,
                                      double high, double* d_out, double* w_out) {
  int64_t count = 0;
#if defined(__AVX512F__)
  for (int64_t i = 0; i < padded; i += kWideLanes) {
    const __m512d value = (__m512d)load_wide(d + i), weight = (__m512d)load_wide(w + i);
    const __mmask8 above = _mm512_cmp_pd_mask(value, _mm512_set1_pd(low), _CMP_GT_OQ);
    const __mmask8 kept = _mm512_mask_cmp_pd_mask(above, value, _mm512_set1_pd(high), _CMP_LE_OQ);
    _mm512_storeu_pd(d_out + count, _mm512_maskz_compress_pd(kept, value));
    _mm512_storeu_pd(w_out + count, _mm512_maskz_compress_pd(kept, weight));
    count += __builtin_popcount(kept);
  }
#else
  for (int64_t i = 0; i < padded; ++i) {
    const double value = d[i], weight = w[i];
    d_out[count] = value;
    w_out[count] = weight;
    count += (value > low) & (value <= high);
  }
#endif
  return count;
}

inline int64_t count_ge(const float* x, int64_t padded, float low) {
  VecI counts = {};
  for (int64_t i = 0; i < padded; i += kLanes) counts -= load(x + i) >= low;
  int64_t count = 0;
  for (int lane = 0; lane < kLanes; ++lane) count += counts[lane];
  return count;
}

// So few entries are compared pairwise.
constexpr int64_t kFew = 16;
// Halvings before the entries inside are copied: more passes over all entries would cost more.
constexpr int kHalvings = 3;
constexpr float kInfinity = __builtin_inff();

inline void pad(float* x, int64_t count, int64_t multiple) {
  for (int64_t i = count; i < round_up(count, multiple); ++i) x[i] = -kInfinity;
}

// The smallest and the largest of x.
template <class Number>
struct Range {
  Number low, high;
};
template <class Number>
inline Range<Number> range_of(const Number* x, int64_t count) {
  Range<Number> range = {x[0], x[0]};
  for (int64_t i = 1; i < count; ++i) {
    range.low = x[i] < range.low ? x[i] : range.low;
    range.high = x[i] > range.high ? x[i] : range.high;
  }
  return range;
}

// Bisects an interval until it holds few entries, or equal ones. halve() moves one bound to the
// middle and returns false if no number lies in between. narrow() copies the entries inside the
// interval, sets the bounds to their range, so that every halving excludes an entry, and returns
// whether to stop.
template <class Halve, class Narrow>
inline void bisect(Halve halve, Narrow narrow) {
  for (int round = 1;; ++round) {
    const bool halved = halve();
    if (halved && round % kHalvings) continue;
    if (narrow() || !halved) return;
  }
}

// The k-th largest of few entries, or of equal ones, with `above` entries beyond them.
inline float kth_of_few(const float* x, int64_t count, int64_t k, int64_t above,
                        Range<float> range) {
  float answer = range.low;
  for (int64_t i = 0; i < count && range.low < range.high; ++i) {
    int64_t reached = above;
    for (int64_t j = 0; j < count; ++j) reached += x[j] >= x[i];
    if (reached >= k && x[i] > answer) answer = x[i];
  }
  return answer;
}

// The k-th largest of x, 1 <= k < count; x is padded with -inf to whole vectors, free of NaN and
// +inf; `smallest` and `largest` are its extremes. scratch holds count + 2 kLanes entries.
inline float kth_largest(const float* x, int64_t count, int64_t k, float smallest, float largest,
                         float* scratch) {
  int64_t padded = round_up(count, kLanes);
  int64_t above = count_ge(x, padded, largest);  // entries >= high
  if (above >= k) return largest;
  float low = smallest, high = largest;  // the answer lies in [low, high)

  // Masked entries lie far below and would widen the first interval.
  const float near = largest - 256.0f;
  if (low < near) {
    const int64_t close = count_ge(x, padded, near);
    if (close >= k) {
      low = near;
    } else {
      above = close;
      high = near;
      constexpr float kLowest = -3.40282347e38f;
      if (low == -kInfinity) {
        if (count_ge(x, padded, kLowest) < k) return low;
        low = kLowest;
      }
    }
  }

  int64_t base = 0;  // entries above those in x, once x is the narrowed copy
  float top = high;  // nothing in the interval lies above
  bisect(
      [&] {
        float middle = low * 0.5f + top * 0.5f;
        // Without a number in between, the interval holds at most two values: this step separates
        // them.
        if (!(middle > low && middle < top)) middle = top;
        const int64_t reached = base + count_ge(x, padded, middle);
        if (reached >= k) {
          low = middle;
        } else {
          top = high = middle;
          above = reached;
        }
        return true;
      },
      [&] {
        count = compact_range(x, padded, low, high, scratch);
        pad(scratch, count, kLanes);
        padded = round_up(count, kLanes);
        x = scratch;
        base = above;
        const Range<float> range = range_of(x, count);
        low = range.low;
        top = range.high;
        return count <= kFew || low == top;
      });
  return kth_of_few(x, count, k, base, {low, top});
}

// Top-p keeps every entry above `value`, and of the entries equal to it all but the first
// `dropped_ties`.
struct TopPThreshold {
  double value;
  int64_t dropped_ties;
};

inline double weight_le(const double* d, const double* w, int64_t padded, double high) {
  WideSums sums;
  for (int64_t i = 0; i < padded; i += kSums) {
    for (int j = 0; j < kSums / kWideLanes; ++j) {
      const int64_t at = i + j * kWideLanes;
      sums.part[j] += load_wide(d + at) <= high ? load_wide(w + at) : VecD{};
    }
  }
  return sums.total();
}

// The threshold among few entries, or at most two values, in (low, high]: tries the values in
// ascending order. `below` is the weight of all entries up to low. The threshold is at most `high`.
inline TopPThreshold top_p_threshold_of_few(const double* d, const double* w, int64_t count,
                                            double low, double high, double below,
                                            double allowance) {
  double threshold = low;
  int64_t ties = 0;
  for (;;) {
    double next = high, weight = 0.0;
    for (int64_t i = 0; i < count; ++i) {
      if (d[i] > threshold && d[i] < next) next = d[i];
    }
    threshold = next;
    ties = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (d[i] != threshold) continue;
      weight += w[i];
      ++ties;
    }
    if (threshold == high || below + weight > allowance) break;
    below += weight;
  }
  // Ties
  const int64_t max_dropped = threshold == 0.0 ? ties - 1 : ties;
  int64_t dropped_ties = 0;
  for (int64_t i = 0; i < count && dropped_ties < max_dropped; ++i) {
    if (d[i] != threshold) continue;
    if (below + w[i] > allowance) break;
    below += w[i];
    ++dropped_ties;
  }
  return {threshold, dropped_ties};
}

// Top-p drops entries in ascending order of d, lower index first among ties, while their cumulative
// weight w is at most `allowance`; it never drops the last entry. d <= 0 and its largest is 0; both
// are padded to whole groups of 16 with d = -inf, w = 0. `low` is below every d with a weight above
// zero. Both scratch arrays hold count + 16 + kWideLanes entries.
inline TopPThreshold top_p_threshold(const double* d, const double* w, int64_t count, double low,
                                     double allowance, double* scratch_d, double* scratch_w) {
  // Entries up to low may be dropped together, entries up to high may not: the threshold lies in
  // (low, high].
  double high = 0.0;
  double below = 0.0, base = 0.0;  // weights up to low: of all entries, and of those not in d
  double bottom = low;             // nothing in the interval lies below
  int64_t padded = round_up(count, kSums);
  bisect(
      [&] {
        const double middle = 0.5 * (bottom + high);
        if (!(middle > bottom && middle < high)) return false;
        const double mass = base + weight_le(d, w, padded, middle);
        if (mass <= allowance) {
          low = bottom = middle;
          below = mass;
        } else {
          high = middle;
        }
        return true;
      },
      [&] {
        count = compact_weighted_range(d, w, padded, low, high, scratch_d, scratch_w);
        padded = round_up(count, kSums);
        for (int64_t i = count; i < padded; ++i) {
          scratch_d[i] = -static_cast<double>(kInfinity);
          scratch_w[i] = 0.0;
        }
        d = scratch_d;
        w = scratch_w;
        base = below;
        // With the entries' own range, rounding cannot leave the interval empty.
        const Range<double> range = range_of(d, count);
        bottom = range.low;
        high = range.high;
        return count <= kFew || bottom == high;
      });
  return top_p_threshold_of_few(d, w, count, low, high, below, allowance);
}

}  // namespace
}  // namespace variant::VARIANT_ISA_NAMESPACE
