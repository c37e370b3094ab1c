// L2 norm of every query and key over D; queries then grow by their head's learned factor.
//   q_out = q / max(|q|, eps) * exp(min(scale_mul, log 100)),  k_out = k / max(|k|, eps)
#pragma once

#include "types.h"

namespace variant {

constexpr float kQkNormEps = 1e-12f;
constexpr double kMaxLogScale = 4.605170185988092;  // log 100

struct QkNormForwardArgs {
  int64_t batch, tokens, heads, head_dim;
  HeadView q, k;
  const float* scale_mul;  // (H,)
  void *q_out, *k_out;     // (B, T, H, D) contiguous, dtype
  DType dtype;
  int num_threads;
};

struct QkNormBackwardArgs {
  int64_t batch, tokens, heads, head_dim;
  HeadView grad_q, grad_k, q, k;
  const float* scale_mul;
  void *dq, *dk;      // (B, T, H, D) contiguous, dtype
  float* dscale_mul;  // (H,)
  DType dtype;
  int num_threads;
};

}  // namespace variant
