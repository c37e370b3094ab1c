#include "check.h"

using namespace variant;
using namespace variant::test;

namespace {

constexpr double kFactor = 0.7978845608028654;  // sqrt(2 / pi)

void run_case(const char* isa, const KernelTable& table, int64_t count, double spread, DType dtype,
              std::mt19937& engine) {
  Values x = Values::random(dtype, count, engine, spread);
  Values grad_y = Values::random(dtype, count, engine);
  std::vector<double> want_y, want_grad;
  for (int64_t i = 0; i < count; ++i) {
    const double at = x[i], tanh = std::tanh(kFactor * (at + 0.044715 * at * at * at));
    want_y.push_back(at / 2 * (1 + tanh));
    const double inner = kFactor * (1 + 3 * 0.044715 * at * at);
    want_grad.push_back(grad_y[i] * ((1 + tanh) / 2 + at / 2 * (1 - tanh * tanh) * inner));
  }
  Values y(dtype, count), grad_x(dtype, count);
  table.gelu_forward({count, x.data(), y.data(), dtype, 2});
  check_close(isa, "y", y, want_y);
  table.gelu_backward({count, grad_y.data(), x.data(), grad_x.data(), dtype, 2});
  check_close(isa, "grad_x", grad_x, want_grad);
}

// Numbers whose powers or exponentials leave the range of float32.
void run_extremes(const char* isa, const KernelTable& table, DType dtype) {
  const std::vector<double> at = {0.0,  -0.0,  1e-30, -1e-30, 40.0, -40.0,
                                  1e10, -1e10, 1e38,  -1e38,  kNaN};
  const int64_t count = static_cast<int64_t>(at.size());
  Values x(dtype, count), grad_y(dtype, count, 1.0), y(dtype, count), grad_x(dtype, count);
  for (int64_t i = 0; i < count; ++i) x.set(i, at[i]);
  table.gelu_forward({count, x.data(), y.data(), dtype, 1});
  table.gelu_backward({count, grad_y.data(), x.data(), grad_x.data(), dtype, 1});
  for (int64_t i = 0; i < count - 1; ++i) {
    const double slope = std::fabs(at[i]) < 1 ? 0.5 : (at[i] > 0 ? 1.0 : 0.0);
    CHECK(std::fabs(y[i] - slope * x[i]) <= 1e-6 * std::fabs(slope * x[i]) + 1e-7,
          "%s gelu(%g) is %g", isa, at[i], y[i]);
    CHECK(std::fabs(grad_x[i] - slope) <= 1e-6, "%s gradient at %g is %g", isa, at[i], grad_x[i]);
  }
  CHECK(std::isnan(y[count - 1]) && std::isnan(grad_x[count - 1]), "%s: NaN must stay", isa);
}

}  // namespace

int main() {
  for_each_isa([](const char* isa, const KernelTable& table) {
    std::mt19937 engine(2);
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
      for (const int64_t count : {0, 1, 31, 64, 8192 + 7, 5 * 8192}) {
        run_case(isa, table, count, 2.0, dtype, engine);
        run_case(isa, table, count, 8.0, dtype, engine);
      }
      run_extremes(isa, table, dtype);
    }
  });
}
