// adaLN and its gated form, forward and backward, against plain computations in double: held and
// reread columns, float32 beside 16-bit values, strided and misaligned rows.
#include "../adaln.cu"
#include "tensors.h"

using namespace variant;
using namespace variant::test;

namespace {

struct Case {
  int64_t batch, tokens, width;
  int64_t shift = 0;  // elements that inputs are off a boundary of 16 bytes
};

template <class TX, class T>
void test_matches_plain_computations(const Case& c, bool gated, std::mt19937& engine) {
  const int64_t width = c.width, stride = width + (width % 8 == 0 ? 8 : 3);
  const int64_t rows = c.batch * c.tokens, count = rows * width, image = c.tokens * stride;
  const Shifted<TX> x(rows * stride, c.shift, engine), grad_x_out(rows * stride, c.shift, engine);
  const Shifted<T> y(rows * stride, c.shift, engine), grad_h(rows * stride, c.shift, engine);
  const Shifted<T> gate(c.batch * stride, c.shift, engine),
      scale(c.batch * stride, c.shift, engine);
  const Shifted<T> shift(c.batch * stride, c.shift, engine);
  const float eps = 1e-6f;
  const TokenView x_view = {x.data(), image, stride}, y_view = {y.data(), image, stride};
  const RowView scale_view = {scale.data(), stride}, shift_view = {shift.data(), stride};
  const RowView gate_view = {gate.data(), stride};
  const TokenView grad_h_view = {grad_h.data(), image, stride};
  const DType x_dtype = dtype_of<TX>(), dtype = dtype_of<T>();

  std::vector<TX> x_out = nans<TX>(gated ? count : 0), grad_x = nans<TX>(count);
  std::vector<T> h = nans<T>(count), grad_y = nans<T>(gated ? count : 0);
  std::vector<float> mean = nans<float>(rows), rstd = nans<float>(rows);
  if (gated) {
    const GatedAdaLNForwardArgs args = {
        c.batch,      c.tokens, width,       x_view,      y_view, gate_view, scale_view, shift_view,
        x_out.data(), h.data(), mean.data(), rstd.data(), eps,    x_dtype,   dtype,      0};
    CHECK(variant_cuda_gated_adaln_forward(&args, sizeof args, 0, nullptr) == 0, "launch failed");
  } else {
    const AdaLNForwardArgs args = {
        c.batch,     c.tokens,    width, x_view,  scale_view, shift_view, h.data(),
        mean.data(), rstd.data(), eps,   x_dtype, dtype,      0};
    CHECK(variant_cuda_adaln_forward(&args, sizeof args, 0, nullptr) == 0, "launch failed");
  }

  std::vector<double> want_x_out, want_h(count), want_mean(rows), want_rstd(rows);
  std::vector<double> want_grad_x(count), want_grad_y(gated ? count : 0);
  std::vector<double> want_scale(c.batch * width), want_shift(c.batch * width);
  std::vector<double> want_gate(c.batch * width);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t b = r / c.tokens, from = r * stride, of = b * stride;
    std::vector<double> moved(width);
    double sum = 0, squares = 0, mean_g = 0, mean_g_xhat = 0;
    for (int64_t i = 0; i < width; ++i) {
      moved[i] = x[from + i];
      if (gated) {
        want_x_out.push_back(moved[i] + gate[of + i] * y[from + i]);
        // The norm is that of the rounded sum.
        moved[i] = widen(x_out[r * width + i]);
      }
      sum += moved[i];
    }
    want_mean[r] = sum / static_cast<double>(width);
    for (double m : moved) squares += (m - want_mean[r]) * (m - want_mean[r]);
    want_rstd[r] = 1 / std::sqrt(squares / static_cast<double>(width) + eps);
    for (int64_t i = 0; i < width; ++i) {
      const double xhat = (moved[i] - want_mean[r]) * want_rstd[r];
      const double g = grad_h[from + i] * (1 + scale[of + i]);
      want_h[r * width + i] = xhat * (1 + scale[of + i]) + shift[of + i];
      mean_g += g / static_cast<double>(width);
      mean_g_xhat += g * xhat / static_cast<double>(width);
    }
    for (int64_t i = 0; i < width; ++i) {
      const double xhat = (moved[i] - want_mean[r]) * want_rstd[r];
      const double g = grad_h[from + i] * (1 + scale[of + i]);
      double total = want_rstd[r] * (g - mean_g - xhat * mean_g_xhat);
      if (gated) total += grad_x_out[from + i];
      want_grad_x[r * width + i] = total;
      if (gated) want_grad_y[r * width + i] = gate[of + i] * total;
      want_scale[b * width + i] += grad_h[from + i] * xhat;
      want_shift[b * width + i] += grad_h[from + i];
      want_gate[b * width + i] += total * y[from + i];
    }
  }
  compare("x_out", x_out, want_x_out);
  compare("h", h, want_h);
  compare("mean", mean, want_mean);
  compare("rstd", rstd, want_rstd);

  const int64_t tiles = cuda::ceil_div(c.tokens, cuda::kAdaLNTokensPerTile);
  std::vector<float> partial = nans<float>(c.batch * tiles * (gated ? 3 : 2) * width);
  std::vector<T> grad_scale = nans<T>(c.batch * width), grad_shift = nans<T>(c.batch * width);
  std::vector<T> grad_gate = nans<T>(c.batch * width);
  if (gated) {
    const std::vector<TX> kept = x_out;
    const cuda::GatedAdaLNBackwardCudaArgs args = {
        {c.batch, c.tokens, width, TokenView{grad_x_out.data(), image, stride}, grad_h_view,
         TokenView{kept.data(), c.tokens * width, width}, y_view, gate_view, scale_view,
         mean.data(), rstd.data(), grad_x.data(), grad_y.data(), grad_gate.data(),
         grad_scale.data(), grad_shift.data(), x_dtype, dtype, 0},
        partial.data()};
    CHECK(variant_cuda_gated_adaln_backward(&args, sizeof args, 0, nullptr) == 0, "launch failed");
    compare("grad_y", grad_y, want_grad_y);
    compare("grad_gate", grad_gate, want_gate);
  } else {
    const cuda::AdaLNBackwardCudaArgs args = {
        {c.batch, c.tokens, width, grad_h_view, x_view, scale_view, mean.data(), rstd.data(),
         grad_x.data(), grad_scale.data(), grad_shift.data(), x_dtype, dtype, 0},
        partial.data()};
    CHECK(variant_cuda_adaln_backward(&args, sizeof args, 0, nullptr) == 0, "launch failed");
  }
  compare("grad_x", grad_x, want_grad_x);
  compare("grad_scale", grad_scale, want_scale);
  compare("grad_shift", grad_shift, want_shift);
}

template <class TX, class T>
void test_types(std::mt19937& engine) {
  for (const bool gated : {false, true}) {
    for (const Case& c : {Case{1, 1, 8}, Case{2, 19, 64}, Case{1, 3, 304}, Case{2, 17, 37},
                          Case{1, 2, 64, 1}, Case{1, 1, 4104}}) {
      test_matches_plain_computations<TX, T>(c, gated, engine);
    }
  }
}

}  // namespace

int main() {
  std::mt19937 engine(2);
  test_types<float, float>(engine);
  test_types<float, BF16>(engine);
  test_types<float, Half>(engine);
  test_types<BF16, BF16>(engine);
  test_types<Half, Half>(engine);
}
