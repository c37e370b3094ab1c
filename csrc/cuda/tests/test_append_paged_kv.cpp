// The kernel against the plain loop: every element size, strided sources, skipped and stray slots.
#include <algorithm>
#include <random>
#include <vector>

#include "../append_paged_kv.cu"
#include "check_cuda.h"

using namespace variant;
using namespace variant::test;

namespace {

template <class T>
void test_copies_rows_into_their_slots(int64_t heads, int64_t width, bool packed, int64_t shift,
                                       std::mt19937& engine) {
  const int64_t batch = 2, tokens = 7, pages = 5, page_size = 4;
  const int64_t token_stride = packed ? heads * width : width;
  const int64_t head_stride = packed ? width : tokens * width;
  const int64_t batch_stride = tokens * heads * width;
  const int64_t count = batch * batch_stride, stored = pages * page_size * heads * width;
  // Allocated without slack at either end; `shift` elements of misalignment.
  std::vector<T> k(count + shift), v(count + shift), k_pages(stored), v_pages(stored);
  for (T& x : k) x = static_cast<T>(engine());
  for (T& x : v) x = static_cast<T>(engine());
  std::vector<int64_t> slots(pages * page_size);
  for (size_t i = 0; i < slots.size(); ++i) slots[i] = static_cast<int64_t>(i);
  std::shuffle(slots.begin(), slots.end(), engine);
  slots.resize(batch * tokens);
  slots.shrink_to_fit();
  slots[3] = -1;
  slots[5] = pages * page_size;  // past the last page
  std::vector<T> want_k = k_pages, want_v = v_pages;
  for (int64_t r = 0; r < batch * tokens; ++r) {
    if (slots[r] < 0 || slots[r] >= pages * page_size) continue;
    for (int64_t i = 0; i < heads * width; ++i) {
      const int64_t from = shift + r / tokens * batch_stride + r % tokens * token_stride +
                           i / width * head_stride + i % width;
      want_k[slots[r] * heads * width + i] = k[from];
      want_v[slots[r] * heads * width + i] = v[from];
    }
  }
  const int64_t page = page_size * heads * width, slot = heads * width;
  const AppendPagedKvArgs args{batch,
                               tokens,
                               heads,
                               width,
                               page_size,
                               HeadView{k.data() + shift, batch_stride, token_stride, head_stride},
                               HeadView{v.data() + shift, batch_stride, token_stride, head_stride},
                               k_pages.data(),
                               v_pages.data(),
                               page,
                               slot,
                               width,
                               page,
                               slot,
                               width,
                               slots.data(),
                               sizeof(T),
                               1};
  CHECK(variant_cuda_append_paged_kv(&args, pages, 0, nullptr) == 0, "launch failed");
  CHECK(k_pages == want_k, "keys: heads %lld width %lld", static_cast<long long>(heads),
        static_cast<long long>(width));
  CHECK(v_pages == want_v, "values: heads %lld width %lld", static_cast<long long>(heads),
        static_cast<long long>(width));
}

template <class T>
void test_element(std::mt19937& engine) {
  for (const bool packed : {true, false}) {
    test_copies_rows_into_their_slots<T>(1, 16, packed, 0, engine);
    test_copies_rows_into_their_slots<T>(3, 24, packed, 0, engine);
    test_copies_rows_into_their_slots<T>(2, 24, packed, 1, engine);
    test_copies_rows_into_their_slots<T>(5, 256, packed, 0, engine);
  }
}

}  // namespace

int main() {
  std::mt19937 engine(11);
  test_element<uint32_t>(engine);
  test_element<uint16_t>(engine);
  test_element<uint8_t>(engine);
}
