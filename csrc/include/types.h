// What every op shares: element types and views of tensors that we do not own.
//
// B rows in the batch, T tokens, C model width, H heads, D width of one head, P pages, N slots of a
// page, M page-table entries of a sequence, V codebook entries. Strides count elements; the last
// dimension is always contiguous.
#pragma once

#include <cstdint>

namespace variant {

// The CPU kernels have no float16.
enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// (B, C): one row per sequence.
struct RowView {
  const void* data;
  int64_t batch_stride;
};

// (B, T, C)
struct TokenView {
  const void* data;
  int64_t batch_stride, token_stride;
};

// (B, T, H, D), and (P, N, H, D) with a page in the place of the sequence.
struct HeadView {
  const void* data;
  int64_t batch_stride, token_stride, head_stride;
};

}  // namespace variant
