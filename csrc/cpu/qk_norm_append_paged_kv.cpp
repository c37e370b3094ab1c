// qk_norm and append for pages of the tokens' dtype: float32 and bfloat16.
#include "qk_norm_append_plain.h"

namespace variant::VARIANT_ISA_NAMESPACE {

void qk_norm_append_paged_kv(const QkNormAppendPagedKvArgs& a) {
  if (a.dtype == DType::kFloat16) return qk_norm_append_paged_kv_float16(a);
  a.dtype == DType::kFloat32 ? fused<float>(a) : fused<BF16>(a);
}

}  // namespace variant::VARIANT_ISA_NAMESPACE
