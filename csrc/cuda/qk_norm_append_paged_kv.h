// qk_norm and append_paged_kv in one pass: reads the projection once and writes normalised keys and
// the values to their pages.
#pragma once

#include "../include/qk_norm_append_paged_kv.h"

namespace variant::cuda {

// B, T and H are positive.
struct QkNormAppendPagedKvCudaArgs {
  QkNormAppendPagedKvArgs op;
  // Slots are not validated on a GPU: a slot past the last page is skipped like a negative one.
  int64_t num_pages;
};

// The same for 8-bit pages. Scales are (P, N, H), one a row; their last stride is 1. With scale_mul
// null this is append_paged_kv.
struct QkNormAppendPagedKv8Args {
  QkNormAppendPagedKvCudaArgs all;
  uint8_t *k_scales, *v_scales;
  int64_t k_scale_page_stride, k_scale_slot_stride, v_scale_page_stride, v_scale_slot_stride;
};

}  // namespace variant::cuda
