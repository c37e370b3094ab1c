// One token at a time: its queries to the output, its keys and values to their slot.
#include "../include/qk_norm_append_paged_kv.h"

#include "parallel.h"
#include "qk_norm_row.h"

namespace variant::VARIANT_ISA_NAMESPACE {
namespace {

constexpr int64_t kTokensPerPiece = 16;

template <class T, bool kStream>
void fused_rows(const QkNormAppendPagedKvArgs& a) {
  const int64_t rows = a.batch * a.tokens, width = a.head_dim;
  const int64_t pieces = (rows + kTokensPerPiece - 1) / kTokensPerPiece;
  Scratch<float> factors(a.heads);
  if (a.scale_mul) query_factors(a.scale_mul, a.heads, factors.get());
  const int threads = threads_for(a.num_threads, rows * a.heads * width);
  parallel_for(threads, pieces, [&](int64_t piece, int) {
    const int64_t end = min_of(rows, (piece + 1) * kTokensPerPiece);
    for (int64_t r = piece * kTokensPerPiece; r < end; ++r) {
      const int64_t b = r / a.tokens, t = r % a.tokens, slot = a.slots[r];
      const int64_t next = min_of(r + 1, end - 1), nb = next / a.tokens, nt = next % a.tokens;
      if (a.scale_mul) {
        normalise_heads<kStream>(Heads<const T>{row<T>(a.q, b, t, 0), a.q.head_stride},
                                 Heads<T>{static_cast<T*>(a.q_out) + r * a.heads * width, width},
                                 row<T>(a.q, nb, nt, 0), a.heads, width, factors.get());
      }
      if (slot < 0) continue;
      const int64_t page = slot / a.page_size, offset = slot % a.page_size;
      const Heads<T> k_slot = {
          static_cast<T*>(a.k_pages) + page * a.k_page_stride + offset * a.k_slot_stride,
          a.k_head_stride};
      const Heads<T> v_slot = {
          static_cast<T*>(a.v_pages) + page * a.v_page_stride + offset * a.v_slot_stride,
          a.v_head_stride};
      const Heads<const T> k = {row<T>(a.k, b, t, 0), a.k.head_stride};
      const T* k_next = row<T>(a.k, nb, nt, 0);
      if (a.scale_mul) {
        normalise_heads<kStream>(k, k_slot, k_next, a.heads, width, nullptr);
      } else {
        copy_heads<kStream>(k, k_slot, k_next, a.heads, width);
      }
      copy_heads<kStream>(Heads<const T>{row<T>(a.v, b, t, 0), a.v.head_stride}, v_slot,
                          row<T>(a.v, nb, nt, 0), a.heads, width);
    }
    end_streams();
  });
}

template <class T>
void fused(const QkNormAppendPagedKvArgs& a) {
  const bool streamed =
      (!a.scale_mul || is_aligned(a.q_out)) && streams_to_pages(a, static_cast<int64_t>(sizeof(T)));
  streamed ? fused_rows<T, true>(a) : fused_rows<T, false>(a);
}

}  // namespace

void qk_norm_append_paged_kv(const QkNormAppendPagedKvArgs& a) {
  a.dtype == DType::kFloat32 ? fused<float>(a) : fused<BF16>(a);
}

}  // namespace variant::VARIANT_ISA_NAMESPACE
