// Adaptive layer norm, alone and fused with the gated residual before it.
//   xhat = (x - mean(x)) / sqrt(var(x) + eps),  y = xhat * (1 + scale) + shift
// mean and biased var over C, in float32. Outputs are contiguous.
#pragma once

#include "types.h"

namespace variant {

struct AdaLNForwardArgs {
  int64_t batch, tokens, width;
  TokenView x;
  RowView scale, shift;
  void* y;             // (B, T, C), value_dtype
  float *mean, *rstd;  // (B, T)
  float eps;
  DType x_dtype, value_dtype;  // value_dtype: scale, shift, y. x: the same or float32
  int num_threads;
};

struct AdaLNBackwardArgs {
  int64_t batch, tokens, width;
  TokenView grad_y, x;
  RowView scale;
  const float *mean, *rstd;
  void* grad_x;                   // (B, T, C), x_dtype
  void *grad_scale, *grad_shift;  // (B, C), value_dtype
  DType x_dtype, value_dtype;
  int num_threads;
};

// x_out = round(x + gate * y) in x's dtype; h = adaLN(x_out), its statistics taken after rounding.
struct GatedAdaLNForwardArgs {
  int64_t batch, tokens, width;
  TokenView x, y;
  RowView gate, scale, shift;
  void* x_out;         // (B, T, C), x_dtype
  void* h;             // (B, T, C), value_dtype
  float *mean, *rstd;  // (B, T)
  float eps;
  DType x_dtype, value_dtype;
  int num_threads;
};

struct GatedAdaLNBackwardArgs {
  int64_t batch, tokens, width;
  TokenView grad_x_out, grad_h, x_out, y;
  RowView gate, scale;
  const float *mean, *rstd;
  void* grad_x;                               // (B, T, C), x_dtype
  void* grad_y;                               // (B, T, C), value_dtype
  void *grad_gate, *grad_scale, *grad_shift;  // (B, C), value_dtype
  DType x_dtype, value_dtype;
  int num_threads;
};

}  // namespace variant
