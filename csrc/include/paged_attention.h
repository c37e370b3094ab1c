// Every query of sequence b attends to the first kv_lens[b] tokens of its pages.
#pragma once

#include "types.h"

namespace variant {

struct PagedAttentionForwardArgs {
  int64_t batch, tokens, heads, head_dim, page_size;
  HeadView q, k_pages, v_pages;
  const int32_t* page_table;  // (B, M): entries past the length are never read
  int64_t page_table_stride;
  const int32_t* kv_lens;  // (B,); 0 gives zeros
  void* out;               // (B, T, H, D) contiguous, dtype
  float softmax_scale;
  DType dtype;
  int num_threads;
};

}  // namespace variant
