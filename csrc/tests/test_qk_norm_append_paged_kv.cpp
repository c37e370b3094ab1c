#include "check.h"

using namespace variant;
using namespace variant::test;

namespace {

// There are gaps between slots and heads of the pages, so that the test can check them too.
void run_case(const char* isa, const KernelTable& table, int64_t heads, int64_t width, bool norm,
              DType dtype, std::mt19937& engine) {
  const int64_t batch = 2, tokens = 20, pages = 9, page_size = 5, rows = batch * tokens;
  const int64_t part = heads * width, packed = 3 * part;
  Values qkv = Values::random(dtype, rows * packed, engine, 3.0);
  for (int64_t d = 0; d < width; ++d) qkv.set(part + d, 0.0);  // a key of zeros
  const size_t bytes = dtype == DType::kFloat32 ? 4 : 2;
  const auto view = [&](int64_t which) {
    return HeadView{static_cast<char*>(qkv.data()) + which * part * bytes, tokens * packed, packed,
                    width};
  };
  std::vector<float> scale_mul(heads);
  for (int64_t h = 0; h < heads; ++h) scale_mul[h] = h == 1 ? 6.0f : 1.0f + 0.3f * h;
  std::vector<int64_t> slots(pages * page_size);
  for (size_t i = 0; i < slots.size(); ++i) slots[i] = static_cast<int64_t>(i);
  std::shuffle(slots.begin(), slots.end(), engine);
  slots.resize(rows);
  slots[0] = slots[7] = -1;

  const int64_t head = width + 3, slot = heads * head + 2, page = page_size * slot + 1;
  Values k_pages(dtype, pages * page, -1.0), v_pages(dtype, pages * page, -1.0);
  Values q_out(dtype, norm ? rows * part : 0);
  std::vector<double> want_q(q_out.size());
  std::vector<double> want_k(k_pages.size(), -1.0), want_v(k_pages.size(), -1.0);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t h = 0; h < heads; ++h) {
      double q_squares = 0, k_squares = 0;
      for (int64_t d = 0; d < width; ++d) {
        const int64_t at = r * packed + h * width + d;
        q_squares += qkv[at] * qkv[at];
        k_squares += qkv[at + part] * qkv[at + part];
      }
      const double factor = std::exp(std::min<double>(scale_mul[h], kMaxLogScale));
      for (int64_t d = 0; d < width; ++d) {
        const int64_t at = r * packed + h * width + d;
        const double k_divisor = norm ? std::max(std::sqrt(k_squares), 1e-12) : 1.0;
        if (norm) want_q[r * part + h * width + d] = qkv[at] / std::sqrt(q_squares) * factor;
        if (slots[r] < 0) continue;
        const int64_t to = slots[r] / page_size * page + slots[r] % page_size * slot + h * head + d;
        want_k[to] = qkv[at + part] / k_divisor;
        want_v[to] = qkv[at + 2 * part];
      }
    }
  }
  table.qk_norm_append_paged_kv({batch,
                                 tokens,
                                 heads,
                                 width,
                                 page_size,
                                 view(0),
                                 view(1),
                                 view(2),
                                 norm ? scale_mul.data() : nullptr,
                                 norm ? q_out.data() : nullptr,
                                 k_pages.data(),
                                 v_pages.data(),
                                 page,
                                 slot,
                                 head,
                                 page,
                                 slot,
                                 head,
                                 slots.data(),
                                 dtype,
                                 2});
  if (norm) check_close(isa, "q_out", q_out, want_q);
  check_close(isa, "k_pages", k_pages, want_k);
  for (int64_t i = 0; i < k_pages.size(); ++i) {
    // Copied values and untouched elements are exact.
    CHECK(v_pages[i] == want_v[i], "%s v_pages[%lld]", isa, static_cast<long long>(i));
    CHECK(want_k[i] != -1.0 || k_pages[i] == -1.0, "%s k_pages[%lld]", isa,
          static_cast<long long>(i));
  }
}

}  // namespace

int main() {
  for_each_isa([](const char* isa, const KernelTable& table) {
    std::mt19937 engine(4);
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
      for (const bool norm : {true, false}) {
        run_case(isa, table, 1, 16, norm, dtype, engine);
        run_case(isa, table, 3, 24, norm, dtype, engine);
        run_case(isa, table, 2, 64, norm, dtype, engine);
        run_case(isa, table, 2, 256, norm, dtype, engine);
      }
    }
  });
}
