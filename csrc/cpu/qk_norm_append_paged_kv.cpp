// One token at a time: its queries to the output, its keys and values to their slot.
#include "../include/qk_norm_append_paged_kv.h"

#include "parallel.h"
#include "qk_norm_row.h"

namespace variant::VARIANT_ISA_NAMESPACE {
namespace {

constexpr int64_t kTokensPerPiece = 16;

template <class T>
void fused(const QkNormAppendPagedKvArgs& a) {
  const int64_t rows = a.batch * a.tokens, width = a.head_dim;
  const int64_t pieces = (rows + kTokensPerPiece - 1) / kTokensPerPiece;
  Scratch<float> factors(a.heads);
  if (a.scale_mul) query_factors(a.scale_mul, a.heads, factors.get());
  const int threads = threads_for(a.num_threads, rows * a.heads * width);
  parallel_for(threads, pieces, [&](int64_t piece, int) {
    const int64_t end = min_of(rows, (piece + 1) * kTokensPerPiece);
    for (int64_t r = piece * kTokensPerPiece; r < end; ++r) {
      const int64_t b = r / a.tokens, t = r % a.tokens, slot = a.slots[r];
      if (a.scale_mul) {
        T* q_out = static_cast<T*>(a.q_out) + r * a.heads * width;
        normalise_heads(row<T>(a.q, b, t, 0), a.q.head_stride, q_out, width, a.heads, width,
                        factors.get());
      }
      if (slot < 0) continue;
      const int64_t page = slot / a.page_size, offset = slot % a.page_size;
      T* k_slot = static_cast<T*>(a.k_pages) + page * a.k_page_stride + offset * a.k_slot_stride;
      T* v_slot = static_cast<T*>(a.v_pages) + page * a.v_page_stride + offset * a.v_slot_stride;
      const T* k = row<T>(a.k, b, t, 0);
      if (a.scale_mul) {
        normalise_heads(k, a.k.head_stride, k_slot, a.k_head_stride, a.heads, width, nullptr);
      } else {
        copy_heads(k, a.k.head_stride, k_slot, a.k_head_stride, a.heads, width);
      }
      copy_heads(row<T>(a.v, b, t, 0), a.v.head_stride, v_slot, a.v_head_stride, a.heads, width);
    }
  });
}

}  // namespace

void qk_norm_append_paged_kv(const QkNormAppendPagedKvArgs& a) {
  a.dtype == DType::kFloat32 ? fused<float>(a) : fused<BF16>(a);
}

}  // namespace variant::VARIANT_ISA_NAMESPACE
