// qk_norm and append for 8-bit pages: keys and values are rounded when they are written.
#include "../include/kv8.h"
#include "kv8_round.h"
#include "qk_norm_append_rows.h"

namespace variant::VARIANT_ISA_NAMESPACE {
namespace {

// The widest head that is normalised.
constexpr int64_t kMaxHeadDim = 256;

// Addresses of the heads of one slot.
struct Slot {
  uint8_t* codes;
  int64_t head_stride;
  uint8_t* scales;
};

// Rounds every head of one token. kNorm: first computes x / max(|x|, eps), rounded to T as qk_norm
// returns it. `next`: address of the same heads of the next token, for prefetching.
template <bool kNorm, class T>
inline void round_heads(Heads<const T> x, Slot slot, const T* next, int64_t heads, int64_t width) {
  for (int64_t h = 0; h < heads; ++h) {
    prefetch_bytes(next + h * x.stride, width * static_cast<int64_t>(sizeof(T)));
    const T* row = x.data + h * x.stride;
    alignas(64) T unit[kNorm ? kMaxHeadDim : 1];
    if constexpr (kNorm) {
      normalise_row<false>(row, unit, width, 1.0f);
      row = unit;
    }
    slot.scales[h] = round_row(row, slot.codes + h * slot.head_stride, width);
  }
}

// kStream: queries are written with non-temporal stores.
template <class T, bool kStream>
void fused_rows(const QkNormAppendPagedKv8Args& all) {
  const QkNormAppendPagedKvArgs& a = all.op;
  append_rows<T, kStream>(a, [&](const TokenToStore<T>& token) {
    const auto slot_of = [&](void* pages, int64_t page_stride, int64_t slot_stride,
                             int64_t head_stride, const ScaleView& scales) {
      return Slot{
          static_cast<uint8_t*>(pages) + token.page * page_stride + token.offset * slot_stride,
          head_stride,
          scales.data + token.page * scales.page_stride + token.offset * scales.slot_stride};
    };
    const Slot k_slot =
        slot_of(a.k_pages, a.k_page_stride, a.k_slot_stride, a.k_head_stride, all.k_scales);
    const Slot v_slot =
        slot_of(a.v_pages, a.v_page_stride, a.v_slot_stride, a.v_head_stride, all.v_scales);
    a.scale_mul ? round_heads<true>(token.k, k_slot, token.next_k, a.heads, a.head_dim)
                : round_heads<false>(token.k, k_slot, token.next_k, a.heads, a.head_dim);
    round_heads<false>(token.v, v_slot, token.next_v, a.heads, a.head_dim);
  });
}

template <class T>
void fused(const QkNormAppendPagedKv8Args& all) {
  const QkNormAppendPagedKvArgs& a = all.op;
  const bool streamed = a.scale_mul && streams(a.q_out, a.batch * a.tokens * a.heads,
                                               a.head_dim * static_cast<int64_t>(sizeof(T)));
  streamed ? fused_rows<T, true>(all) : fused_rows<T, false>(all);
}

}  // namespace

void qk_norm_append_paged_kv8(const QkNormAppendPagedKv8Args& all) {
  all.op.dtype == DType::kFloat32 ? fused<float>(all) : fused<BF16>(all);
}

}  // namespace variant::VARIANT_ISA_NAMESPACE
