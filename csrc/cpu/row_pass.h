// Passes over rows that are limited by memory bandwidth: they process two vectors at a time,
// prefetch the next row, and write outputs larger than any cache with non-temporal stores.
#pragma once

#include "parallel.h"
#include "simd.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace variant::VARIANT_ISA_NAMESPACE {
namespace {

// Two vectors of a row.
struct Pair {
  VecF a, b;
};
inline Pair operator+(Pair x, Pair y) { return {x.a + y.a, x.b + y.b}; }
inline Pair operator-(Pair x, Pair y) { return {x.a - y.a, x.b - y.b}; }
inline Pair operator*(Pair x, Pair y) { return {x.a * y.a, x.b * y.b}; }
inline Pair operator+(float x, Pair y) { return {x + y.a, x + y.b}; }
inline Pair operator-(Pair x, float y) { return {x.a - y, x.b - y}; }
inline Pair operator*(Pair x, float y) { return {x.a * y, x.b * y}; }
inline Pair operator/(Pair x, float y) { return {x.a / y, x.b / y}; }

// Sums of a row: a pair is added to both vectors, the rest of the row to the first.
inline void accumulate(Pair& sums, Pair x) { sums = sums + x; }
inline void accumulate(Pair& sums, VecF x) { sums.a += x; }
// Halves onto halves, as sum_lanes does, but in registers.
inline float total(Pair sums) {
  const VecF x = sums.a + sums.b;
#if defined(__AVX2__)
#if defined(__AVX512F__)
  // Masked forms: gcc warns about the undefined vector in the others.
  const __m256 eight = _mm256_add_ps(_mm512_maskz_extractf32x8_ps(0xff, (__m512)x, 0),
                                     _mm512_maskz_extractf32x8_ps(0xff, (__m512)x, 1));
#else
  const __m256 eight = (__m256)x;
#endif
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
  return sum_lanes(x);
#endif
}

// Tag of two vectors of a row; Full and Tail are the tags of its rest. Order is the layout in
// memory. InOrder: one vector after the other. Parted (all operands bfloat16): even elements in the
// first vector, odd ones in the second; this makes widening and narrowing cheapest, and sums and
// products do not depend on the order.
struct InOrder {};
struct Parted {};
template <class Order>
struct Both {};
template <class X>
struct OrderOf {
  using Type = InOrder;
};
template <>
struct OrderOf<BF16> {
  using Type = Parted;
};

// Calls f(column, Both<Order>{}) for every pair of vectors, then for_vectors for the rest.
template <class Order, class F>
inline void for_pairs(int64_t width, F f) {
  int64_t column = 0;
  for (; column + 2 * kLanes <= width; column += 2 * kLanes) f(column, Both<Order>{});
  for_vectors(width - column, [&](int64_t i, auto lanes) { f(column + i, lanes); });
}

template <class Order>
inline Pair load(const float* p, Both<Order>) {
  return {load(p), load(p + kLanes)};
}
template <class Order>
inline void store(float* p, Pair x, Both<Order>) {
  store(p, x.a);
  store(p + kLanes, x.b);
}
inline Pair load(const BF16* p, Both<InOrder>) { return {load(p), load(p + kLanes)}; }
inline Pair load(const BF16* p, Both<Parted>) {
  VecU bits;
  __builtin_memcpy(&bits, p, sizeof bits);
  return {(VecF)(bits << 16), (VecF)(bits & 0xffff0000u)};
}

// A pair rounded to bfloat16 as it lies in memory.
#if defined(__AVX512BF16__)
// Rounds to nearest, ties to even; numbers that are subnormal in bfloat16 become zero.
inline VecU narrow_pair(Pair x, InOrder) {
  return (VecU)_mm512_cvtne2ps_pbh((__m512)x.b, (__m512)x.a);
}
inline VecU narrow_pair(Pair x, Parted) {
  // Lane 2 i from the first half, lane 2 i + 1 from the second.
  alignas(64) static constexpr uint16_t kInterleave[32] = {
      0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return (VecU)_mm512_maskz_permutexvar_epi16(0xffffffffu, _mm512_load_si512(kInterleave),
                                              (__m512i)narrow_pair(x, InOrder{}));
}
#else
inline VecU narrow_pair(Pair x, InOrder) {
  VecU16 halves[2] = {narrow(x.a), narrow(x.b)};
  VecU bits;
  __builtin_memcpy(&bits, halves, sizeof bits);
  return bits;
}
inline VecU narrow_pair(Pair x, Parted) {
  const auto round = [](VecF value) {
    const VecU bits = (VecU)value;
    const VecU nearest = bits + 0x7fff + ((bits >> 16) & 1);
    return value == value ? nearest : bits | 0x400000u;
  };
  return (round(x.a) >> 16) | (round(x.b) & 0xffff0000u);
}
#endif
template <class Order>
inline void store(BF16* p, Pair x, Both<Order>) {
  const VecU bits = narrow_pair(x, Order{});
  __builtin_memcpy(p, &bits, sizeof bits);
}

// x as a later load returns it.
template <class Order>
inline Pair rounded(const float*, Pair x, Both<Order>) {
  return x;
}
inline Pair rounded(const BF16*, Pair x, Both<Parted>) {
  const VecU bits = narrow_pair(x, Parted{});
  return {(VecF)(bits << 16), (VecF)(bits & 0xffff0000u)};
}
template <class Lanes>
inline VecF rounded(const float*, VecF x, Lanes) {
  return x;
}
template <class Lanes>
inline VecF rounded(const BF16*, VecF x, Lanes) {
  return widen(narrow(x));
}
template <class Order>
inline Pair zero_beyond(Pair x, Both<Order>) {
  return x;
}

// Outputs of more bytes do not fit any cache (32 MiB is a large last level).
constexpr int64_t kStreamBytes = int64_t{32} << 20;

// A pair of vectors of any element type here is a multiple of this, or divides it.
constexpr int64_t kStreamUnit = 128;

inline bool is_aligned(const void* data) {
  return reinterpret_cast<uintptr_t>(data) % kStreamUnit == 0;
}
// Whether to write an output with non-temporal stores: it is large, and each row starts at a whole
// line.
inline bool streams(const void* data, int64_t rows, int64_t row_bytes) {
  return rows * row_bytes >= kStreamBytes && row_bytes % kStreamUnit == 0 && is_aligned(data);
}

// Non-temporal stores; an ordinary store reads the line first.
template <class Order>
inline void stream(float* p, Pair x, Both<Order>) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)x.a);
  _mm512_stream_ps(p + kLanes, (__m512)x.b);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, (__m256)x.a);
  _mm256_stream_ps(p + kLanes, (__m256)x.b);
#else
  store(p, x, Both<Order>{});
#endif
}
template <class Order>
inline void stream(BF16* p, Pair x, Both<Order>) {
#if defined(__AVX512F__)
  _mm512_stream_si512((__m512i*)p, (__m512i)narrow_pair(x, Order{}));
#elif defined(__AVX2__)
  _mm256_stream_si256((__m256i*)p, (__m256i)narrow_pair(x, Order{}));
#else
  store(p, x, Both<Order>{});
#endif
}
template <class T, class Lanes>
inline void stream(T* p, VecF x, Lanes lanes) {
  store(p, x, lanes);
}
// A non-temporal store or an ordinary one.
template <bool kStream, class T, class X, class Lanes>
inline void put(T* p, X x, Lanes lanes) {
  if constexpr (kStream) {
    stream(p, x, lanes);
  } else {
    store(p, x, lanes);
  }
}
// Orders non-temporal stores before the stores that signal completion to other threads.
inline void end_streams() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// Copies bytes. With kStream the target must start at a whole line and be whole lines long.
template <bool kStream>
inline void copy_bytes(void* target, const void* source, int64_t bytes) {
  if constexpr (kStream) {
    constexpr int64_t kFloats = 2 * kLanes;
    for (int64_t i = 0; i < bytes / 4; i += kFloats) {
      stream(static_cast<float*>(target) + i,
             load(static_cast<const float*>(source) + i, Both<InOrder>{}), Both<InOrder>{});
    }
  } else {
    __builtin_memcpy(target, source, bytes);
  }
}

inline void prefetch_bytes(const void* p, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) {
    __builtin_prefetch(static_cast<const char*>(p) + at);
  }
}

// Heads of one token, `stride` elements apart.
template <class T>
struct Heads {
  T* data;
  int64_t stride;
};

// `next`: address of the same heads of the next token, for prefetching.
template <bool kStream, class T>
inline void copy_heads(Heads<const T> x, Heads<T> y, const T* next, int64_t heads, int64_t width) {
  const int64_t bytes = width * static_cast<int64_t>(sizeof(T));
  if (x.stride == width && y.stride == width) {
    prefetch_bytes(next, heads * bytes);
    copy_bytes<kStream>(y.data, x.data, heads * bytes);
    return;
  }
  for (int64_t h = 0; h < heads; ++h) {
    prefetch_bytes(next + h * x.stride, bytes);
    copy_bytes<kStream>(y.data + h * y.stride, x.data + h * x.stride, bytes);
  }
}

// Whether to write K and V to the pages with non-temporal stores.
template <class Args>
inline bool streams_to_pages(const Args& a, int64_t element_bytes) {
  const int64_t rows = a.batch * a.tokens * a.heads, row_bytes = a.head_dim * element_bytes;
  const int64_t strides = a.k_page_stride | a.k_slot_stride | a.k_head_stride | a.v_page_stride |
                          a.v_slot_stride | a.v_head_stride;
  return streams(a.k_pages, rows, row_bytes) && streams(a.v_pages, rows, row_bytes) &&
         strides * element_bytes % kStreamUnit == 0;
}

// Prefetches the lines of two vectors of the row at p. Into the second level: two rows of 1920
// floats, a gain and a shift are all that a first level of 32 KiB holds.
template <class T>
inline void prefetch_pair(const T* p) {
  constexpr int kBytes = 2 * kLanes * static_cast<int>(sizeof(T));
  for (int at = 0; at < kBytes; at += 64) {
    __builtin_prefetch(reinterpret_cast<const char*>(p) + at, 0, 2);
  }
}

}  // namespace
}  // namespace variant::VARIANT_ISA_NAMESPACE
