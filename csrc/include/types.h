// Shared by all ops: element types and non-owning views of tensors.
//
// B rows in the batch, T tokens, C model width, H heads, D width of one head, P pages, N slots of a
// page, M page-table entries of a sequence, V codebook entries. Strides count elements; the last
// dimension is always contiguous.
#pragma once

#include <cstdint>

namespace variant {

// On a CPU only paged attention and the append take float16.
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

// (B, T, H, D), or (P, N, H, D): batch_stride is then the stride of pages, token_stride of slots.
struct HeadView {
  const void* data;
  int64_t batch_stride, token_stride, head_stride;
};

}  // namespace variant
