// Every query of sequence b attends to the first kv_lens[b] tokens of its pages.
#pragma once

#include "../include/types.h"

namespace variant::cuda {

// All of B, T, H, P, entries and splits are positive.
struct PagedAttentionArgs {
  int64_t batch, tokens, heads, head_dim;
  int64_t num_pages, page_size, entries;  // entries of a sequence's row in the page table
  // Number of parts that the keys of a sequence are split into, each with its own block; a second
  // kernel combines them. With 1, partial and statistics are not used.
  int64_t splits;
  HeadView q, k_pages, v_pages;
  // Values are not validated on a GPU: kernels clamp lengths to the table's capacity and page
  // numbers to the pool.
  const int32_t* page_table;
  int64_t page_table_stride;
  const int32_t* kv_lens;  // (B,); 0 gives zeros
  void* out;               // (B, T, H, D) contiguous, dtype
  float* partial;          // (S, B, T, H, D)
  float* statistics;       // (2, S, B, T, H): largest unscaled score; sum of exponentials
  float softmax_scale;
  DType dtype;  // of q and out; of the pages too, unless they have scales
};

// Pages are e4m3 codes with scales, (P, N, H) E8M0 bytes; their last stride is 1.
struct PagedAttentionKv8Args {
  PagedAttentionArgs op;
  HeadView k_scales, v_scales;
};

}  // namespace variant::cuda
