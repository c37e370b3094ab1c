// qk_norm and append for pages of the tokens' dtype.
#pragma once

#include "qk_norm_append_rows.h"

namespace variant::VARIANT_ISA_NAMESPACE {

// Of qk_norm_append_paged_kv_float16.cpp.
void qk_norm_append_paged_kv_float16(const QkNormAppendPagedKvArgs& a);

namespace {

template <class T, bool kStream>
void fused_rows(const QkNormAppendPagedKvArgs& a) {
  append_rows<T, kStream>(a, [&](const TokenToStore<T>& token) {
    const Heads<T> k_slot = {
        static_cast<T*>(a.k_pages) + token.page * a.k_page_stride + token.offset * a.k_slot_stride,
        a.k_head_stride};
    const Heads<T> v_slot = {
        static_cast<T*>(a.v_pages) + token.page * a.v_page_stride + token.offset * a.v_slot_stride,
        a.v_head_stride};
    if (a.scale_mul) {
      normalise_heads<kStream>(token.k, k_slot, token.next_k, a.heads, a.head_dim, nullptr);
    } else {
      copy_heads<kStream>(token.k, k_slot, token.next_k, a.heads, a.head_dim);
    }
    copy_heads<kStream>(token.v, v_slot, token.next_v, a.heads, a.head_dim);
  });
}

template <class T>
void fused(const QkNormAppendPagedKvArgs& a) {
  const bool streamed =
      (!a.scale_mul || is_aligned(a.q_out)) && streams_to_pages(a, static_cast<int64_t>(sizeof(T)));
  streamed ? fused_rows<T, true>(a) : fused_rows<T, false>(a);
}

}  // namespace
}  // namespace variant::VARIANT_ISA_NAMESPACE
