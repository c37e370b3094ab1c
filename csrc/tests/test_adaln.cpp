#include "check.h"

using namespace variant;
using namespace variant::test;

namespace {

struct Case {
  int64_t batch, tokens, width, slack;  // slack: elements between rows of the inputs
};

// Computes in double: the outputs, and the gradients for given output gradients.
struct Expected {
  std::vector<double> x_out, h, grad_x, grad_y, grad_gate, grad_scale, grad_shift;
};

void run_case(const char* isa, const KernelTable& table, Case c, DType x_dtype, DType dtype,
              std::mt19937& engine) {
  const int64_t rows = c.batch * c.tokens, stride = c.width + c.slack;
  const int64_t span = (rows - 1) * stride + c.width, row_span = (c.batch - 1) * stride + c.width;
  Values x = Values::random(x_dtype, span, engine), y = Values::random(dtype, span, engine);
  Values gate = Values::random(dtype, row_span, engine);
  Values scale = Values::random(dtype, row_span, engine);
  Values shift = Values::random(dtype, row_span, engine);
  Values grad_out = Values::random(x_dtype, span, engine);
  Values grad_h = Values::random(dtype, span, engine);
  const auto tokens_of = [&](Values& v) { return TokenView{v.data(), c.tokens * stride, stride}; };
  const auto rows_of = [&](Values& v) { return RowView{v.data(), stride}; };
  const float eps = 1e-6f;

  for (const bool gated : {false, true}) {
    Values x_out(x_dtype, rows * c.width), h(dtype, rows * c.width);
    std::vector<float> mean(rows), rstd(rows);
    if (gated) {
      table.gated_adaln_forward({c.batch, c.tokens, c.width, tokens_of(x), tokens_of(y),
                                 rows_of(gate), rows_of(scale), rows_of(shift), x_out.data(),
                                 h.data(), mean.data(), rstd.data(), eps, x_dtype, dtype, 2});
    } else {
      table.adaln_forward({c.batch, c.tokens, c.width, tokens_of(x), rows_of(scale), rows_of(shift),
                           h.data(), mean.data(), rstd.data(), eps, x_dtype, dtype, 2});
    }
    Expected want;
    for (auto* sums : {&want.grad_gate, &want.grad_scale, &want.grad_shift}) {
      sums->assign(c.batch * c.width, 0.0);
    }
    Values norm_input(x_dtype, rows * c.width);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t b = r / c.tokens;
      std::vector<double> input(c.width), g(c.width);
      double sum = 0, squares = 0, sum_g = 0, sum_g_xhat = 0;
      for (int64_t i = 0; i < c.width; ++i) {
        const double in = x[r * stride + i];
        const double residual = gated ? gate[b * stride + i] * y[r * stride + i] : 0.0;
        want.x_out.push_back(in + residual);
        // The norm reads the rounded sum, so this uses the kernel's sum, which is checked below.
        input[i] = gated ? x_out[r * c.width + i] : in;
        norm_input.set(r * c.width + i, input[i]);
        sum += input[i];
      }
      const double average = sum / c.width;
      for (double value : input) squares += (value - average) * (value - average);
      const double inverse = 1.0 / std::sqrt(squares / c.width + eps);
      for (int64_t i = 0; i < c.width; ++i) {
        const double xhat = (input[i] - average) * inverse, factor = 1.0 + scale[b * stride + i];
        want.h.push_back(xhat * factor + shift[b * stride + i]);
        g[i] = grad_h[r * stride + i] * factor;
        sum_g += g[i] / c.width;
        sum_g_xhat += g[i] * xhat / c.width;
        want.grad_scale[b * c.width + i] += grad_h[r * stride + i] * xhat;
        want.grad_shift[b * c.width + i] += grad_h[r * stride + i];
      }
      for (int64_t i = 0; i < c.width; ++i) {
        const double xhat = (input[i] - average) * inverse;
        const double total =
            inverse * (g[i] - sum_g - xhat * sum_g_xhat) + (gated ? grad_out[r * stride + i] : 0.0);
        want.grad_x.push_back(total);
        want.grad_y.push_back(total * gate[b * stride + i]);
        want.grad_gate[b * c.width + i] += total * y[r * stride + i];
      }
    }
    check_close(isa, "h", h, want.h);
    Values grad_x(x_dtype, rows * c.width), grad_y(dtype, rows * c.width);
    Values grad_gate(dtype, c.batch * c.width), grad_scale(dtype, c.batch * c.width);
    Values grad_shift(dtype, c.batch * c.width);
    const TokenView input = {norm_input.data(), c.tokens * c.width, c.width};
    if (gated) {
      check_close(isa, "x_out", x_out, want.x_out);
      table.gated_adaln_backward(
          {c.batch, c.tokens, c.width, tokens_of(grad_out), tokens_of(grad_h), input, tokens_of(y),
           rows_of(gate), rows_of(scale), mean.data(), rstd.data(), grad_x.data(), grad_y.data(),
           grad_gate.data(), grad_scale.data(), grad_shift.data(), x_dtype, dtype, 2});
      check_close(isa, "grad_y", grad_y, want.grad_y);
      check_close(isa, "grad_gate", grad_gate, want.grad_gate);
    } else {
      table.adaln_backward({c.batch, c.tokens, c.width, tokens_of(grad_h), input, rows_of(scale),
                            mean.data(), rstd.data(), grad_x.data(), grad_scale.data(),
                            grad_shift.data(), x_dtype, dtype, 2});
    }
    check_close(isa, "grad_x", grad_x, want.grad_x);
    check_close(isa, "grad_scale", grad_scale, want.grad_scale);
    check_close(isa, "grad_shift", grad_shift, want.grad_shift);
  }
}

// An output of 32 MiB that starts at a whole line is written around the cache.
void large_outputs_equal_those_of_small_calls(const char* isa, const KernelTable& table,
                                              DType dtype, std::mt19937& engine) {
  const int64_t width = 1024, few = 64;
  const size_t bytes = dtype == DType::kFloat32 ? 4 : 2, part = few * width * bytes;
  const int64_t repeats = (int64_t{32} << 20) / static_cast<int64_t>(part);
  Values few_x = Values::random(dtype, few * width, engine);
  Values scale = Values::random(dtype, width, engine);
  Values shift = Values::random(dtype, width, engine);
  Values few_h(dtype, few * width);
  std::vector<float> mean(few * repeats), rstd(few * repeats);
  const auto run = [&](int64_t tokens, void* x, void* h) {
    table.adaln_forward({1, tokens, width, TokenView{x, tokens * width, width},
                         RowView{scale.data(), width}, RowView{shift.data(), width}, h, mean.data(),
                         rstd.data(), 1e-6f, dtype, dtype, 2});
  };
  run(few, few_x.data(), few_h.data());
  std::vector<char> x(repeats * part);
  for (int64_t i = 0; i < repeats; ++i) std::memcpy(x.data() + i * part, few_x.data(), part);
  char* h = static_cast<char*>(std::aligned_alloc(128, repeats * part));
  run(few * repeats, x.data(), h);
  for (int64_t i = 0; i < repeats; ++i) {
    CHECK(std::memcmp(h + i * part, few_h.data(), part) == 0, "%s %s: part %lld differs", isa,
          few_h.name(), static_cast<long long>(i));
  }
  std::free(h);
}

}  // namespace

int main() {
  for_each_isa([](const char* isa, const KernelTable& table) {
    std::mt19937 engine(1);
    for (const Case c :
         {Case{1, 1, 16, 0}, Case{2, 3, 40, 7}, Case{1, 70, 19, 1}, Case{2, 130, 264, 24}}) {
      run_case(isa, table, c, DType::kFloat32, DType::kFloat32, engine);
      run_case(isa, table, c, DType::kFloat32, DType::kBFloat16, engine);
      run_case(isa, table, c, DType::kBFloat16, DType::kBFloat16, engine);
    }
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
      large_outputs_equal_those_of_small_calls(isa, table, dtype, engine);
    }
  });
}
