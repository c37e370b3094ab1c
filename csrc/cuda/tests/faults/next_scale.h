// A fault for all code after this header: scales are read and written one byte too far.
#pragma once

#include "../../kv8.cuh"

namespace variant::cuda {
__device__ inline uint32_t load_next_scale(const uint8_t* scale) { return load_scale(scale + 1); }
__device__ inline void store_next_scale(uint8_t* scale, uint32_t value) {
  store_scale(scale + 1, value);
}
__device__ inline uint32_t copy_next_scale(uint32_t* to, const uint8_t* scale) {
  return copy_scale(to, scale + 1);
}
}  // namespace variant::cuda

#define copy_scale copy_next_scale
#define load_scale load_next_scale
#define store_scale store_next_scale
