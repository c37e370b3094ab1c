// CUDA's language extensions: qualifiers, vector types, indices.
#pragma once

#include <cstddef>
#include <cstdint>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#ifndef __restrict__
#define __restrict__ __restrict
#endif
// Blocks run one after another in one OS thread, so a block's shared array can be a static one.
// AddressSanitizer guards its ends. Unlike dynamic shared memory it is not poisoned.
#define __shared__ static

#define VARIANT_VECTOR_1(name, T) \
  struct name {                   \
    T x;                          \
  };                              \
  inline name make_##name(T x) { return {x}; }
#define VARIANT_VECTOR_2(name, T)      \
  struct alignas(2 * sizeof(T)) name { \
    T x, y;                            \
  };                                   \
  inline name make_##name(T x, T y) { return {x, y}; }
#define VARIANT_VECTOR_3(name, T) \
  struct name {                   \
    T x, y, z;                    \
  };                              \
  inline name make_##name(T x, T y, T z) { return {x, y, z}; }
#define VARIANT_VECTOR_4(name, T)                                \
  struct alignas(4 * sizeof(T) > 16 ? 16 : 4 * sizeof(T)) name { \
    T x, y, z, w;                                                \
  };                                                             \
  inline name make_##name(T x, T y, T z, T w) { return {x, y, z, w}; }
#define VARIANT_VECTORS(name, T) \
  VARIANT_VECTOR_1(name##1, T)   \
  VARIANT_VECTOR_2(name##2, T)   \
  VARIANT_VECTOR_3(name##3, T)   \
  VARIANT_VECTOR_4(name##4, T)
VARIANT_VECTORS(char, signed char)
VARIANT_VECTORS(uchar, unsigned char)
VARIANT_VECTORS(short, short)
VARIANT_VECTORS(ushort, unsigned short)
VARIANT_VECTORS(int, int)
VARIANT_VECTORS(uint, unsigned int)
VARIANT_VECTORS(float, float)
VARIANT_VECTORS(longlong, long long)
VARIANT_VECTORS(ulonglong, unsigned long long)
VARIANT_VECTORS(double, double)
#undef VARIANT_VECTOR_1
#undef VARIANT_VECTOR_2
#undef VARIANT_VECTOR_3
#undef VARIANT_VECTOR_4
#undef VARIANT_VECTORS

struct dim3 {
  unsigned int x, y, z;
  constexpr dim3(unsigned int x = 1, unsigned int y = 1, unsigned int z = 1) : x(x), y(y), z(z) {}
};

// The scheduler sets these whenever it resumes a thread.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;
