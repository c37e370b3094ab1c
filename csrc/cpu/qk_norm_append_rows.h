// The loop of qk_norm_append_paged_kv over tokens, for pages of any dtype. It writes the queries;
// the caller's function writes keys and values to their slot.
#pragma once

#include "../include/qk_norm_append_paged_kv.h"
#include "parallel.h"
#include "qk_norm_row.h"

namespace variant::VARIANT_ISA_NAMESPACE {
namespace {

constexpr int64_t kTokensPerPiece = 16;

// A token that has a slot: addresses of its keys and values and of those of the next token, and the
// slot's page and offset.
template <class T>
struct TokenToStore {
  Heads<const T> k, v;
  const T *next_k, *next_v;
  int64_t page, offset;
};

// kStream: queries are written with non-temporal stores.
template <class T, bool kStream, class Store>
inline void append_rows(const QkNormAppendPagedKvArgs& a, Store store) {
  const int64_t num_tokens = a.batch * a.tokens, width = a.head_dim;
  const int64_t pieces = (num_tokens + kTokensPerPiece - 1) / kTokensPerPiece;
  Scratch<float> factors(a.heads);
  if (a.scale_mul) query_factors(a.scale_mul, a.heads, factors.get());
  const int threads = threads_for(a.num_threads, num_tokens * a.heads * width);
  parallel_for(threads, pieces, [&](int64_t piece, int) {
    const int64_t end = min_of(num_tokens, (piece + 1) * kTokensPerPiece);
    for (int64_t r = piece * kTokensPerPiece; r < end; ++r) {
      const int64_t b = r / a.tokens, t = r % a.tokens, slot = a.slots[r];
      const int64_t next = min_of(r + 1, end - 1), nb = next / a.tokens, nt = next % a.tokens;
      if (a.scale_mul) {
        normalise_heads<kStream>(Heads<const T>{row<T>(a.q, b, t, 0), a.q.head_stride},
                                 Heads<T>{static_cast<T*>(a.q_out) + r * a.heads * width, width},
                                 row<T>(a.q, nb, nt, 0), a.heads, width, factors.get());
      }
      if (slot < 0) continue;
      store(TokenToStore<T>{{row<T>(a.k, b, t, 0), a.k.head_stride},
                            {row<T>(a.v, b, t, 0), a.v.head_stride},
                            row<T>(a.k, nb, nt, 0),
                            row<T>(a.v, nb, nt, 0),
                            slot / a.page_size,
                            slot % a.page_size});
    }
    end_streams();
  });
}

}  // namespace
}  // namespace variant::VARIANT_ISA_NAMESPACE
