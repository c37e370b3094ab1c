// Guidance, top-k, top-p and one draw per row.
#pragma once

#include "types.h"

namespace variant {

enum class SampleStatus : int { kOk = 0, kNaN = 1, kPositiveInfinity = 2, kAllMasked = 3 };

// The first row (in (b, t) order) that cannot be sampled.
struct SampleError {
  SampleStatus status;
  int64_t row;
};

struct SampleTokensArgs {
  int64_t batch, tokens, vocab;  // batch: images; logits have 2 * batch rows, conditional first
  TokenView logits;
  double guidance;           // t: a = (1 + t) * conditional - t * unconditional
  int64_t top_k;             // outside 1..V-1: keep all
  double top_p;              // <= 0 or >= 1: keep all
  uint64_t seed;             // Philox key
  const int64_t* image_ids;  // (B,)
  int64_t position;          // of token 0, in its sequence
  const float* exponential;  // (B * T, V) contiguous, or null: Philox
  int64_t* out;              // (B, T) contiguous
  SampleError* error;
  DType dtype;
  int num_threads;
};

}  // namespace variant
