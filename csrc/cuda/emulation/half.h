// __half and __nv_bfloat16: 16 bits of storage; every operation rounds once, to nearest even.
//
// Sum, product and quotient of two such numbers are computed in float (24 bits >= 2 * 11 + 2), so
// rounding twice gives the same result as rounding once. A fused multiply-add rounds to odd in
// between.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "language.h"

namespace variant::emulation {

template <class To, class From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// Rounds to `kMantissa` stored bits of a format whose smallest normal exponent is kMinExponent and
// largest kMaxExponent. Returns the format's bits without the sign; infinity on overflow.
template <int kMantissa, int kMinExponent, int kMaxExponent>
inline uint32_t round_magnitude(double magnitude) {
  constexpr uint32_t kInfinity = static_cast<uint32_t>(kMaxExponent - kMinExponent + 2)
                                 << kMantissa;
  if (magnitude == 0) return 0;
  if (std::isinf(magnitude)) return kInfinity;
  int exponent = 0;
  std::frexp(magnitude, &exponent);
  exponent -= 1;
  if (exponent < kMinExponent) exponent = kMinExponent;
  // The number in units of the last place, exactly; nearbyint rounds it to nearest even.
  const double units = std::nearbyint(std::ldexp(magnitude, kMantissa - exponent));
  const uint32_t bits =
      (static_cast<uint32_t>(exponent - kMinExponent) << kMantissa) + static_cast<uint32_t>(units);
  return bits >= kInfinity ? kInfinity : bits;
}

inline uint16_t half_bits(double value) {
  if (std::isnan(value)) return 0x7fff;
  return static_cast<uint16_t>((std::signbit(value) ? 0x8000 : 0) |
                               round_magnitude<10, -14, 15>(std::fabs(value)));
}
inline float half_value(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  float magnitude;
  if (exponent == 31) {
    magnitude = mantissa ? NAN : INFINITY;
  } else if (exponent == 0) {
    magnitude = static_cast<float>(mantissa) * 0x1p-24f;
  } else {
    // The same mantissa in 23 bits; the bias of the exponent is 127 instead of 15.
    magnitude = bits_as<float>(static_cast<uint32_t>(exponent + 112) << 23 |
                               static_cast<uint32_t>(mantissa) << 13);
  }
  return bits & 0x8000 ? -magnitude : magnitude;
}

inline uint16_t bfloat16_bits(float value) {
  if (std::isnan(value)) return 0x7fff;
  const uint32_t wide = bits_as<uint32_t>(value);
  return static_cast<uint16_t>((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
}
inline uint16_t bfloat16_bits(double value) {
  if (std::isnan(value)) return 0x7fff;
  return static_cast<uint16_t>((std::signbit(value) ? 0x8000 : 0) |
                               round_magnitude<7, -126, 127>(std::fabs(value)));
}
inline float bfloat16_value(uint16_t bits) {
  return bits_as<float>(static_cast<uint32_t>(bits) << 16);
}

// product + addend rounded to odd: rounding that again to fewer bits equals rounding once.
inline double add_to_odd(double product, double addend) {
  const double sum = product + addend;
  if (!std::isfinite(sum)) return sum;
  const double part = sum - product;
  const double lost = (product - (sum - part)) + (addend - part);
  uint64_t bits = bits_as<uint64_t>(sum);
  if (lost != 0 && (bits & 1) == 0) bits += (lost > 0) == (sum > 0) ? 1 : -1;
  return bits_as<double>(bits);
}

}  // namespace variant::emulation

#define VARIANT_NARROW(name, pair, to_bits, to_value)                             \
  struct name {                                                                   \
    uint16_t bits;                                                                \
    name() = default;                                                             \
    name(float value) : bits(to_bits(value)) {}                                   \
    name(double value) : bits(to_bits(value)) {}                                  \
    name(int value) : bits(to_bits(static_cast<double>(value))) {}                \
    operator float() const { return to_value(bits); }                             \
  };                                                                              \
  inline name operator+(name a, name b) { return float(a) + float(b); }           \
  inline name operator-(name a, name b) { return float(a) - float(b); }           \
  inline name operator*(name a, name b) { return float(a) * float(b); }           \
  inline name operator/(name a, name b) { return float(a) / float(b); }           \
  inline name operator-(name a) { return -float(a); }                             \
  inline name& operator+=(name& a, name b) { return a = a + b; }                  \
  inline name& operator*=(name& a, name b) { return a = a * b; }                  \
  inline bool operator<(name a, name b) { return float(a) < float(b); }           \
  inline bool operator>(name a, name b) { return float(a) > float(b); }           \
  inline bool operator==(name a, name b) { return float(a) == float(b); }         \
  inline bool operator!=(name a, name b) { return float(a) != float(b); }         \
  inline name __hadd(name a, name b) { return a + b; }                            \
  inline name __hsub(name a, name b) { return a - b; }                            \
  inline name __hmul(name a, name b) { return a * b; }                            \
  inline name __hfma(name a, name b, name c) {                                    \
    return variant::emulation::add_to_odd(double(float(a)) * float(b), float(c)); \
  }                                                                               \
  inline name __hmax(name a, name b) { return std::fmax(float(a), float(b)); }    \
  inline name __hmin(name a, name b) { return std::fmin(float(a), float(b)); }    \
  inline bool __hisnan(name a) { return std::isnan(float(a)); }                   \
  struct alignas(4) pair {                                                        \
    name x, y;                                                                    \
    pair() = default;                                                             \
    pair(name x, name y) : x(x), y(y) {}                                          \
  };                                                                              \
  inline pair __hadd2(pair a, pair b) { return {a.x + b.x, a.y + b.y}; }          \
  inline pair __hsub2(pair a, pair b) { return {a.x - b.x, a.y - b.y}; }          \
  inline pair __hmul2(pair a, pair b) { return {a.x * b.x, a.y * b.y}; }          \
  inline pair __hfma2(pair a, pair b, pair c) {                                   \
    return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)};                        \
  }                                                                               \
  inline float __low2float(pair a) { return a.x; }                                \
  inline float __high2float(pair a) { return a.y; }
VARIANT_NARROW(__half, __half2, variant::emulation::half_bits, variant::emulation::half_value)
VARIANT_NARROW(__nv_bfloat16, __nv_bfloat162, variant::emulation::bfloat16_bits,
               variant::emulation::bfloat16_value)
#undef VARIANT_NARROW

using half = __half;
using half2 = __half2;
using nv_bfloat16 = __nv_bfloat16;
using nv_bfloat162 = __nv_bfloat162;

inline __half __float2half(float a) { return a; }
inline __half __float2half_rn(float a) { return a; }
inline float __half2float(__half a) { return a; }
inline __half2 __floats2half2_rn(float a, float b) { return {a, b}; }
inline __half2 __float22half2_rn(float2 a) { return {a.x, a.y}; }
inline __half2 __float2half2_rn(float a) { return {a, a}; }
inline __half2 __halves2half2(__half a, __half b) { return {a, b}; }
inline __half2 __half2half2(__half a) { return {a, a}; }
inline float2 __half22float2(__half2 a) { return {a.x, a.y}; }
inline __half __ushort_as_half(unsigned short a) { return variant::emulation::bits_as<__half>(a); }
inline unsigned short __half_as_ushort(__half a) { return a.bits; }

inline __half __low2half(__half2 a) { return a.x; }
inline __half __high2half(__half2 a) { return a.y; }

inline __nv_bfloat16 __low2bfloat16(__nv_bfloat162 a) { return a.x; }
inline __nv_bfloat16 __high2bfloat16(__nv_bfloat162 a) { return a.y; }
inline __nv_bfloat16 __float2bfloat16(float a) { return a; }
inline __nv_bfloat16 __float2bfloat16_rn(float a) { return a; }
inline float __bfloat162float(__nv_bfloat16 a) { return a; }
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) { return {a, b}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 a) { return {a.x, a.y}; }
inline __nv_bfloat162 __float2bfloat162_rn(float a) { return {a, a}; }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 a, __nv_bfloat16 b) { return {a, b}; }
inline __nv_bfloat162 __bfloat162bfloat162(__nv_bfloat16 a) { return {a, a}; }
inline float2 __bfloat1622float2(__nv_bfloat162 a) { return {a.x, a.y}; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short a) {
  return variant::emulation::bits_as<__nv_bfloat16>(a);
}
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 a) { return a.bits; }
