// Paged attention over 8-bit pages: the parts that differ from pages of the queries' dtype.
#pragma once

#include "kv8_tiles.cuh"
#include "paged_attention.cuh"

namespace variant::cuda {

template <class T, class Step>
struct PagedKv8Source : PagedSource<T, Step, uint8_t> {
  HeadPages<uint8_t, Step> k_scales, v_scales;
  bool wide;  // rows start at multiples of 16 bytes, not only of 8

  __device__ void locate(int s, Kv8Row* k, Kv8Row* v) const {
    int slot;
    const int page = this->find(s, &slot);
    k->codes = this->k_pages.row(page, slot);
    v->codes = this->v_pages.row(page, slot);
    k->scale = k_scales.row(page, slot);
    v->scale = v_scales.row(page, slot);
  }
};

struct PagedKv8Params : PagedParams {
  HeadView k_scales, v_scales;
  bool wide;

  template <class T, class Step>
  using Source = PagedKv8Source<T, Step>;
  template <class T, int kHeadDim, int kKeys, int kWarps>
  using Tile = Kv8SoftmaxTile<T, kHeadDim, kKeys, kWarps>;
  template <class T, int kColumns>
  using PlainTile = Kv8PlainTile<T, kColumns>;

  template <class T, class Step>
  __device__ void set_scales(PagedKv8Source<T, Step>& source, int64_t h) const {
    source.k_scales = pages_of_head<uint8_t, Step>(k_scales, h);
    source.v_scales = pages_of_head<uint8_t, Step>(v_scales, h);
    source.wide = wide;
  }
  explicit PagedKv8Params(const PagedAttentionKv8Args& args)
      : PagedParams{args.op, {}, 0.0f, false},
        k_scales(args.k_scales),
        v_scales(args.v_scales),
        wide(is_aligned(a.k_pages, 1) && is_aligned(a.v_pages, 1)) {}
  bool fits_tiles() const {
    for (const HeadView* pages : {&a.k_pages, &a.v_pages, &k_scales, &v_scales}) {
      if (!is_short(1, pages->batch_stride) || !is_short(1, pages->token_stride)) return false;
    }
    return cuda::fits_tiles(a.q) && starts_at_eights(a.k_pages) && starts_at_eights(a.v_pages);
  }
};

}  // namespace variant::cuda
