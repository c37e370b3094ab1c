// Every path of paged attention against a plain computation in double: tensor cores and plain
// products, one pass and two, every padded width, page sizes of one, odd and even.
// ONE_TILE: tests a single instance, for the planted faults.
#ifdef ONE_TILE
#include "../paged_attention.cuh"
#else
#include "../paged_attention.cu"
#endif
#include "tensors.h"

using namespace variant;
using namespace variant::test;

namespace {

#ifdef ONE_TILE
int attend(const cuda::PagedAttentionArgs& args) {
  cuda::PagedParams p = {};
  p.a = args;
  cuda::derive_params(p);
  using Tile = cuda::SoftmaxTile<Half, 32, 64, 4>;
  return cuda::launch_tiles<Tile>(cuda::paged_attention_kernel<Tile, cuda::PagedParams>, p,
                                  nullptr);
}
#else
int attend(const cuda::PagedAttentionArgs& args) {
  return variant_cuda_paged_attention_forward(&args, sizeof args, 0, nullptr);
}
#endif

struct Case {
  int64_t tokens, heads, width, page_size;
  std::vector<int32_t> lengths;
  int64_t splits = 1;
  int64_t shift = 0;  // offset of q from a 16-byte boundary, in elements
  float softmax_scale = 0.3f;
};

template <class T>
void test_matches_a_plain_computation(const Case& c, std::mt19937& engine) {
  const int64_t batch = static_cast<int64_t>(c.lengths.size());
  int64_t entries = 1;
  for (int32_t length : c.lengths) {
    entries = std::max(entries, (length + c.page_size - 1) / c.page_size);
  }
  const int64_t pages = batch * entries, slot = c.heads * c.width, page = c.page_size * slot;
  // Pages start as NaN, and page-table entries past the length are out of range: neither may affect
  // the result.
  std::vector<T> k = nans<T>(pages * page), v = nans<T>(pages * page);
  std::vector<int32_t> page_table(batch * entries, -1234567), order(pages);
  for (int64_t i = 0; i < pages; ++i) order[i] = static_cast<int32_t>(i);
  std::shuffle(order.begin(), order.end(), engine);
  std::normal_distribution<float> normal;
  const int64_t token_stride = 3 * slot;  // a packed (B, T, 3, H, D) projection
  const Shifted<T> q(batch * c.tokens * token_stride, c.shift, engine);
  std::vector<double> want(batch * c.tokens * slot, 0.0);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t length = c.lengths[b];
    std::vector<int64_t> where(length);
    for (int64_t s = 0; s < length; ++s) {
      int32_t& entry = page_table[b * entries + s / c.page_size];
      entry = order[b * entries + s / c.page_size];
      where[s] = entry * page + s % c.page_size * slot;
      for (int64_t i = 0; i < slot; ++i) {
        k[where[s] + i] = narrow<T>(normal(engine));
        v[where[s] + i] = narrow<T>(normal(engine));
      }
    }
    for (int64_t t = 0; t < c.tokens && length > 0; ++t) {
      for (int64_t h = 0; h < c.heads; ++h) {
        const int64_t from = (b * c.tokens + t) * token_stride + h * c.width;
        const int64_t to = ((b * c.tokens + t) * c.heads + h) * c.width;
        std::vector<double> p(length);
        double peak = -1e300, sum = 0;
        for (int64_t s = 0; s < length; ++s) {
          for (int64_t d = 0; d < c.width; ++d) {
            p[s] += q[from + d] * widen(k[where[s] + h * c.width + d]) * c.softmax_scale;
          }
          peak = std::max(peak, p[s]);
        }
        for (double& x : p) sum += x = std::exp(x - peak);
        for (int64_t s = 0; s < length; ++s) {
          for (int64_t d = 0; d < c.width; ++d) {
            want[to + d] += p[s] / sum * widen(v[where[s] + h * c.width + d]);
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
  const cuda::PagedAttentionArgs args = {
      batch,
      c.tokens,
      c.heads,
      c.width,
      pages,
      c.page_size,
      entries,
      c.splits,
      HeadView{q.data(), c.tokens * token_stride, token_stride, c.width},
      HeadView{k.data(), page, slot, c.width},
      HeadView{v.data(), page, slot, c.width},
      page_table.data(),
      entries,
      c.lengths.data(),
      out.data(),
      partial.data(),
      statistics.data(),
      c.softmax_scale,
      dtype_of<T>()};
  CHECK(attend(args) == 0, "launch failed");
  compare("out", out, want);
}

#ifndef ONE_TILE

// The page table is not validated on a GPU: entries out of range must not cause accesses outside
// the pool.
void test_wrong_pages_and_lengths_stay_inside_the_pool(std::mt19937& engine) {
  const int64_t width = 32, page_size = 4, pages = 2, entries = 2;
  const std::vector<BF16> q = random_tensor<BF16>(width, engine);
  const std::vector<BF16> k = random_tensor<BF16>(pages * page_size * width, engine);
  const std::vector<int32_t> table = {1000, -5}, lengths = {1000000};
  std::vector<BF16> out = nans<BF16>(width);
  const HeadView pool = {k.data(), page_size * width, width, width};
  const cuda::PagedAttentionArgs args = {1,
                                         1,
                                         1,
                                         width,
                                         pages,
                                         page_size,
                                         entries,
                                         1,
                                         HeadView{q.data(), width, width, width},
                                         pool,
                                         pool,
                                         table.data(),
                                         entries,
                                         lengths.data(),
                                         out.data(),
                                         nullptr,
                                         nullptr,
                                         0.2f,
                                         DType::kBFloat16};
  CHECK(attend(args) == 0, "launch failed");
  for (BF16 x : out) CHECK(std::isfinite(widen(x)), "a clamped page gave %g", double{widen(x)});
}

void test_pages_may_lie_4_gib_apart(std::mt19937& engine) {
  const int64_t width = 8, pages = 2;
  const std::vector<BF16> q = random_tensor<BF16>(width, engine);
  const std::vector<BF16> near = random_tensor<BF16>(2 * pages * width, engine);
  SparseTensor<BF16> far(kFarStride + 2 * width);
  for (int64_t page = 0; page < pages; ++page) {
    std::copy_n(&near[page * 2 * width], 2 * width, far.data() + page * kFarStride);
  }
  const std::vector<int32_t> table = {1, 0}, lengths = {2};
  std::vector<BF16> out[2];
  for (const bool apart : {false, true}) {
    out[apart] = nans<BF16>(width);
    const BF16* pool = apart ? far.data() : near.data();
    const int64_t stride = apart ? kFarStride : 2 * width;
    const cuda::PagedAttentionArgs args = {1,
                                           1,
                                           1,
                                           width,
                                           pages,
                                           1,
                                           pages,
                                           1,
                                           HeadView{q.data(), width, width, width},
                                           HeadView{pool, stride, width, width},
                                           HeadView{pool + width, stride, width, width},
                                           table.data(),
                                           pages,
                                           lengths.data(),
                                           out[apart].data(),
                                           nullptr,
                                           nullptr,
                                           0.2f,
                                           DType::kBFloat16};
    CHECK(attend(args) == 0, "launch failed");
  }
  std::vector<double> want;
  for (BF16 x : out[0]) want.push_back(widen(x));
  compare("far pages", out[1], want);
}

void test_arguments_of_another_size_are_refused() {
  const cuda::PagedAttentionArgs args = {};
  CHECK(variant_cuda_paged_attention_forward(&args, sizeof args - 8, 0, nullptr) != 0,
        "accepted arguments of the wrong size");
}
#endif

}  // namespace

int main() {
  std::mt19937 engine(4);
#ifdef ONE_TILE
  test_matches_a_plain_computation<Half>({21, 2, 24, 4, {0, 13, 150}}, engine);
#else
  for (const Case& c : {
           Case{1, 1, 16, 4, {1}},
           Case{5, 2, 24, 7, {0, 13, 97}},
           Case{21, 1, 64, 16, {140, 33}},
           Case{3, 1, 256, 1, {37}},
           Case{17, 1, 40, 16, {66}, 1, 0, -0.4f},
           Case{2, 1, 80, 3, {70}},
           Case{2, 1, 128, 5, {140}, 2},
           Case{2, 1, 48, 16, {0, 150}, 3},
           Case{3, 1, 16, 4, {7}, 1, 0, 0.0f},
           Case{4, 1, 24, 4, {37}, 1, 1},
           Case{4, 1, 72, 4, {70}, 2, 3},
       }) {
    test_matches_a_plain_computation<BF16>(c, engine);
    test_matches_a_plain_computation<Half>(c, engine);
    test_matches_a_plain_computation<float>(c, engine);
  }
  test_wrong_pages_and_lengths_stay_inside_the_pool(engine);
  test_pages_may_lie_4_gib_apart(engine);
  test_arguments_of_another_size_are_refused();
#endif
}
