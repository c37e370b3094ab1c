// 8-bit K and V: pages of e4m3 codes, and for every head of every slot a power of two as scale,
// stored as its biased exponent (E8M0: byte e is 2^(e - 127)).
#pragma once

#include "paged_attention.h"
#include "qk_norm_append_paged_kv.h"

namespace variant {

// (P, N, H) bytes; heads are contiguous.
struct ScaleView {
  uint8_t* data;
  int64_t page_stride, slot_stride;
};

// Arguments of both appending ops: with scale_mul null this is append_paged_kv. dtype is the dtype
// of the tokens.
struct QkNormAppendPagedKv8Args {
  QkNormAppendPagedKvArgs op;
  ScaleView k_scales, v_scales;
};

// dtype is the dtype of q and out.
struct PagedAttentionKv8Args {
  PagedAttentionForwardArgs op;
  ScaleView k_scales, v_scales;
};

}  // namespace variant
