// One vector of float32 lanes, as wide as the instruction set that this file is compiled for, and
// the conversions between memory and it. Uses compiler vector types where they suffice, else
// intrinsics.
#pragma once

#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef VARIANT_ISA_NAMESPACE
#error "kernel files are compiled once per instruction set, with VARIANT_ISA_NAMESPACE set"
#endif

namespace variant::VARIANT_ISA_NAMESPACE {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float VecF __attribute__((vector_size(kLanes * 4)));
typedef int32_t VecI __attribute__((vector_size(kLanes * 4)));
typedef uint32_t VecU __attribute__((vector_size(kLanes * 4)));
typedef uint16_t VecU16 __attribute__((vector_size(kLanes * 2)));

struct BF16 {
  uint16_t bits;
};

// Number of lanes of a vector that belong to the row: all of them, or the first `count`.
struct Full {};
struct Tail {
  int count;
};

// A number as a type.
template <int kValue>
struct Count {
  static constexpr int value = kValue;
};

inline VecF splat(float x) { return x - VecF{}; }
inline VecI lane_index() {
  VecI index;
  for (int i = 0; i < kLanes; ++i) index[i] = i;
  return index;
}
inline VecF maximum(VecF a, VecF b) { return a > b ? a : b; }
inline VecF as_float(VecI x) { return (VecF)x; }
inline VecI as_int(VecF x) { return (VecI)x; }

inline float to_float(float x) { return x; }
inline float to_float(BF16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}
template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
// Round to nearest, ties to even. A NaN keeps its sign and upper payload and becomes quiet: adding
// the rounding term could carry it over to infinity.
template <>
inline BF16 from_float<BF16>(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  if (x != x) return BF16{static_cast<uint16_t>((bits >> 16) | 0x40)};
  return BF16{static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

#if defined(__AVX512F__)
// Without intrinsics gcc 12 converts the lanes one by one. The masked forms (with all lanes) avoid
// gcc's warning about the undefined vector in the others.
constexpr __mmask16 kAllLanes = 0xffff;
inline VecU widen_lanes(VecU16 x) {
  return (VecU)_mm512_maskz_cvtepu16_epi32(kAllLanes, (__m256i)x);
}
inline VecU16 narrow_lanes(VecU x) {
  return (VecU16)_mm512_maskz_cvtepi32_epi16(kAllLanes, (__m512i)x);
}
#elif defined(__AVX2__)
inline VecU widen_lanes(VecU16 x) { return (VecU)_mm256_cvtepu16_epi32((__m128i)x); }
inline VecU16 narrow_lanes(VecU x) {
  // Packing works in halves of the register: their results are 64 bits apart. The values fit 16
  // bits once masked, so saturation changes none.
  const __m256i low = (__m256i)(x & 0xffff);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, low), 0x08);
  return (VecU16)_mm256_castsi256_si128(packed);
}
#else
inline VecU widen_lanes(VecU16 x) { return __builtin_convertvector(x, VecU); }
inline VecU16 narrow_lanes(VecU x) { return __builtin_convertvector(x, VecU16); }
#endif
inline VecF widen(VecU16 x) { return (VecF)(widen_lanes(x) << 16); }
inline VecU16 narrow(VecF x) {
  const VecU bits = (VecU)x;
  const VecU rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const VecU nan = (bits >> 16) | 0x40;
  return narrow_lanes(x == x ? rounded : nan);
}

inline VecF load(const float* p, Full = {}) {
  VecF x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
inline VecF load(const BF16* p, Full = {}) {
  VecU16 x;
  __builtin_memcpy(&x, p, sizeof x);
  return widen(x);
}
inline void store(float* p, VecF x, Full = {}) { __builtin_memcpy(p, &x, sizeof x); }
inline void store(BF16* p, VecF x, Full = {}) {
  const VecU16 y = narrow(x);
  __builtin_memcpy(p, &y, sizeof y);
}

// Partial vectors: lanes past the count load as zero, and their memory is neither read nor written.
#if defined(__AVX512F__)
inline __mmask16 lane_mask(Tail tail) { return static_cast<__mmask16>((1u << tail.count) - 1); }
inline VecF load(const float* p, Tail tail) {
  return (VecF)_mm512_maskz_loadu_ps(lane_mask(tail), p);
}
inline VecF load(const BF16* p, Tail tail) {
  return widen((VecU16)_mm256_maskz_loadu_epi16(lane_mask(tail), p));
}
inline void store(float* p, VecF x, Tail tail) {
  _mm512_mask_storeu_ps(p, lane_mask(tail), (__m512)x);
}
inline void store(BF16* p, VecF x, Tail tail) {
  _mm256_mask_storeu_epi16(p, lane_mask(tail), (__m256i)narrow(x));
}
inline VecF zero_beyond(VecF x, Tail tail) {
  return (VecF)_mm512_maskz_mov_ps(lane_mask(tail), (__m512)x);
}
#else
#if defined(__AVX2__)
inline VecF load(const float* p, Tail tail) {
  return (VecF)_mm256_maskload_ps(p, (__m256i)(lane_index() < tail.count));
}
inline void store(float* p, VecF x, Tail tail) {
  _mm256_maskstore_ps(p, (__m256i)(lane_index() < tail.count), (__m256)x);
}
#else
inline VecF load(const float* p, Tail tail) {
  VecF x = {};
  for (int i = 0; i < tail.count; ++i) x[i] = p[i];
  return x;
}
inline void store(float* p, VecF x, Tail tail) {
  for (int i = 0; i < tail.count; ++i) p[i] = x[i];
}
#endif
inline VecF load(const BF16* p, Tail tail) {
  VecF x = {};
  for (int i = 0; i < tail.count; ++i) x[i] = to_float(p[i]);
  return x;
}
inline void store(BF16* p, VecF x, Tail tail) {
  for (int i = 0; i < tail.count; ++i) p[i] = from_float<BF16>(x[i]);
}
inline VecF zero_beyond(VecF x, Tail tail) { return lane_index() < tail.count ? x : VecF{}; }
#endif
inline VecF zero_beyond(VecF x, Full) { return x; }
inline VecF fill_beyond(VecF x, float value, Tail tail) {
  return lane_index() < tail.count ? x : splat(value);
}
inline VecF fill_beyond(VecF x, float, Full) { return x; }

// Sum of the lanes in a fixed order: halves onto halves.
inline float sum_lanes(VecF x) {
  float lanes[kLanes];
  store(lanes, x);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// Calls f(column, Full{}) for whole vectors, then f(column, Tail{rest}) for the rest of a row.
template <class F>
inline void for_vectors(int64_t width, F f) {
  int64_t column = 0;
  for (; column + kLanes <= width; column += kLanes) f(column, Full{});
  if (column < width) f(column, Tail{static_cast<int>(width - column)});
}

// exp to about one unit in the last place: 2^n * p(r), |r| <= log(2)/2, with Cephes' polynomial.
// Below the smallest normal number: 0. exp(-inf) is 0, NaN stays NaN.
inline VecF exp_approx(VecF x) {
  constexpr float kLowest = -87.33654f, kHighest = 88.72f;
  const VecF clamped = x < kLowest ? splat(kLowest) : (x > kHighest ? splat(kHighest) : x);
  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits.
  const VecF shifted = clamped * 1.44269504088896341f + 12582912.0f;
  const VecF n = shifted - 12582912.0f;
  // log 2 in two parts: n * first part is exact.
  VecF r = clamped - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  VecF p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  // Two factors, because 2^128 overflows.
  const VecI exponent = as_int(shifted) - 0x4b400000;
  const VecI half = exponent >> 1;
  p = p * as_float((half + 127) << 23) * as_float((exponent - half + 127) << 23);
  return x < kLowest ? VecF{} : p;
}

}  // namespace
}  // namespace variant::VARIANT_ISA_NAMESPACE
