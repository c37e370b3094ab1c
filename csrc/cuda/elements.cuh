// Loads and stores elements of the three dtypes as float32, one or eight (a lane's part of a row)
// at a time.
#pragma once

#include <cstdint>

#include "../include/types.h"
#include "primitives.h"

namespace variant::cuda {

using Half = __half;
using BF16 = __nv_bfloat16;

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(Half x) { return __half2float(x); }
__device__ inline float widen(BF16 x) { return __bfloat162float(x); }

template <class T>
__device__ inline T narrow(float x);
template <>
__device__ inline float narrow<float>(float x) {
  return x;
}
template <>
__device__ inline Half narrow<Half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline BF16 narrow<BF16>(float x) {
  return __float2bfloat16_rn(x);
}

// Whether 16 bytes of each of eight neighbouring rows in shared memory are in different banks, so
// that one access reads them all. The banks repeat every 128 bytes.
constexpr bool spreads_over_banks(int row_bytes) {
  return row_bytes % 16 == 0 && row_bytes / 16 % 2 == 1;
}

constexpr int kEight = 8;
constexpr int kInvalidValue = 1;  // cudaErrorInvalidValue

// kAligned: p is a multiple of 16 bytes, one or two accesses of 16 bytes; else element by element.
template <bool kAligned, class T>
__device__ inline void load_eight(const T* p, float (&x)[kEight]) {
  if constexpr (kAligned) {
    constexpr int kWords = sizeof(T) * kEight / 16;
    alignas(16) T raw[kEight];
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      reinterpret_cast<uint4*>(raw)[i] = reinterpret_cast<const uint4*>(p)[i];
    }
#pragma unroll
    for (int i = 0; i < kEight; ++i) x[i] = widen(raw[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kEight; ++i) x[i] = widen(p[i]);
  }
}

template <bool kAligned, class T>
__device__ inline void store_eight(T* p, const float (&x)[kEight]) {
  if constexpr (kAligned) {
    constexpr int kWords = sizeof(T) * kEight / 16;
    alignas(16) T raw[kEight];
#pragma unroll
    for (int i = 0; i < kEight; ++i) raw[i] = narrow<T>(x[i]);
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      reinterpret_cast<uint4*>(p)[i] = reinterpret_cast<const uint4*>(raw)[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kEight; ++i) p[i] = narrow<T>(x[i]);
  }
}

// Addresses of rows of the views of types.h.
template <class T>
__host__ __device__ inline const T* row(const RowView& x, int64_t b) {
  return static_cast<const T*>(x.data) + b * x.batch_stride;
}
template <class T>
__host__ __device__ inline const T* row(const TokenView& x, int64_t b, int64_t t) {
  return static_cast<const T*>(x.data) + b * x.batch_stride + t * x.token_stride;
}
template <class T>
__host__ __device__ inline const T* row(const HeadView& x, int64_t b, int64_t t, int64_t h) {
  return static_cast<const T*>(x.data) + b * x.batch_stride + t * x.token_stride +
         h * x.head_stride;
}

// Step: the type of a distance between rows in bytes, uint32_t where it fits or int64_t.
template <class Step, class T>
__host__ __device__ inline Step step_of(int64_t stride) {
  return static_cast<Step>(stride * static_cast<int64_t>(sizeof(T)));
}
// The address `rows` >= 0 steps after `from`.
template <class T, class Step>
__device__ inline const T* advance(const T* from, int rows, Step step_bytes) {
  const uint64_t offset = uint64_t{static_cast<uint32_t>(rows)} * static_cast<uint64_t>(step_bytes);
  return reinterpret_cast<const T*>(reinterpret_cast<const char*>(from) + offset);
}

// The rows of one head by token.
template <class T, class Step>
struct HeadRows {
  const T* data;
  Step step;

  __device__ const T* row(int t) const { return advance(data, t, step); }
};
template <class T, class Step>
__device__ inline HeadRows<T, Step> rows_of_head(const HeadView& x, int64_t b, int64_t h) {
  return {row<T>(x, b, 0, h), step_of<Step, T>(x.token_stride)};
}

// Whether a stride of elements is less than 4 GiB.
inline bool is_short(int64_t element_bytes, int64_t stride) {
  return stride >= 0 && stride <= int64_t{UINT32_MAX} / element_bytes;
}

// Whether every row of a view can be read 16 bytes at a time.
inline bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }
inline bool steps_aligned(int64_t element_bytes, int64_t stride) {
  return stride * element_bytes % 16 == 0;
}
inline bool is_aligned(const RowView& x, int64_t element_bytes) {
  return is_aligned(x.data) && steps_aligned(element_bytes, x.batch_stride);
}
inline bool is_aligned(const TokenView& x, int64_t element_bytes) {
  return is_aligned(x.data) && steps_aligned(element_bytes, x.batch_stride) &&
         steps_aligned(element_bytes, x.token_stride);
}
inline bool is_aligned(const HeadView& x, int64_t element_bytes) {
  return is_aligned(x.data) && steps_aligned(element_bytes, x.batch_stride) &&
         steps_aligned(element_bytes, x.token_stride) &&
         steps_aligned(element_bytes, x.head_stride);
}
inline int64_t bytes_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace variant::cuda
