// 8-bit pages, decoded while they are packed. A separate file: in one file the compiler inlines
// less of the kernels for pages of q's dtype, which then took up to 1.15 times as long.
#include "../include/kv8.h"
#include "kv8_pack.h"
#include "paged_forward.h"

namespace variant::VARIANT_ISA_NAMESPACE {
namespace {

struct ScaledPages {
  typedef ScaledCodes Row;
  HeadView k, v;
  ScaleView k_scales, v_scales;
  static Row at(const HeadView& codes, const ScaleView& scales, int64_t page, int64_t slot,
                int64_t h) {
    return {row<uint8_t>(codes, page, slot, h),
            scales.data[page * scales.page_stride + slot * scales.slot_stride + h]};
  }
  Row key(int64_t page, int64_t slot, int64_t h) const { return at(k, k_scales, page, slot, h); }
  Row value(int64_t page, int64_t slot, int64_t h) const { return at(v, v_scales, page, slot, h); }
};

}  // namespace

void paged_attention_kv8_forward(const PagedAttentionKv8Args& all) {
  const PagedAttentionForwardArgs& a = all.op;
  const ScaledPages pages = {a.k_pages, a.v_pages, all.k_scales, all.v_scales};
  a.dtype == DType::kFloat32 ? forward<float>(a, pages) : forward<BF16>(a, pages);
}

}  // namespace variant::VARIANT_ISA_NAMESPACE
