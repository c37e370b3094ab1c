// Arithmetic and bit intrinsics. Those that a GPU approximates (__expf, __logf, rsqrtf, ...) are
// correctly rounded or nearly so here; EMULATION.md lists the differences.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>

#include "half.h"
#include "language.h"
#include "scheduler.h"

#define VARIANT_MIN_MAX(T)                         \
  inline T min(T a, T b) { return b < a ? b : a; } \
  inline T max(T a, T b) { return a < b ? b : a; }
VARIANT_MIN_MAX(int)
VARIANT_MIN_MAX(unsigned)
VARIANT_MIN_MAX(long)
VARIANT_MIN_MAX(unsigned long)
VARIANT_MIN_MAX(long long)
VARIANT_MIN_MAX(unsigned long long)
#undef VARIANT_MIN_MAX
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
inline double min(double a, double b) { return std::fmin(a, b); }
inline double max(double a, double b) { return std::fmax(a, b); }

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __frsqrt_rn(float a) { return static_cast<float>(1.0 / std::sqrt(double{a})); }
inline float rsqrtf(float a) { return __frsqrt_rn(a); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float a) { return std::exp(a); }
inline float __exp10f(float a) { return std::pow(10.0f, a); }
inline float __logf(float a) { return std::log(a); }
inline float __log2f(float a) { return std::log2(a); }
inline float __powf(float a, float b) { return std::pow(a, b); }
inline float __sinf(float a) { return std::sin(a); }
inline float __cosf(float a) { return std::cos(a); }
inline float __saturatef(float a) { return a > 0 ? (a < 1 ? a : 1) : 0; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }

namespace variant::emulation {
// Conversions to integers: NaN becomes 0, numbers out of range become the nearest limit.
template <class To>
To saturate(double value) {
  if (std::isnan(value)) return 0;
  if (value <= static_cast<double>(std::numeric_limits<To>::min())) {
    return std::numeric_limits<To>::min();
  }
  if (value >= static_cast<double>(std::numeric_limits<To>::max())) {
    return std::numeric_limits<To>::max();
  }
  return static_cast<To>(value);
}
}  // namespace variant::emulation
inline int __float2int_rn(float a) { return variant::emulation::saturate<int>(std::nearbyint(a)); }
inline int __float2int_rz(float a) { return variant::emulation::saturate<int>(std::trunc(a)); }
inline int __float2int_rd(float a) { return variant::emulation::saturate<int>(std::floor(a)); }
inline int __float2int_ru(float a) { return variant::emulation::saturate<int>(std::ceil(a)); }
inline unsigned __float2uint_rn(float a) {
  return variant::emulation::saturate<unsigned>(std::nearbyint(a));
}
inline unsigned __float2uint_rz(float a) {
  return variant::emulation::saturate<unsigned>(std::trunc(a));
}
inline long long __float2ll_rn(float a) {
  return variant::emulation::saturate<long long>(std::nearbyint(a));
}
inline float __int2float_rn(int a) { return static_cast<float>(a); }
inline float __uint2float_rn(unsigned a) { return static_cast<float>(a); }
inline float __ll2float_rn(long long a) { return static_cast<float>(a); }
inline float __ull2float_rn(unsigned long long a) { return static_cast<float>(a); }
inline float __double2float_rn(double a) { return static_cast<float>(a); }

inline int __float_as_int(float a) { return variant::emulation::bits_as<int>(a); }
inline unsigned __float_as_uint(float a) { return variant::emulation::bits_as<unsigned>(a); }
inline float __int_as_float(int a) { return variant::emulation::bits_as<float>(a); }
inline float __uint_as_float(unsigned a) { return variant::emulation::bits_as<float>(a); }
inline long long __double_as_longlong(double a) {
  return variant::emulation::bits_as<long long>(a);
}
inline double __longlong_as_double(long long a) { return variant::emulation::bits_as<double>(a); }

inline int __clz(int a) { return a ? __builtin_clz(static_cast<unsigned>(a)) : 32; }
inline int __clzll(long long a) {
  return a ? __builtin_clzll(static_cast<unsigned long long>(a)) : 64;
}
inline int __ffs(int a) { return __builtin_ffs(a); }
inline int __ffsll(long long a) { return __builtin_ffsll(a); }
inline int __popc(unsigned a) { return __builtin_popcount(a); }
inline int __popcll(unsigned long long a) { return __builtin_popcountll(a); }
inline unsigned __brev(unsigned a) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (a >> i & 1) << (31 - i);
  return reversed;
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}
inline int __mulhi(int a, int b) { return static_cast<int>(static_cast<int64_t>(a) * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) << (shift & 31) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned pick = selector >> 4 * i & 15;
    unsigned byte = static_cast<unsigned>(bytes >> 8 * (pick & 7)) & 0xff;
    if (pick & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= byte << 8 * i;
  }
  return result;
}

template <class T>
T __ldg(const T* at) {
  return *at;
}
template <class T>
T __ldcg(const T* at) {
  return *at;
}
template <class T>
T __ldcs(const T* at) {
  return *at;
}
template <class T>
void __stcg(T* at, T value) {
  *at = value;
}
template <class T>
void __stcs(T* at, T value) {
  *at = value;
}

[[noreturn]] inline void __trap() { variant::emulation::fault("__trap()"); }
