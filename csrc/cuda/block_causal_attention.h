// A token of scale j attends to every token of the scales up to and including j.
#pragma once

#include "../include/block_causal_attention.h"
#include "primitives.h"

namespace variant::cuda {

// The most scales that fit a kernel's arguments.
constexpr int64_t kMostScales = 256;

// Ends of the scales, in tokens; the last end is the length.
struct ScaleEnds {
  int count;
  int end[kMostScales];

  // Returns false if there are too many scales or they do not add up to the length.
  bool set(const int64_t* lengths, int64_t num_scales, int64_t length) {
    if (num_scales < 1 || num_scales > kMostScales) return false;
    int64_t sum = 0;
    count = static_cast<int>(num_scales);
    for (int scale = 0; scale < count; ++scale) {
      sum += lengths[scale];
      end[scale] = static_cast<int>(sum);
    }
    return sum == length;
  }
  // Number of tokens that token t sees.
  __host__ __device__ int visible(int t) const {
    int scale = 0;
    while (end[scale] <= t) ++scale;
    return end[scale];
  }
  // The first token that sees token t.
  __host__ __device__ int begin(int t) const {
    int scale = 0;
    while (end[scale] <= t) ++scale;
    return scale == 0 ? 0 : end[scale - 1];
  }
};

struct BlockCausalBackwardCudaArgs {
  BlockCausalBackwardArgs op;
  float* delta;  // (B, H, L): scratch for the sums over D of grad_out * out
};

}  // namespace variant::cuda
