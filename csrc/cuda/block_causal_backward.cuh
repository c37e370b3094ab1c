// What both kinds of kernels for the gradients of block-causal attention share
// (block_causal_attention_backward.cu).
#pragma once

#include "block_causal_attention.h"
#include "elements.cuh"
#include "tile_copy.cuh"
#include "tile_order.h"

namespace variant::cuda {

constexpr float kLog2OfE = 1.4426950408889634f;

struct BackwardParams {
  BlockCausalBackwardArgs a;
  float* delta;
  ScaleEnds ends;
  TileOrder order;
  int64_t cache_bytes;  // of the device's L2
  float scale_log2;
};

// The tile of one block: rows [begin, begin + rows), which meet the rows [first, last), all of
// them. Tiles are cut at the ends of scales, so no product needs a mask.
template <class T, class Step>
struct BackwardBlock {
  int64_t b, h;
  int begin, rows, first, last;
  RowPairs<T, Step> own, other;  // of qk and of gv
  const float *lse, *delta;

  // The index of own row r in (B, L, H).
  __device__ int64_t index(const BlockCausalBackwardArgs& a, int r) const {
    return (b * a.length + begin + r) * a.heads + h;
  }
};

template <class T, class Step, bool kForKeys, int kRows>
__device__ inline BackwardBlock<T, Step> tile_of_block(const BackwardParams& p, unsigned number) {
  const BlockCausalBackwardArgs& a = p.a;
  const unsigned heads = static_cast<unsigned>(a.heads);
  const TilePlace place = p.order.place(number);
  const ScaleTile tile = p.ends.tile<kRows>(static_cast<int>(place.tile));
  BackwardBlock<T, Step> block;
  block.b = place.head / heads;
  block.h = place.head % heads;
  block.begin = tile.begin;
  block.rows = tile.rows;
  block.first = kForKeys ? tile.scale_begin : 0;
  block.last = kForKeys ? static_cast<int>(a.length) : tile.scale_end;
  const RowPairs<T, Step> queries = {rows_of_head<T, Step>(a.q, block.b, block.h),
                                     rows_of_head<T, Step>(a.grad_out, block.b, block.h)};
  const RowPairs<T, Step> keys = {rows_of_head<T, Step>(a.k, block.b, block.h),
                                  rows_of_head<T, Step>(a.v, block.b, block.h)};
  block.own = kForKeys ? keys : queries;
  block.other = kForKeys ? queries : keys;
  const int64_t first_row = (block.b * a.heads + block.h) * a.length;
  block.lse = a.lse + first_row;
  block.delta = p.delta + first_row;
  return block;
}

}  // namespace variant::cuda
