// Sums and maxima over lanes and over a block, always in the same order.
#pragma once

#include "primitives.h"

namespace variant::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarp = 32;

struct Plus {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Largest {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// Over groups of kLanes neighbouring lanes; every lane gets the result. All 32 lanes take part.
template <int kLanes, class T, class Op>
__device__ inline T reduce_lanes(T x, Op op) {
#pragma unroll
  for (int apart = kLanes / 2; apart > 0; apart /= 2) {
    x = op(x, __shfl_xor_sync(kAllLanes, x, apart));
  }
  return x;
}

// Over the block; every thread gets the result. scratch: shared, one T a warp; free on return.
template <class T, class Op>
__device__ inline T reduce_block(T x, T* scratch, Op op) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int warps = blockDim.x / kWarp;
  x = reduce_lanes<kWarp>(x, op);
  if (lane == 0) scratch[warp] = x;
  __syncthreads();
  x = scratch[0];
  for (int i = 1; i < warps; ++i) x = op(x, scratch[i]);
  __syncthreads();
  return x;
}

// The sum of lanes 0..lane.
template <class T>
__device__ inline T scan_lanes(T x) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int apart = 1; apart < kWarp; apart *= 2) {
    const T before = __shfl_up_sync(kAllLanes, x, apart);
    if (lane >= apart) x += before;
  }
  return x;
}

}  // namespace variant::cuda
