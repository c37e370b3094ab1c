// 8-bit keys and values: e4m3 (4 exponent bits, 3 mantissa bits, no infinity, NaN 0x7f) with one
// power of two for each token and head, stored as its biased exponent.
// variant_kernels/kv_quantization.py defines the format. Uses integer operations only: sm_80 has no
// conversions of e4m3.
#pragma once

#include "elements.cuh"
#include "primitives.h"

namespace variant::cuda {

constexpr uint32_t kMagnitude32 = 0x7fffffffu, kInfinity32 = 0x7f800000u;

// The scale of a row from the float32 bits of its largest magnitude: the smallest power of two s,
// at least 2^-126, with no magnitude above 448 s.
__device__ inline uint32_t scale_of(uint32_t largest) {
  const int exponent =
      static_cast<int>(largest >> 23) - 8 + ((largest & 0x7fffffu) > 0x600000u ? 1 : 0);
  return exponent < 1 ? 1u : static_cast<uint32_t>(exponent);
}
// s and 1 / s as numbers; a byte of 0 gives s = 0.
__device__ inline float value_of_scale(uint32_t scale) { return __uint_as_float(scale << 23); }
__device__ inline float reciprocal_of_scale(uint32_t scale) {
  return __uint_as_float((254u - scale) << 23);
}

// Rounds to nearest even, for magnitudes up to 448; numbers that are not finite become NaN.
__device__ inline uint32_t e4m3_of(float value) {
  const uint32_t bits = __float_as_uint(value), magnitude = bits & kMagnitude32;
  const uint32_t sign = bits >> 24 & 0x80u;
  if (magnitude >= kInfinity32) return sign | 0x7fu;
  // Below 2^-6 the numbers are 2^-9 apart: the last place of 2^14.
  constexpr uint32_t kSmallestNormal = 121u << 23;
  if (magnitude < kSmallestNormal) {
    return sign | (__float_as_uint(__uint_as_float(magnitude) + 16384.0f) & 0xfu);
  }
  // The carry of a rounded mantissa increments the exponent.
  const uint32_t rounded = magnitude + 0x7ffffu + (magnitude >> 20 & 1u);
  return sign | ((rounded >> 20) - (120u << 3));
}

// Shifted to float32's exponent and mantissa, the bits read as 2^-120 times the number, for
// subnormal numbers too.
__device__ inline float value_of_e4m3(uint32_t code) {
  uint32_t x = (code & 0x7fu) << 20;
  // Only NaN carries into the lowest of the four exponent bits that float32 has in addition.
  x |= ((x + 0x00100000u) & 0x08000000u) * 15u;
  return __uint_as_float(x | (code & 0x80u) << 24) * 1.329227995784916e36f;
}

// Two codes, in the high bytes of the halves of `codes`, as two numbers of T times 2^-kShift:
// exponents are shifted and keep their bias, which is exact for subnormal numbers too.
template <class T>
struct E4m3Pair;
template <>
struct E4m3Pair<Half> {
  static constexpr uint32_t kShift = 8;
  __device__ static uint32_t widen(uint32_t codes) {
    uint32_t x = codes >> 1 & 0x3f803f80u;
    // Only NaN carries into the top bit of the exponent, which makes all its bits ones.
    x |= (x + 0x00800080u) & 0x40004000u;
    return x | (codes & 0x80008000u);
  }
};
template <>
struct E4m3Pair<BF16> {
  static constexpr uint32_t kShift = 120;
  __device__ static uint32_t widen(uint32_t codes) {
    uint32_t x = codes >> 4 & 0x07f007f0u;
    // As above; the carry is copied to the four bits above those that NaN sets.
    x |= ((x + 0x00100010u) & 0x08000800u) * 15u;
    return x | (codes & 0x80008000u);
  }
};

// 16 codes times their scale, as pairs of T. Exact where T holds the numbers; 2^-25 in float16
// is zero.
template <class T>
__device__ inline void widen_sixteen(uint4 codes, uint32_t scale, uint32_t (&x)[8]) {
  // The largest scale whose product with 2^kShift is a number of T; a second product applies the
  // rest.
  constexpr uint32_t kMost = 134;
  const uint32_t near = scale < kMost ? scale : kMost;
  const float factor = __uint_as_float((near + E4m3Pair<T>::kShift) << 23);
  const uint32_t factors = pack2<T>(factor, factor);
  const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t low = __byte_perm(words[i], 0u, 0x1404u);
    const uint32_t high = __byte_perm(words[i], 0u, 0x3424u);
    x[2 * i] = multiply2<T>(E4m3Pair<T>::widen(low), factors);
    x[2 * i + 1] = multiply2<T>(E4m3Pair<T>::widen(high), factors);
  }
  if (scale > kMost) {
    const float rest = scale == 255 ? value_of_e4m3(0x7fu) : value_of_scale(scale - kMost + 127);
    const uint32_t rests = pack2<T>(rest, rest);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = multiply2<T>(x[i], rests);
  }
}

// Whether every row can be read and written 8 bytes at a time.
inline bool starts_at_eights(const HeadView& codes) {
  const int64_t strides = codes.batch_stride | codes.token_stride | codes.head_stride;
  return (reinterpret_cast<uintptr_t>(codes.data) | static_cast<uint64_t>(strides)) % 8 == 0;
}

// All accesses to scales: one byte at any address. cp.async takes aligned words, so this copies the
// word of the byte, up to the byte, and returns the byte's offset in it.
__device__ inline uint32_t copy_scale(uint32_t* to, const uint8_t* scale) {
  const int offset = static_cast<int>(reinterpret_cast<uintptr_t>(scale) % 4);
  cp_async_4(to, scale - offset, offset + 1);
  return static_cast<uint32_t>(offset);
}
__device__ inline uint32_t scale_in_word(uint32_t word, uint32_t offset) {
  return word >> offset * 8 & 0xffu;
}
__device__ inline uint32_t load_scale(const uint8_t* scale) { return *scale; }
__device__ inline void store_scale(uint8_t* scale, uint32_t value) {
  *scale = static_cast<uint8_t>(value);
}

}  // namespace variant::cuda
