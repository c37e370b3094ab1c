// Paged attention over 8-bit pages: what differs from pages of the queries' dtype.
#pragma once

#include "kv8_tiles.cuh"
#include "paged_attention.cuh"

namespace variant::cuda {

template <class T>
struct PagedKv8Source : PagedSource<T, uint8_t> {
  const uint8_t *k_scales, *v_scales;
  int64_t k_scale_page_stride, k_scale_slot_stride, v_scale_page_stride, v_scale_slot_stride;
  bool wide;  // rows start at multiples of 16 bytes, not only of 8

  __device__ void locate(int s, Kv8Row* k, Kv8Row* v) const {
    int64_t slot;
    const int page = this->find(s, &slot);
    k->codes = this->k_pages + page * this->k_page_stride + slot * this->k_slot_stride;
    v->codes = this->v_pages + page * this->v_page_stride + slot * this->v_slot_stride;
    k->scale = k_scales + page * k_scale_page_stride + slot * k_scale_slot_stride;
    v->scale = v_scales + page * v_scale_page_stride + slot * v_scale_slot_stride;
  }
};

struct PagedKv8Params : PagedParams {
  HeadView k_scales, v_scales;
  bool wide;

  template <class T>
  using Source = PagedKv8Source<T>;
  template <class T, int kHeadDim, int kKeys, int kWarps>
  using Tile = Kv8SoftmaxTile<T, kHeadDim, kKeys, kWarps>;
  template <class T, int kColumns>
  using PlainTile = Kv8PlainTile<T, kColumns>;

  template <class T>
  __device__ void add_to(PagedKv8Source<T>& source, int64_t h) const {
    source.k_scales = row<uint8_t>(k_scales, 0, 0, h);
    source.v_scales = row<uint8_t>(v_scales, 0, 0, h);
    source.k_scale_page_stride = k_scales.batch_stride;
    source.k_scale_slot_stride = k_scales.token_stride;
    source.v_scale_page_stride = v_scales.batch_stride;
    source.v_scale_slot_stride = v_scales.token_stride;
    source.wide = wide;
  }
  explicit PagedKv8Params(const PagedAttentionKv8Args& args)
      : PagedParams{args.op, -1, 0.0f, false},
        k_scales(args.k_scales),
        v_scales(args.v_scales),
        wide(is_aligned(a.k_pages, 1) && is_aligned(a.v_pages, 1)) {}
  bool fits_tiles() const {
    return is_aligned(a.q, 2) && starts_at_eights(a.k_pages) && starts_at_eights(a.v_pages);
  }
};

}  // namespace variant::cuda
