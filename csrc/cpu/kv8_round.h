// Rounds rows of numbers to e4m3 codes with one power of two a row: this is how 8-bit K and V are
// written.
//
//   s = the smallest power of two with max|x| <= 448 s, no less than 2^-126;  code = e4m3(x / s)
//
// rounded to nearest, ties to even. Powers of two are exponents: 1 / s and x / s are exact.
#pragma once

#include "simd.h"

namespace variant::VARIANT_ISA_NAMESPACE {
namespace {

inline int32_t largest_lane(VecI x) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
  // Masked forms: gcc warns about the undefined vector in the others.
  const __m256i eight = _mm256_max_epi32(_mm512_maskz_extracti32x8_epi32(0xff, (__m512i)x, 0),
                                         _mm512_maskz_extracti32x8_epi32(0xff, (__m512i)x, 1));
#else
  const __m256i eight = (__m256i)x;
#endif
  const __m128i four =
      _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  const __m128i two = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
#else
  int32_t most = x[0];
  for (int i = 1; i < kLanes; ++i) most = x[i] > most ? x[i] : most;
  return most;
#endif
}

// Bits of the largest magnitude. Bits and magnitudes have the same order, with NaN above infinity.
template <class T>
inline int32_t largest_magnitude(const T* x, int64_t width) {
  VecI most = {};
  for_vectors(width, [&](int64_t d, auto lanes) {
    const VecI magnitude = as_int(load(x + d, lanes)) & 0x7fffffff;
    most = magnitude > most ? magnitude : most;
  });
  return largest_lane(most);
}

// 448, the largest finite e4m3 value, is 1.75 * 2^8.
inline int32_t scale_exponent(int32_t magnitude) {
  const int32_t exponent = (magnitude >> 23) - 8 + ((magnitude & 0x7fffff) > 0x600000);
  return exponent < 1 ? 1 : exponent;
}

// e4m3 codes of numbers of at most 448, in the low bytes of the lanes; NaN for numbers that are not
// finite.
inline VecU e4m3_codes(VecF x) {
  const VecU bits = (VecU)x, magnitude = bits & 0x7fffffffu;
  // |x| lies in [power, 2 power); below 2^-6 values are as far apart as just above it.
  const VecI exponent = (VecI)(bits & 0x7f800000u), lowest = VecI{} + (121 << 23);
  const VecU power = (VecU)(exponent > lowest ? exponent : lowest);
  // A number whose last bit is worth power / 8: adding it rounds |x| to whole eighths of power.
  const VecU shift = power + (20u << 23);
  const VecU eighths = (VecU)((VecF)magnitude + (VecF)shift) - shift;
  // 8 to 16 of them, the first 8 of which the exponent counts; from the lowest power: 0 to 16.
  const VecU rounded = eighths + ((power - (121u << 23)) >> 20);
  const VecU codes = (VecI)magnitude < 0x7f800000 ? rounded : VecU{} + 0x7fu;
  return codes | (bits >> 24 & 0x80u);
}

// The low bytes of the lanes.
#if defined(__AVX512F__)
inline void store_bytes(uint8_t* p, VecU x, Full) {
  _mm_storeu_si128((__m128i*)p, _mm512_maskz_cvtepi32_epi8(kAllLanes, (__m512i)x));
}
inline void store_bytes(uint8_t* p, VecU x, Tail tail) {
  _mm_mask_storeu_epi8(p, lane_mask(tail), _mm512_maskz_cvtepi32_epi8(kAllLanes, (__m512i)x));
}
#else
inline void store_bytes(uint8_t* p, VecU x, Full) {
#if defined(__AVX2__)
  const __m128i words =
      _mm_packus_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
  _mm_storel_epi64((__m128i*)p, _mm_packus_epi16(words, words));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<uint8_t>(x[i]);
#endif
}
inline void store_bytes(uint8_t* p, VecU x, Tail tail) {
  for (int i = 0; i < tail.count; ++i) p[i] = static_cast<uint8_t>(x[i]);
}
#endif

// Rounds a row and returns the biased exponent of its scale.
template <class T>
inline uint8_t round_row(const T* x, uint8_t* codes, int64_t width) {
  const int32_t exponent = scale_exponent(largest_magnitude(x, width));
  const int32_t reciprocal_bits = (254 - exponent) << 23;
  float reciprocal;
  __builtin_memcpy(&reciprocal, &reciprocal_bits, 4);
  for_vectors(width, [&](int64_t d, auto lanes) {
    store_bytes(codes + d, e4m3_codes(load(x + d, lanes) * reciprocal), lanes);
  });
  return static_cast<uint8_t>(exponent);
}

}  // namespace
}  // namespace variant::VARIANT_ISA_NAMESPACE
