// One token at a time, as in qk_norm_append_paged_kv: keys and values are rounded to 8 bits on
// their way to their slot.
#include "../include/kv8.h"
#include "kv8_round.h"
#include "parallel.h"
#include "qk_norm_row.h"

namespace variant::VARIANT_ISA_NAMESPACE {
namespace {

constexpr int64_t kTokensPerPiece = 16;
// The widest head that is normalised.
constexpr int64_t kMaxHeadDim = 256;

// Where the heads of one slot go.
struct Slot {
  uint8_t* codes;
  int64_t head_stride;
  uint8_t* scales;
};

// Every head of one token. kNorm: x / max(|x|, eps), rounded to T as qk_norm returns it, is what
// is rounded to 8 bits. `next`: where the same heads of the token after it lie.
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

// kStream: queries go around the cache.
template <class T, bool kStream>
void fused_rows(const QkNormAppendPagedKv8Args& all) {
  const QkNormAppendPagedKvArgs& a = all.op;
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
      const auto place = [&](void* pages, int64_t page_stride, int64_t slot_stride,
                             int64_t head_stride, const ScaleView& scales) {
        return Slot{static_cast<uint8_t*>(pages) + page * page_stride + offset * slot_stride,
                    head_stride,
                    scales.data + page * scales.page_stride + offset * scales.slot_stride};
      };
      const Slot k_slot =
          place(a.k_pages, a.k_page_stride, a.k_slot_stride, a.k_head_stride, all.k_scales);
      const Slot v_slot =
          place(a.v_pages, a.v_page_stride, a.v_slot_stride, a.v_head_stride, all.v_scales);
      const Heads<const T> k = {row<T>(a.k, b, t, 0), a.k.head_stride};
      const T* k_next = row<T>(a.k, nb, nt, 0);
      a.scale_mul ? round_heads<true>(k, k_slot, k_next, a.heads, width)
                  : round_heads<false>(k, k_slot, k_next, a.heads, width);
      round_heads<false>(Heads<const T>{row<T>(a.v, b, t, 0), a.v.head_stride}, v_slot,
                         row<T>(a.v, nb, nt, 0), a.heads, width);
    }
    end_streams();
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
