// Copies the rows of new tokens into their slots. The caller has checked the slots and sees to it
// that no two tokens share one.
#include "../include/append_paged_kv.h"

#include "parallel.h"

namespace variant::VARIANT_ISA_NAMESPACE {

void append_paged_kv(const AppendPagedKvArgs& a) {
  const int64_t bytes = a.element_bytes, row_bytes = a.head_dim * bytes;
  const auto copy = [&](const HeadView& from, void* pages, int64_t page_stride, int64_t slot_stride,
                        int64_t head_stride, int64_t b, int64_t t, int64_t slot) {
    const char* source = static_cast<const char*>(from.data) +
                         (b * from.batch_stride + t * from.token_stride) * bytes;
    char* target = static_cast<char*>(pages) +
                   (slot / a.page_size * page_stride + slot % a.page_size * slot_stride) * bytes;
    if (from.head_stride == a.head_dim && head_stride == a.head_dim) {
      __builtin_memcpy(target, source, a.heads * row_bytes);
      return;
    }
    for (int64_t h = 0; h < a.heads; ++h) {
      __builtin_memcpy(target + h * head_stride * bytes, source + h * from.head_stride * bytes,
                       row_bytes);
    }
  };
  const int64_t rows = a.batch * a.tokens;
  constexpr int64_t kRowsPerPiece = 16;
  const int64_t pieces = (rows + kRowsPerPiece - 1) / kRowsPerPiece;
  const int threads = threads_for(a.num_threads, rows * a.heads * a.head_dim);
  parallel_for(threads, pieces, [&](int64_t piece, int) {
    const int64_t end = min_of(rows, (piece + 1) * kRowsPerPiece);
    for (int64_t r = piece * kRowsPerPiece; r < end; ++r) {
      const int64_t slot = a.slots[r], b = r / a.tokens, t = r % a.tokens;
      if (slot < 0) continue;
      copy(a.k, a.k_pages, a.k_page_stride, a.k_slot_stride, a.k_head_stride, b, t, slot);
      copy(a.v, a.v_pages, a.v_page_stride, a.v_slot_stride, a.v_head_stride, b, t, slot);
    }
  });
}

}  // namespace variant::VARIANT_ISA_NAMESPACE
