// qk_norm and append_paged_kv in one pass: the projection is read once, normalised keys and the
// values go straight to their pages.
#pragma once

#include "../include/qk_norm_append_paged_kv.h"

namespace variant::cuda {

// B, T and H are positive.
struct QkNormAppendPagedKvCudaArgs {
  QkNormAppendPagedKvArgs op;
  // Nobody has looked at the slots: one past the last page is skipped like a negative one.
  int64_t num_pages;
};

// Into 8-bit pages, and each row's scale to (P, N, H), whose last stride is 1. scale_mul null:
// append_paged_kv.
struct QkNormAppendPagedKv8Args {
  QkNormAppendPagedKvCudaArgs all;
  uint8_t *k_scales, *v_scales;
  int64_t k_scale_page_stride, k_scale_slot_stride, v_scale_page_stride, v_scale_slot_stride;
};

}  // namespace variant::cuda
