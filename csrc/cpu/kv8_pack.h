// Packs rows of e4m3 codes, each with its power of two, as operands of gemm.h: this is how 8-bit K
// and V are read. A code times its row's scale is exact in bfloat16 and in float32, so the packed
// bits equal those packed from pages of that dtype.
#pragma once

#include "gemm.h"

namespace variant::VARIANT_ISA_NAMESPACE {
namespace {

// The widest head of the contract.
constexpr int64_t kMaxHeadDim = 256;

// exponent: the biased exponent of the scale.
struct ScaledCodes {
  const uint8_t* codes;
  int32_t exponent;
};
inline ScaledCodes operator+(ScaledCodes row, int64_t d) { return {row.codes + d, row.exponent}; }

inline float scale_of(ScaledCodes row) {
  const int32_t bits = row.exponent << 23;
  float scale;
  __builtin_memcpy(&scale, &bits, 4);
  return scale;
}

#if defined(__AVX2__)
// Codes in 16-bit lanes, as float32. As the upper bits of a float16 a code is its value / 256.
inline VecF decode(VecU16 codes) {
  typedef int16_t VecI16 __attribute__((vector_size(kLanes * 2)));
  VecU16 half = (VecU16)((VecI16)(codes << 8) >> 1) & 0xbfff;
  half |= (VecU16)((half & 0x3fff) == 0x3f80) & 0x7e00;
#if defined(__AVX512F__)
  const VecF value = (VecF)_mm512_maskz_cvtph_ps(kAllLanes, (__m256i)half);
#else
  const VecF value = (VecF)_mm256_cvtph_ps((__m128i)half);
#endif
  return value * 256.0f;
}
#else
inline VecF decode(VecU16 codes) {
  const VecU wide = widen_lanes(codes), magnitude = wide & 0x7f;
  // Exponent and mantissa in the places of float32's: twice a normal number, 2^-6 above a subnormal
  // one, and half of it is below 2^-6 for these alone.
  const VecF above = (VecF)((magnitude << 20) + (121u << 23));
  const VecU value = (VecU)(above - maximum(above * 0.5f, splat(0.015625f)));
  const VecU known = magnitude == 0x7f ? VecU{} + 0x7fc00000u : value;
  return (VecF)(known | (wide & 0x80) << 24);
}
#endif

#if defined(__AVX512F__)
inline VecU16 load_codes(const uint8_t* p, Full) {
  return (VecU16)_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p));
}
inline VecU16 load_codes(const uint8_t* p, Tail tail) {
  return (VecU16)_mm256_cvtepu8_epi16(_mm_maskz_loadu_epi8(lane_mask(tail), p));
}
#else
inline VecU16 load_codes(const uint8_t* p, Full) {
#if defined(__AVX2__)
  return (VecU16)_mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i*)p));
#else
  VecU16 codes;
  for (int i = 0; i < kLanes; ++i) codes[i] = p[i];
  return codes;
#endif
}
inline VecU16 load_codes(const uint8_t* p, Tail tail) {
  VecU16 codes = {};
  for (int i = 0; i < tail.count; ++i) codes[i] = p[i];
  return codes;
}
#endif

// The load() that gemm.h calls to pack cells of one float32.
template <class Lanes>
inline VecF load(ScaledCodes row, Lanes lanes) {
  return decode(load_codes(row.codes, lanes)) * scale_of(row);
}

#if defined(__AVX512BF16__)
// The bits of bfloat16 by the lower seven bits of a code, exponents less that of the smallest value
// (2^-9): a row's exponent is added to all, saturating, and NaN (all ones) stays NaN.
struct CodeTable {
  alignas(64) uint16_t at[128];
};
constexpr CodeTable make_code_table() {
  CodeTable table = {};
  for (int code = 1; code < 127; ++code) {
    int exponent = code >> 3, mantissa = code & 7;
    if (exponent == 0) {
      // mantissa * 2^-9, normalised.
      exponent = 1;
      for (; mantissa < 8; mantissa <<= 1) --exponent;
      mantissa -= 8;
    }
    table.at[code] = static_cast<uint16_t>((exponent + 2) << 7 | mantissa << 4);
  }
  table.at[127] = 0xffff;
  return table;
}
constexpr CodeTable kCodeTable = make_code_table();
constexpr int kTableBias = 9;

// Whether every product of a code with the row's scale is zero or a normal number.
inline bool is_normal(ScaledCodes row) { return row.exponent > 9 && row.exponent <= 246; }

// Codes in the low bytes of 16-bit lanes times their rows' scales. exponents: those of the rows
// less kTableBias, at the place of bfloat16's.
inline VecF decode_cells(__m512i codes, __m512i exponents) {
  const uint16_t* table = kCodeTable.at;
  const __m512i low =
      _mm512_permutex2var_epi16(_mm512_load_si512(table), codes, _mm512_load_si512(table + 32));
  const __m512i high = _mm512_permutex2var_epi16(_mm512_load_si512(table + 64), codes,
                                                 _mm512_load_si512(table + 96));
  const __mmask32 upper = _mm512_test_epi16_mask(codes, _mm512_set1_epi16(0x40));
  const __mmask32 nonzero = _mm512_test_epi16_mask(codes, _mm512_set1_epi16(0x7f));
  const __m512i magnitude =
      _mm512_maskz_adds_epu16(nonzero, _mm512_mask_blend_epi16(upper, low, high), exponents);
  const __m512i sign = _mm512_maskz_slli_epi16(0xffffffffu, codes, 8) & _mm512_set1_epi16(-0x8000);
  return (VecF)(magnitude | sign);
}

// Converts a row to bfloat16, for any scale.
inline void widen_row(ScaledCodes row, int64_t width, BF16* out) {
  for_vectors(width, [&](int64_t d, auto lanes) { store(out + d, load(row + d, lanes), lanes); });
}

inline __m512i load_code_pairs(const uint8_t* p, Full) {
  return _mm512_maskz_cvtepu8_epi16(0xffffffffu, _mm256_loadu_si256((const __m256i*)p));
}
inline __m512i load_code_pairs(const uint8_t* p, Tail tail) {
  const auto mask = static_cast<__mmask32>((uint64_t{1} << 2 * tail.count) - 1);
  return _mm512_maskz_cvtepu8_epi16(0xffffffffu, _mm256_maskz_loadu_epi8(mask, p));
}

inline void pack_row(Pair, ScaledCodes row, int64_t width, float* out) {
  if (!is_normal(row)) {
    BF16 wide[kMaxHeadDim];
    widen_row(row, width, wide);
    return pack_row(Pair{}, wide, width, out);
  }
  const __m512i exponents =
      _mm512_set1_epi16(static_cast<int16_t>((row.exponent - kTableBias) << 7));
  for_vectors(width / 2, [&](int64_t d, auto lanes) {
    store(out + d, decode_cells(load_code_pairs(row.codes + 2 * d, lanes), exponents));
  });
}

// A null second row counts as zeros.
inline void pack_panel_group(Pair, ScaledCodes first, ScaledCodes second, int64_t width,
                             float* panels, int64_t panel_rows, int64_t i) {
  if (!is_normal(first) || (second.codes && !is_normal(second))) {
    BF16 wide[2][kMaxHeadDim];
    widen_row(first, width, wide[0]);
    if (second.codes) widen_row(second, width, wide[1]);
    return pack_panel_group(Pair{}, wide[0], second.codes ? wide[1] : nullptr, width, panels,
                            panel_rows, i);
  }
  const uint32_t upper = second.codes ? second.exponent - kTableBias : 0;
  const __m512i exponents = _mm512_set1_epi32(
      static_cast<int32_t>(static_cast<uint32_t>(first.exponent - kTableBias) << 7 | upper << 23));
  for_vectors(width, [&](int64_t d, auto lanes) {
    VecU codes = widen_lanes(load_codes(first.codes + d, lanes));
    if (second.codes) codes |= widen_lanes(load_codes(second.codes + d, lanes)) << 16;
    store(panels + d / kPanel * kPanel * panel_rows + i * kPanel + d % kPanel,
          decode_cells((__m512i)codes, exponents));
  });
}
#endif

}  // namespace
}  // namespace variant::VARIANT_ISA_NAMESPACE
