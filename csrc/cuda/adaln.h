// Adaptive layer norm, alone and fused with the gated residual before it, forward and backward.
#pragma once

#include "../include/adaln.h"

namespace variant::cuda {

// Sums over tokens are taken over tiles of this many, then over the tiles in order.
constexpr int64_t kAdaLNTokensPerTile = 16;

// B, T and C are positive.
struct AdaLNBackwardCudaArgs {
  AdaLNBackwardArgs op;
  float* partial;  // (B, tiles, 2, C): grad_scale, grad_shift
};
struct GatedAdaLNBackwardCudaArgs {
  GatedAdaLNBackwardArgs op;
  float* partial;  // (B, tiles, 3, C): grad_scale, grad_shift, grad_gate
};

}  // namespace variant::cuda
