// Checks of index tensors: whether all values are in range. Strides are in elements.
#pragma once

#include <cstdint>

namespace variant {

// A matrix and a vector of indices.
template <class T>
struct IndexMatrix {
  const T* data;
  int64_t row_stride, column_stride;
};
template <class T>
struct IndexVector {
  const T* data;
  int64_t stride;
};

// Every length is in [0, entries * page_size], and every entry that it uses is in [0, num_pages).
inline bool fits_page_table(int64_t batch, int64_t entries, IndexMatrix<int32_t> page_table,
                            IndexVector<int32_t> kv_lens, int64_t num_pages, int64_t page_size) {
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t length = kv_lens.data[b * kv_lens.stride];
    if (length < 0 || length > entries * page_size) return false;
    const int32_t* row = page_table.data + b * page_table.row_stride;
    for (int64_t m = 0; m * page_size < length; ++m) {
      const int32_t page = row[m * page_table.column_stride];
      if (page < 0 || page >= num_pages) return false;
    }
  }
  return true;
}

// Every slot is -1 or in [0, num_slots).
inline bool fits_slots(int64_t batch, int64_t tokens, IndexMatrix<int64_t> slots,
                       int64_t num_slots) {
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t* row = slots.data + b * slots.row_stride;
    bool wrong = false;  // no early exit within a row: the loop is vectorised
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t slot = row[t * slots.column_stride];
      wrong |= slot < -1 || slot >= num_slots;
    }
    if (wrong) return false;
  }
  return true;
}

}  // namespace variant
