// The tanh-approximated GELU and its gradient, element by element:
//   y = x / 2 * (1 + tanh(u)) = x / (1 + exp(-2 u)),  u = sqrt(2 / pi) * (x + 0.044715 x^3)
#pragma once

#include "types.h"

namespace variant {

struct GeluForwardArgs {
  int64_t count;
  const void* x;
  void* y;
  DType dtype;
  int num_threads;
};

struct GeluBackwardArgs {
  int64_t count;
  const void *grad_y, *x;
  void* grad_x;
  DType dtype;
  int num_threads;
};

}  // namespace variant
