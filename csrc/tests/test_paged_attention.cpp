#include "check.h"

using namespace variant;
using namespace variant::test;

namespace {

struct Case {
  int64_t tokens, heads, width, page_size;
  std::vector<int32_t> lengths;
  float softmax_scale = 0.3f;
};

void run_case(const char* isa, const KernelTable& table, const Case& c, DType dtype,
              std::mt19937& engine) {
  const int64_t batch = static_cast<int64_t>(c.lengths.size());
  int64_t entries = 1;
  for (int32_t length : c.lengths) {
    entries = std::max(entries, (length + c.page_size - 1) / c.page_size);
  }
  const int64_t pages = batch * entries, slot = c.heads * c.width, page = c.page_size * slot;
  // Pages start as NaN, and page-table entries past the length are out of range: neither may affect
  // the result.
  Values k(dtype, pages * page), v(dtype, pages * page);
  std::vector<int32_t> page_table(batch * entries, -1234567), order(pages);
  for (int64_t i = 0; i < pages; ++i) order[i] = static_cast<int32_t>(i);
  std::shuffle(order.begin(), order.end(), engine);
  std::normal_distribution<double> normal;
  const int64_t token_stride = 3 * slot;  // a packed (B, T, 3, H, D) projection
  Values q = Values::random(dtype, batch * c.tokens * token_stride, engine);
  std::vector<double> want(batch * c.tokens * slot, 0.0);
  const float softmax_scale = c.softmax_scale;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t length = c.lengths[b];
    std::vector<int64_t> where(length);
    for (int64_t s = 0; s < length; ++s) {
      int32_t& entry = page_table[b * entries + s / c.page_size];
      entry = order[b * entries + s / c.page_size];
      where[s] = entry * page + s % c.page_size * slot;
      for (int64_t i = 0; i < slot; ++i) {
        k.set(where[s] + i, normal(engine));
        v.set(where[s] + i, normal(engine));
      }
    }
    for (int64_t t = 0; t < c.tokens && length > 0; ++t) {
      for (int64_t h = 0; h < c.heads; ++h) {
        const int64_t row = (b * c.tokens + t) * token_stride + h * c.width;
        std::vector<double> p(length);
        double peak = -1e300, sum = 0;
        for (int64_t s = 0; s < length; ++s) {
          for (int64_t d = 0; d < c.width; ++d) {
            p[s] += q[row + d] * k[where[s] + h * c.width + d] * softmax_scale;
          }
          peak = std::max(peak, p[s]);
        }
        for (double& x : p) sum += x = std::exp(x - peak);
        for (int64_t s = 0; s < length; ++s) {
          for (int64_t d = 0; d < c.width; ++d) {
            want[((b * c.tokens + t) * c.heads + h) * c.width + d] +=
                p[s] / sum * v[where[s] + h * c.width + d];
          }
        }
      }
    }
  }
  Values out(dtype, batch * c.tokens * slot);
  table.paged_attention_forward({batch, c.tokens, c.heads, c.width, c.page_size,
                                 HeadView{q.data(), c.tokens * token_stride, token_stride, c.width},
                                 HeadView{k.data(), page, slot, c.width},
                                 HeadView{v.data(), page, slot, c.width}, page_table.data(),
                                 entries, c.lengths.data(), out.data(), softmax_scale, dtype, 2});
  check_close(isa, "out", out, want);
}

// Scores of 0 weigh all keys alike: the output is the exact mean of values, rounded once. Two
// neighbouring float16 have a tie between them, four keys give the quarters beside it.
void check_float16_rounding(const char* isa, const KernelTable& table, int32_t keys) {
  constexpr int64_t kWidth = 256, kFinite = 0x7c00;
  const int64_t slot = kFinite;  // all non-negative finite float16, as heads of kWidth
  const int64_t heads = kFinite / kWidth;
  Values q(DType::kFloat16, slot, 0.0), k(DType::kFloat16, keys * slot, 0.0);
  Values v(DType::kFloat16, keys * slot), out(DType::kFloat16, slot);
  for (const double sign : {1.0, -1.0}) {
    std::vector<double> want(slot);
    for (int64_t i = 0; i < slot; ++i) {
      const double value = sign * fp16_to_double(static_cast<uint16_t>(i));
      const double next =
          sign * fp16_to_double(static_cast<uint16_t>(std::min<int64_t>(i + 1, kFinite - 1)));
      for (int32_t s = 0; s < keys; ++s) v.set(s * slot + i, s == 0 ? value : next);
      want[i] = fp16_to_double(double_to_fp16((value + (keys - 1) * next) / keys));
    }
    const std::vector<int32_t> page_table = {0}, lengths = {keys};
    table.paged_attention_forward({1, 1, heads, kWidth, keys,
                                   HeadView{q.data(), slot, slot, kWidth},
                                   HeadView{k.data(), keys * slot, slot, kWidth},
                                   HeadView{v.data(), keys * slot, slot, kWidth}, page_table.data(),
                                   1, lengths.data(), out.data(), 0.0f, DType::kFloat16, 1});
    for (int64_t i = 0; i < slot; ++i) {
      CHECK(out[i] == want[i], "%s %d keys: %g for %g", isa, keys, out[i], want[i]);
    }
  }
}

// A single key's value comes back as it is, infinities and NaN included.
void check_float16_specials(const char* isa, const KernelTable& table) {
  const double infinity = std::numeric_limits<double>::infinity();
  const std::vector<double> specials = {infinity, -infinity, kNaN,  65504.0,
                                        -65504.0, 6e-8,      -6e-8, 0};
  Values q(DType::kFloat16, 16, 0.0), k(DType::kFloat16, 16, 0.0), v(DType::kFloat16, 16, 0.0);
  Values out(DType::kFloat16, 16);
  for (size_t i = 0; i < specials.size(); ++i) v.set(static_cast<int64_t>(i), specials[i]);
  const std::vector<int32_t> page_table = {0}, lengths = {1};
  const auto of = [](Values& x) { return HeadView{x.data(), 16, 16, 16}; };
  table.paged_attention_forward({1, 1, 1, 16, 1, of(q), of(k), of(v), page_table.data(), 1,
                                 lengths.data(), out.data(), 0.3f, DType::kFloat16, 1});
  for (int64_t i = 0; i < 16; ++i) {
    CHECK(out[i] == v[i] || (std::isnan(out[i]) && std::isnan(v[i])), "%s: %g for %g", isa, out[i],
          v[i]);
  }
}

}  // namespace

int main() {
  for_each_isa([](const char* isa, const KernelTable& table) {
    check_float16_rounding(isa, table, 2);
    check_float16_rounding(isa, table, 4);
    check_float16_specials(isa, table);
    std::mt19937 engine(4);
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
      for (const Case& c :
           {Case{1, 1, 16, 4, {1}}, Case{5, 2, 24, 7, {0, 13, 97}}, Case{70, 2, 64, 16, {200, 33}},
            Case{3, 2, 256, 1, {5}}, Case{66, 1, 40, 16, {96, 97}}, Case{2, 1, 80, 3, {0}},
            Case{9, 1, 32, 5, {205}, -0.4f}, Case{4, 1, 16, 4, {7}, 0.0f}}) {
        run_case(isa, table, c, dtype, engine);
      }
    }
  });
}
