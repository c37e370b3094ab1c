// Paged attention over 8-bit pages against a plain computation in double: tensor cores and plain
// products, copies of 16 and of 8 bytes, one pass and two, page sizes of one, odd and even.
// ONE_TILE: tests a single instance, for the planted faults.
#include <algorithm>

#include "kv8_codes.h"
#include "tensors.h"
#ifdef ONE_TILE
#include "../paged_attention_kv8.cuh"
#else
#include "../paged_attention_kv8.cu"
#endif

using namespace variant;
using namespace variant::test;

namespace {

#ifdef ONE_TILE
int attend(const cuda::PagedAttentionKv8Args& args) {
  cuda::PagedKv8Params p(args);
  cuda::derive_params(p);
  using Tile = cuda::Kv8SoftmaxTile<Half, 32, 64, 4>;
  return cuda::launch_tiles<Tile>(cuda::paged_attention_kernel<Tile, cuda::PagedKv8Params>, p,
                                  nullptr);
}
#else
int attend(const cuda::PagedAttentionKv8Args& args) {
  return variant_cuda_paged_attention_kv8_forward(&args, sizeof args, 0, nullptr);
}
#endif

struct Case {
  int64_t tokens, heads, width, page_size;
  std::vector<int32_t> lengths;
  int64_t splits = 1;
  int64_t shift = 0;   // offset of q from a 16-byte boundary, in elements
  int64_t offset = 0;  // offset of the codes from a 16-byte boundary, in bytes
};

// One pool: codes and scales, unwritten entries are NaN and 2^128.
struct Pool {
  int64_t offset;
  std::vector<uint8_t> codes, scales;

  Pool(int64_t offset, int64_t rows, int64_t width)
      : offset(offset), codes(offset + rows * width, 0x7f), scales(rows, 255) {}
  // Rows of different sizes.
  void fill(int64_t row, int64_t width, std::mt19937& engine) {
    scales[row] = static_cast<uint8_t>(118 + engine() % 3);
    for (int64_t d = 0; d < width; ++d) {
      codes[offset + row * width + d] = static_cast<uint8_t>(engine() % 0x7c | (engine() & 0x80));
    }
  }
  double at(int64_t row, int64_t width, int64_t d) const {
    return exact_value(codes[offset + row * width + d]) * exact_scale(scales[row]);
  }
};

template <class T>
void test_matches_a_plain_computation(const Case& c, std::mt19937& engine) {
  const int64_t batch = static_cast<int64_t>(c.lengths.size());
  const int32_t longest = *std::max_element(c.lengths.begin(), c.lengths.end());
  const int64_t entries = std::max<int64_t>(1, cuda::ceil_div(longest, c.page_size));
  const int64_t pages = batch * entries, slot = c.heads * c.width, page = c.page_size * slot;
  Pool k(c.offset, pages * c.page_size * c.heads, c.width), v = k;
  std::vector<int32_t> page_table(batch * entries, -1234567), order(pages);
  for (int64_t i = 0; i < pages; ++i) order[i] = static_cast<int32_t>(i);
  std::shuffle(order.begin(), order.end(), engine);
  const Shifted<T> q(batch * c.tokens * slot, c.shift, engine);
  std::vector<double> want(batch * c.tokens * slot, 0.0);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t length = c.lengths[b];
    std::vector<int64_t> where(length);
    for (int64_t s = 0; s < length; ++s) {
      int32_t& entry = page_table[b * entries + s / c.page_size];
      entry = order[b * entries + s / c.page_size];
      where[s] = (entry * c.page_size + s % c.page_size) * c.heads;
      for (int64_t h = 0; h < c.heads; ++h) {
        k.fill(where[s] + h, c.width, engine);
        v.fill(where[s] + h, c.width, engine);
      }
    }
    for (int64_t t = 0; t < c.tokens && length > 0; ++t) {
      for (int64_t h = 0; h < c.heads; ++h) {
        const int64_t at = ((b * c.tokens + t) * c.heads + h) * c.width;
        std::vector<double> p(length);
        double peak = -1e300, sum = 0;
        for (int64_t s = 0; s < length; ++s) {
          for (int64_t d = 0; d < c.width; ++d) {
            p[s] += q[at + d] * k.at(where[s] + h, c.width, d) * 0.3f;
          }
          peak = std::max(peak, p[s]);
        }
        for (double& x : p) sum += x = std::exp(x - peak);
        for (int64_t s = 0; s < length; ++s) {
          for (int64_t d = 0; d < c.width; ++d) {
            want[at + d] += p[s] / sum * v.at(where[s] + h, c.width, d);
          }
        }
      }
    }
  }
  std::vector<T> out = nans<T>(batch * c.tokens * slot);
  std::vector<float> partial, statistics;
  if (c.splits > 1) {
    partial = nans<float>(c.splits * batch * c.tokens * slot);
    statistics = nans<float>(2 * c.splits * batch * c.tokens * c.heads);
  }
  const cuda::PagedAttentionArgs op = {batch,
                                       c.tokens,
                                       c.heads,
                                       c.width,
                                       pages,
                                       c.page_size,
                                       entries,
                                       c.splits,
                                       HeadView{q.data(), c.tokens * slot, slot, c.width},
                                       HeadView{k.codes.data() + c.offset, page, slot, c.width},
                                       HeadView{v.codes.data() + c.offset, page, slot, c.width},
                                       page_table.data(),
                                       entries,
                                       c.lengths.data(),
                                       out.data(),
                                       partial.data(),
                                       statistics.data(),
                                       0.3f,
                                       dtype_of<T>()};
  const int64_t scales_page = c.page_size * c.heads;
  CHECK(attend({op, HeadView{k.scales.data(), scales_page, c.heads, 1},
                HeadView{v.scales.data(), scales_page, c.heads, 1}}) == 0,
        "launch failed");
  compare("out", out, want);
}

}  // namespace

int main() {
  std::mt19937 engine(6);
#ifdef ONE_TILE
  test_matches_a_plain_computation<Half>({21, 2, 24, 4, {0, 13, 150}}, engine);
#else
  for (const Case& c : {
           Case{1, 1, 16, 4, {1}},
           Case{5, 2, 24, 7, {0, 13, 97}},
           Case{21, 1, 64, 16, {140, 33}},
           Case{3, 1, 256, 1, {5}},
           Case{17, 1, 40, 16, {66}},
           Case{2, 1, 80, 3, {70}},
           Case{2, 2, 128, 5, {40}, 2},
           Case{4, 1, 48, 4, {37}, 1, 1},
           Case{4, 1, 32, 4, {70}, 2, 0, 8},
           Case{4, 1, 32, 4, {37}, 1, 0, 3},
       }) {
    test_matches_a_plain_computation<BF16>(c, engine);
    test_matches_a_plain_computation<Half>(c, engine);
    test_matches_a_plain_computation<float>(c, engine);
  }
  const cuda::PagedAttentionKv8Args none = {};
  CHECK(variant_cuda_paged_attention_kv8_forward(&none, sizeof none - 8, 0, nullptr) != 0,
        "accepted arguments of the wrong size");
#endif
}
