// Guidance, top-k, top-p and one draw per row.
#pragma once

#include "../include/types.h"

namespace variant::cuda {

// The longest row: the sum of its 46-bit weights must fit 63 bits.
constexpr int64_t kMostEntries = 65536;

// B, T and V are positive.
struct SampleTokensArgs {
  int64_t batch, tokens, vocab;  // batch: images; logits have 2 * batch rows, conditional first
  TokenView logits;
  double guidance;               // t: a = (1 + t) * conditional - t * unconditional
  const double* guidance_later;  // null, or the address from which the kernel reads t
  int64_t top_k;                 // outside 1..V-1: keep all
  double top_p;                  // <= 0 or >= 1: keep all
  int64_t seed;                  // Philox key
  const int64_t* seed_later;     // null, or the address from which the kernel reads it
  const int64_t* image_ids;      // (B,)
  int64_t image_stride;
  int64_t position;          // of token 0, in its sequence
  const float* exponential;  // (B * T, V) contiguous, or null: Philox
  int64_t* out;              // (B, T) contiguous; 0 for a row that cannot be sampled
  DType dtype;
};

}  // namespace variant::cuda
