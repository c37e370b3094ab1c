// A token of scale j attends to every token of the scales up to and including j.
#pragma once

#include "types.h"

namespace variant {

struct BlockCausalForwardArgs {
  int64_t batch, length, heads, head_dim;
  HeadView q, k, v;
  const int64_t* scale_lengths;  // (num_scales,), all positive, their sum is length
  int64_t num_scales;
  void* out;   // (B, L, H, D) contiguous, dtype
  float* lse;  // (B, H, L): log of the sum of exp(softmax_scale * q.k)
  float softmax_scale;
  DType dtype;
  int num_threads;
};

struct BlockCausalBackwardArgs {
  int64_t batch, length, heads, head_dim;
  HeadView grad_out, q, k, v, out;
  const float* lse;  // (B, H, L)
  const int64_t* scale_lengths;
  int64_t num_scales;
  void *dq, *dk, *dv;  // (B, L, H, D) contiguous, dtype
  float softmax_scale;
  DType dtype;
  int num_threads;
};

}  // namespace variant
