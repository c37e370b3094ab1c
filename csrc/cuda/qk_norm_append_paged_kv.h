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

}  // namespace variant::cuda
