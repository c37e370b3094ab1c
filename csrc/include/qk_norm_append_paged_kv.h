// qk_norm and append_paged_kv in one pass: reads the projection once and writes normalised keys and
// the values to their pages.
#pragma once

#include "types.h"

namespace variant {

struct QkNormAppendPagedKvArgs {
  int64_t batch, tokens, heads, head_dim, page_size;
  HeadView q, k, v;
  const float* scale_mul;   // (H,), or null: nothing is normalised and q is not read
  void* q_out;              // (B, T, H, D) contiguous, dtype; null with scale_mul
  void *k_pages, *v_pages;  // (P, N, H, D)
  int64_t k_page_stride, k_slot_stride, k_head_stride;
  int64_t v_page_stride, v_slot_stride, v_head_stride;
  const int64_t* slots;  // (B, T) contiguous: page * page_size + offset; negative: no K, no V
  DType dtype;
  int num_threads;
};

}  // namespace variant
