// Copies the rows of new tokens into their slots. The caller has checked the slots and ensures that
// no two tokens share one.
#include "../include/append_paged_kv.h"

#include "parallel.h"
#include "row_pass.h"

namespace variant::VARIANT_ISA_NAMESPACE {
namespace {

constexpr int64_t kTokensPerPiece = 16;

// Only the size of T matters: nothing is computed.
template <class T, bool kStream>
void append_rows(const AppendPagedKvArgs& a) {
  const int64_t num_tokens = a.batch * a.tokens;
  const int64_t pieces = (num_tokens + kTokensPerPiece - 1) / kTokensPerPiece;
  const int threads = threads_for(a.num_threads, num_tokens * a.heads * a.head_dim);
  parallel_for(threads, pieces, [&](int64_t piece, int) {
    const int64_t end = min_of(num_tokens, (piece + 1) * kTokensPerPiece);
    for (int64_t r = piece * kTokensPerPiece; r < end; ++r) {
      const int64_t slot = a.slots[r], b = r / a.tokens, t = r % a.tokens;
      if (slot < 0) continue;
      const int64_t next = min_of(r + 1, end - 1), nb = next / a.tokens, nt = next % a.tokens;
      const int64_t page = slot / a.page_size, offset = slot % a.page_size;
      T* k_slot = static_cast<T*>(a.k_pages) + page * a.k_page_stride + offset * a.k_slot_stride;
      T* v_slot = static_cast<T*>(a.v_pages) + page * a.v_page_stride + offset * a.v_slot_stride;
      copy_heads<kStream>(Heads<const T>{row<T>(a.k, b, t, 0), a.k.head_stride},
                          Heads<T>{k_slot, a.k_head_stride}, row<T>(a.k, nb, nt, 0), a.heads,
                          a.head_dim);
      copy_heads<kStream>(Heads<const T>{row<T>(a.v, b, t, 0), a.v.head_stride},
                          Heads<T>{v_slot, a.v_head_stride}, row<T>(a.v, nb, nt, 0), a.heads,
                          a.head_dim);
    }
    end_streams();
  });
}

template <class T>
void append(const AppendPagedKvArgs& a) {
  streams_to_pages(a, static_cast<int64_t>(sizeof(T))) ? append_rows<T, true>(a)
                                                       : append_rows<T, false>(a);
}

}  // namespace

void append_paged_kv(const AppendPagedKvArgs& a) {
  a.element_bytes == 4 ? append<float>(a) : append<BF16>(a);
}

}  // namespace variant::VARIANT_ISA_NAMESPACE
