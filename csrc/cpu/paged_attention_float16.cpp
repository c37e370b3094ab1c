// float16 pages and queries, widened while they are packed. A separate file, as the one of 8-bit
// pages is.
#include "float16.h"
#include "paged_forward.h"

namespace variant::VARIANT_ISA_NAMESPACE {

void paged_attention_float16_forward(const PagedAttentionForwardArgs& a) {
  forward<FP16>(a, PlainPages<FP16>{a.k_pages, a.v_pages});
}

}  // namespace variant::VARIANT_ISA_NAMESPACE
