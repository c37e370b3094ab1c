// L2 norm of every query and key over D; queries then grow by their head's learned factor.
//   q_out = q / max(|q|, eps) * exp(min(scale_mul, log 100)),  k_out = k / max(|k|, eps)
#pragma once

#include "../include/qk_norm.h"

namespace variant::cuda {

// Rows of the partial sums of the backward pass: each adds up this many tokens.
constexpr int64_t kQkNormTokensPerPiece = 64;

// B, T and H are positive.
struct QkNormBackwardCudaArgs {
  QkNormBackwardArgs op;
  float* partial;  // (ceil(B T / kQkNormTokensPerPiece), H)
};

}  // namespace variant::cuda
