// Writes the keys and values of new tokens into their pages.
#pragma once

#include "types.h"

namespace variant {

struct AppendPagedKvArgs {
  int64_t batch, tokens, heads, head_dim, page_size;
  HeadView k, v;
  void *k_pages, *v_pages;  // (P, N, H, D)
  int64_t k_page_stride, k_slot_stride, k_head_stride;
  int64_t v_page_stride, v_slot_stride, v_head_stride;
  const int64_t* slots;  // (B, T) contiguous: page * page_size + offset; negative skips the token
  int element_bytes;
  int num_threads;
};

}  // namespace variant
