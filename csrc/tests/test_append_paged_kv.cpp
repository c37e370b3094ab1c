#include "check.h"

using namespace variant;
using namespace variant::test;

int main() {
  for_each_isa([](const char* isa, const KernelTable& table) {
    std::mt19937 engine(3);
    const int64_t batch = 2, tokens = 20, heads = 3, width = 24, pages = 9, page_size = 5;
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
      for (const bool packed : {true, false}) {
        // packed: the heads of the source are contiguous; else they are far apart.
        const int64_t count = batch * tokens * heads * width;
        Values k = Values::random(dtype, count, engine), v = Values::random(dtype, count, engine);
        const int64_t token_stride = packed ? heads * width : width;
        const int64_t head_stride = packed ? width : tokens * width;
        const int64_t batch_stride = tokens * heads * width;
        Values k_pages(dtype, pages * page_size * heads * width, -1.0);
        Values v_pages(dtype, pages * page_size * heads * width, -1.0);
        std::vector<int64_t> all(pages * page_size), slots;
        for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<int64_t>(i);
        std::shuffle(all.begin(), all.end(), engine);
        slots.assign(all.begin(), all.begin() + batch * tokens);
        slots[0] = slots[7] = -1;
        const int64_t page = page_size * heads * width, slot = heads * width;
        table.append_paged_kv({batch, tokens, heads, width, page_size,
                               HeadView{k.data(), batch_stride, token_stride, head_stride},
                               HeadView{v.data(), batch_stride, token_stride, head_stride},
                               k_pages.data(), v_pages.data(), page, slot, width, page, slot, width,
                               slots.data(), dtype == DType::kFloat32 ? 4 : 2, 2});
        std::vector<double> want_k(k_pages.size(), -1.0), want_v(k_pages.size(), -1.0);
        for (int64_t r = 0; r < batch * tokens; ++r) {
          if (slots[r] < 0) continue;
          for (int64_t i = 0; i < heads * width; ++i) {
            const int64_t at = r / tokens * batch_stride + r % tokens * token_stride +
                               i / width * head_stride + i % width;
            want_k[slots[r] * heads * width + i] = k[at];
            want_v[slots[r] * heads * width + i] = v[at];
          }
        }
        for (int64_t i = 0; i < k_pages.size(); ++i) {
          CHECK(k_pages[i] == want_k[i] && v_pages[i] == want_v[i], "%s element %lld", isa,
                static_cast<long long>(i));
        }
      }
    }
  });
}
