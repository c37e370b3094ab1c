// Pages of q's dtype.
#include "paged_forward.h"

namespace variant::VARIANT_ISA_NAMESPACE {
namespace {

template <class T>
struct ExactPages {
  typedef const T* Row;
  HeadView k, v;
  Row key(int64_t page, int64_t slot, int64_t h) const { return row<T>(k, page, slot, h); }
  Row value(int64_t page, int64_t slot, int64_t h) const { return row<T>(v, page, slot, h); }
};

}  // namespace

void paged_attention_forward(const PagedAttentionForwardArgs& a) {
  a.dtype == DType::kFloat32 ? forward<float>(a, ExactPages<float>{a.k_pages, a.v_pages})
                             : forward<BF16>(a, ExactPages<BF16>{a.k_pages, a.v_pages});
}

}  // namespace variant::VARIANT_ISA_NAMESPACE
