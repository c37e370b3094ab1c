// float16 in memory: K, V and queries of 16 bits, computed in float32.
#pragma once

#include "simd.h"

namespace variant::VARIANT_ISA_NAMESPACE {
namespace {

struct FP16 {
  uint16_t bits;
};

#if defined(__AVX512F__)
inline VecF widen_half(VecU16 x) { return (VecF)_mm512_maskz_cvtph_ps(kAllLanes, (__m256i)x); }
inline VecU16 narrow_half(VecF x) {
  return (VecU16)_mm512_maskz_cvtps_ph(kAllLanes, (__m512)x, _MM_FROUND_TO_NEAREST_INT);
}
#elif defined(__AVX2__)
inline VecF widen_half(VecU16 x) { return (VecF)_mm256_cvtph_ps((__m128i)x); }
inline VecU16 narrow_half(VecF x) {
  return (VecU16)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
}
#else
// 2^-14, the smallest normal float16.
constexpr uint32_t kSmallestNormalBits = (127u - 14) << 23;

inline VecF widen_half(VecU16 x) {
  const VecU bits = widen_lanes(x), magnitude = (bits & 0x7fff) << 13;
  const VecU exponent = magnitude & 0x0f800000;
  const VecU normal = magnitude + ((127u - 15) << 23);
  // A subnormal float16 as the fraction of a normal float32: no subnormal float32 arises, which a
  // processor may be told to count as zero.
  const VecF above = (VecF)(magnitude + kSmallestNormalBits);
  const VecU subnormal = (VecU)(above - (VecF)(VecU{} + kSmallestNormalBits));
  const VecU infinite = magnitude | 0x7f800000;
  const VecU finite = exponent == 0 ? subnormal : normal;
  return (VecF)((exponent == 0x0f800000 ? infinite : finite) | (bits & 0x8000) << 16);
}
// Rounds to nearest, ties to even.
inline VecU16 narrow_half(VecF x) {
  const VecU bits = (VecU)x, magnitude = bits & 0x7fffffff;
  // 0.5 has the unit of float16's subnormal numbers in its last place: the sum rounds to it.
  const VecU subnormal = (VecU)((VecF)magnitude + splat(0.5f)) - (126u << 23);
  const VecU normal = (magnitude - ((127u - 15) << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const VecU infinite =
      magnitude > 0x7f800000 ? (magnitude >> 13 & 0x3ff) | 0x7e00 : VecU{} + 0x7c00;
  // From 65536 on; what is below and rounds to it has carried into the exponent.
  const VecU large = magnitude >= (127u + 16) << 23 ? infinite : normal;
  return narrow_lanes((magnitude < kSmallestNormalBits ? subnormal : large) |
                      (bits & 0x80000000) >> 16);
}
#endif

inline VecF load(const FP16* p, Full = {}) {
  VecU16 x;
  __builtin_memcpy(&x, p, sizeof x);
  return widen_half(x);
}
inline void store(FP16* p, VecF x, Full = {}) {
  const VecU16 y = narrow_half(x);
  __builtin_memcpy(p, &y, sizeof y);
}
#if defined(__AVX512F__)
inline VecF load(const FP16* p, Tail tail) {
  return widen_half((VecU16)_mm256_maskz_loadu_epi16(lane_mask(tail), p));
}
inline void store(FP16* p, VecF x, Tail tail) {
  _mm256_mask_storeu_epi16(p, lane_mask(tail), (__m256i)narrow_half(x));
}
#else
inline VecF load(const FP16* p, Tail tail) {
  VecU16 x = {};
  for (int i = 0; i < tail.count; ++i) x[i] = p[i].bits;
  return widen_half(x);
}
inline void store(FP16* p, VecF x, Tail tail) {
  const VecU16 y = narrow_half(x);
  for (int i = 0; i < tail.count; ++i) p[i].bits = y[i];
}
#endif

}  // namespace
}  // namespace variant::VARIANT_ISA_NAMESPACE
