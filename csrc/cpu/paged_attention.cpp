// Pages of q's dtype: float32 and bfloat16.
#include "paged_forward.h"

namespace variant::VARIANT_ISA_NAMESPACE {

void paged_attention_forward(const PagedAttentionForwardArgs& a) {
  if (a.dtype == DType::kFloat16) return paged_attention_float16_forward(a);
  a.dtype == DType::kFloat32 ? forward<float>(a, PlainPages<float>{a.k_pages, a.v_pages})
                             : forward<BF16>(a, PlainPages<BF16>{a.k_pages, a.v_pages});
}

}  // namespace variant::VARIANT_ISA_NAMESPACE
