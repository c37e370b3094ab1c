// A token of scale j attends to every token of the scales up to and including j.
#pragma once

#include "../include/block_causal_attention.h"
#include "primitives.h"

namespace variant::cuda {

// The most scales that fit a kernel's arguments.
constexpr int64_t kMostScales = 256;

// Tokens [begin, begin + rows), all of them in the scale [scale_begin, scale_end).
struct ScaleTile {
  int begin, rows, scale_begin, scale_end;
};

// Ends of the scales, in tokens; the last end is the length.
struct ScaleEnds {
  int count;
  int end[kMostScales];

  // Returns false if there are too many scales or they do not add up to the length.
  bool set(const int64_t* lengths, int64_t num_scales, int64_t length) {
    if (num_scales < 1 || num_scales > kMostScales) return false;
    int64_t sum = 0;
    count = static_cast<int>(num_scales);
    for (int scale = 0; scale < count; ++scale) {
      sum += lengths[scale];
      end[scale] = static_cast<int>(sum);
    }
    return sum == length;
  }

  // Tiles of at most `rows` tokens, cut at the ends of scales: all tokens of a tile see the same
  // tokens, and the same tokens see them, so that no product needs a mask by row and column.
  int tiles(int rows) const {
    int sum = 0, begin = 0;
    for (int scale = 0; scale < count; ++scale) {
      sum += (end[scale] - begin + rows - 1) / rows;
      begin = end[scale];
    }
    return sum;
  }
  // Tile `number` of them, in the order of tokens.
  template <int kRows>
  __host__ __device__ ScaleTile tile(int number) const {
    int scale_begin = 0;
    for (int scale = 0;; ++scale) {
      const int scale_end = end[scale], tiles = (scale_end - scale_begin + kRows - 1) / kRows;
      if (number < tiles) {
        const int begin = scale_begin + number * kRows, left = scale_end - begin;
        return {begin, left < kRows ? left : kRows, scale_begin, scale_end};
      }
      number -= tiles;
      scale_begin = scale_end;
    }
  }
};

struct BlockCausalBackwardCudaArgs {
  BlockCausalBackwardArgs op;
  float* delta;  // (B, H, L): scratch for the sums over D of grad_out * out
};

}  // namespace variant::cuda
