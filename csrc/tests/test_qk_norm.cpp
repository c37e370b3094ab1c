#include "check.h"

using namespace variant;
using namespace variant::test;

namespace {

void run_case(const char* isa, const KernelTable& table, int64_t batch, int64_t tokens,
              int64_t heads, int64_t width, DType dtype, std::mt19937& engine) {
  // q and k interleaved in one projection, as a packed (B, T, 2, H, D) tensor.
  const int64_t rows = batch * tokens * heads, packed = 2 * heads * width;
  Values qk = Values::random(dtype, batch * tokens * packed, engine, 3.0);
  for (int64_t d = 0; d < width; ++d) qk.set(d, 0.0);  // a zero row
  Values grad_q = Values::random(dtype, rows * width, engine);
  Values grad_k = Values::random(dtype, rows * width, engine);
  const size_t bytes = dtype == DType::kFloat32 ? 4 : 2;
  const HeadView q = {qk.data(), tokens * packed, packed, width};
  const HeadView k = {static_cast<char*>(qk.data()) + heads * width * bytes, tokens * packed,
                      packed, width};
  const HeadView gq = {grad_q.data(), tokens * heads * width, heads * width, width};
  const HeadView gk = {grad_k.data(), tokens * heads * width, heads * width, width};
  std::vector<float> scale_mul(heads);
  for (int64_t h = 0; h < heads; ++h) scale_mul[h] = h == 1 ? 6.0f : 1.0f + 0.3f * h;

  std::vector<double> want_q, want_k, want_dq, want_dk, want_dscale(heads, 0.0);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t h = r % heads;
    const double factor = std::exp(std::min<double>(scale_mul[h], kMaxLogScale));
    for (const bool is_q : {true, false}) {
      const int64_t at = r / heads * packed + (is_q ? 0 : heads * width) + h * width;
      Values& grad = is_q ? grad_q : grad_k;
      double squares = 0, dot = 0;
      for (int64_t d = 0; d < width; ++d) squares += qk[at + d] * qk[at + d];
      const double norm = std::sqrt(squares), divisor = std::max(norm, 1e-12);
      for (int64_t d = 0; d < width; ++d) dot += grad[r * width + d] * qk[at + d] / divisor;
      const double grown = is_q ? factor : 1.0;
      for (int64_t d = 0; d < width; ++d) {
        const double unit = qk[at + d] / divisor;
        (is_q ? want_q : want_k).push_back(unit * grown);
        const double along = norm > 1e-12 ? unit * dot : 0.0;
        (is_q ? want_dq : want_dk).push_back((grad[r * width + d] - along) / divisor * grown);
      }
      if (is_q && scale_mul[h] <= kMaxLogScale) want_dscale[h] += dot * factor;
    }
  }
  Values q_out(dtype, rows * width), k_out(dtype, rows * width);
  table.qk_norm_forward(
      {batch, tokens, heads, width, q, k, scale_mul.data(), q_out.data(), k_out.data(), dtype, 2});
  check_close(isa, "q_out", q_out, want_q);
  check_close(isa, "k_out", k_out, want_k);
  Values dq(dtype, rows * width), dk(dtype, rows * width);
  Values dscale(DType::kFloat32, heads);
  table.qk_norm_backward({batch, tokens, heads, width, gq, gk, q, k, scale_mul.data(), dq.data(),
                          dk.data(), static_cast<float*>(dscale.data()), dtype, 2});
  // The zero row's gradient, about 1e12, would hide the others, so it is compared separately.
  for (int64_t d = 0; d < width; ++d) {
    const double relative = std::fabs(dq[d] - want_dq[d]) / std::fabs(want_dq[d]);
    CHECK(relative <= tolerance(dtype), "%s dq[%lld] of a zero row: got %g, expected %g", isa,
          static_cast<long long>(d), dq[d], want_dq[d]);
    dq.set(d, 0.0);
    want_dq[d] = 0.0;
  }
  check_close(isa, "dq", dq, want_dq);
  check_close(isa, "dk", dk, want_dk);
  check_close(isa, "dscale_mul", dscale, want_dscale);
}

}  // namespace

int main() {
  for_each_isa([](const char* isa, const KernelTable& table) {
    std::mt19937 engine(2);
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
      run_case(isa, table, 1, 1, 1, 16, dtype, engine);
      run_case(isa, table, 2, 37, 3, 24, dtype, engine);
      run_case(isa, table, 1, 5, 2, 40, dtype, engine);
      run_case(isa, table, 2, 9, 2, 64, dtype, engine);
      run_case(isa, table, 1, 3, 2, 256, dtype, engine);
    }
  });
}
