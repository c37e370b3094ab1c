// 8-bit K and V: pages of e4m3 codes and, for every head of every slot, the power of two that they
// are multiplied by, as its biased exponent (E8M0: byte e is 2^(e - 127)).
#pragma once

#include "paged_attention.h"
#include "qk_norm_append_paged_kv.h"

namespace variant {

// (P, N, H) bytes; heads are contiguous.
struct ScaleView {
  uint8_t* data;
  int64_t page_stride, slot_stride;
};

// Both writing ops: without scale_mul this is append_paged_kv. dtype is that of the tokens.
struct QkNormAppendPagedKv8Args {
  QkNormAppendPagedKvArgs op;
  ScaleView k_scales, v_scales;
};

// dtype is that of q and out.
struct PagedAttentionKv8Args {
  PagedAttentionForwardArgs op;
  ScaleView k_scales, v_scales;
};

}  // namespace variant
