// adaLN and its gated form, forward and backward, against plain computations in double: columns
// held in registers and columns read again, float32 beside 16-bit values, strided and misaligned
// rows.
#include "../adaln.cu"
#include "tensors.h"

using namespace variant;
using namespace variant::test;

namespace {

struct Case {
  int64_t batch, tokens, width;
  int64_t shift = 0;  // offset of the inputs from a 16-byte boundary, in elements
};

// Inputs of both forms, with `stride` elements from one row to the next.
template <class TX, class T>
struct Inputs {
  Inputs(const Case& c, std::mt19937& engine)
      : stride(c.width + (c.width % 8 == 0 ? 8 : 3)),
        image(c.tokens * stride),
        x(c.batch * image, c.shift, engine),
        grad_x_out(c.batch * image, c.shift, engine),
        y(c.batch * image, c.shift, engine),
        grad_h(c.batch * image, c.shift, engine),
        gate(c.batch * stride, c.shift, engine),
        scale(c.batch * stride, c.shift, engine),
        shift(c.batch * stride, c.shift, engine) {}

  template <class Tensor>
  TokenView tokens(const Tensor& tensor) const {
    return {tensor.data(), image, stride};
  }
  RowView row(const Shifted<T>& tensor) const { return {tensor.data(), stride}; }

  int64_t stride, image;
  Shifted<TX> x, grad_x_out;
  Shifted<T> y, grad_h, gate, scale, shift;
};

template <class TX, class T>
struct Forward {
  std::vector<TX> x_out;
  std::vector<T> h;
  std::vector<float> mean, rstd;
};

struct Expected {
  std::vector<double> x_out, h, mean, rstd;
  std::vector<double> grad_x, grad_y, grad_scale, grad_shift, grad_gate;
};

constexpr float kEps = 1e-6f;

template <class TX, class T>
Forward<TX, T> run_forward(const Case& c, bool gated, const Inputs<TX, T>& in) {
  const int64_t rows = c.batch * c.tokens, count = rows * c.width;
  const DType x_dtype = dtype_of<TX>(), dtype = dtype_of<T>();
  Forward<TX, T> out = {nans<TX>(gated ? count : 0), nans<T>(count), nans<float>(rows),
                        nans<float>(rows)};
  if (gated) {
    const GatedAdaLNForwardArgs args = {c.batch,
                                        c.tokens,
                                        c.width,
                                        in.tokens(in.x),
                                        in.tokens(in.y),
                                        in.row(in.gate),
                                        in.row(in.scale),
                                        in.row(in.shift),
                                        out.x_out.data(),
                                        out.h.data(),
                                        out.mean.data(),
                                        out.rstd.data(),
                                        kEps,
                                        x_dtype,
                                        dtype,
                                        0};
    CHECK(variant_cuda_gated_adaln_forward(&args, sizeof args, 0, nullptr) == 0, "launch failed");
  } else {
    const AdaLNForwardArgs args = {c.batch,
                                   c.tokens,
                                   c.width,
                                   in.tokens(in.x),
                                   in.row(in.scale),
                                   in.row(in.shift),
                                   out.h.data(),
                                   out.mean.data(),
                                   out.rstd.data(),
                                   kEps,
                                   x_dtype,
                                   dtype,
                                   0};
    CHECK(variant_cuda_adaln_forward(&args, sizeof args, 0, nullptr) == 0, "launch failed");
  }
  return out;
}

// Row r of image b in double. The gated form normalises the sum as the kernel rounded it, x_out.
template <class TX, class T>
void expect_row(const Case& c, bool gated, const Inputs<TX, T>& in, const std::vector<TX>& x_out,
                int64_t r, Expected& want) {
  const int64_t width = c.width, b = r / c.tokens, from = r * in.stride, of = b * in.stride;
  const double n = static_cast<double>(width);
  std::vector<double> x(width), xhat(width), g(width);
  double sum = 0, squares = 0, mean_g = 0, mean_g_xhat = 0;
  for (int64_t i = 0; i < width; ++i) {
    x[i] = in.x[from + i];
    if (gated) {
      want.x_out.push_back(x[i] + in.gate[of + i] * in.y[from + i]);
      x[i] = widen(x_out[r * width + i]);
    }
    sum += x[i];
  }
  const double mean = want.mean[r] = sum / n;
  for (double value : x) squares += (value - mean) * (value - mean);
  const double rstd = want.rstd[r] = 1 / std::sqrt(squares / n + kEps);
  for (int64_t i = 0; i < width; ++i) {
    xhat[i] = (x[i] - mean) * rstd;
    g[i] = in.grad_h[from + i] * (1 + in.scale[of + i]);
    want.h[r * width + i] = xhat[i] * (1 + in.scale[of + i]) + in.shift[of + i];
    mean_g += g[i] / n;
    mean_g_xhat += g[i] * xhat[i] / n;
  }
  for (int64_t i = 0; i < width; ++i) {
    double total = rstd * (g[i] - mean_g - xhat[i] * mean_g_xhat);
    if (gated) total += in.grad_x_out[from + i];
    want.grad_x[r * width + i] = total;
    if (gated) want.grad_y[r * width + i] = in.gate[of + i] * total;
    want.grad_scale[b * width + i] += in.grad_h[from + i] * xhat[i];
    want.grad_shift[b * width + i] += in.grad_h[from + i];
    want.grad_gate[b * width + i] += total * in.y[from + i];
  }
}

template <class TX, class T>
Expected expect(const Case& c, bool gated, const Inputs<TX, T>& in, const std::vector<TX>& x_out) {
  const int64_t rows = c.batch * c.tokens;
  Expected want;
  for (auto* of_rows : {&want.mean, &want.rstd}) of_rows->resize(rows);
  for (auto* of_tokens : {&want.h, &want.grad_x}) of_tokens->resize(rows * c.width);
  want.grad_y.resize(gated ? rows * c.width : 0);
  for (auto* of_images : {&want.grad_scale, &want.grad_shift, &want.grad_gate}) {
    of_images->resize(c.batch * c.width);
  }
  for (int64_t r = 0; r < rows; ++r) expect_row(c, gated, in, x_out, r, want);
  return want;
}

template <class TX, class T>
void check_backward(const Case& c, bool gated, const Inputs<TX, T>& in,
                    const Forward<TX, T>& forward, const Expected& want) {
  const int64_t width = c.width, count = c.batch * c.tokens * width;
  const DType x_dtype = dtype_of<TX>(), dtype = dtype_of<T>();
  const int64_t tiles = cuda::ceil_div(c.tokens, cuda::kAdaLNTokensPerTile);
  std::vector<float> partial = nans<float>(c.batch * tiles * (gated ? 3 : 2) * width);
  std::vector<TX> grad_x = nans<TX>(count);
  std::vector<T> grad_y = nans<T>(gated ? count : 0), grad_gate = nans<T>(c.batch * width);
  std::vector<T> grad_scale = nans<T>(c.batch * width), grad_shift = nans<T>(c.batch * width);
  if (gated) {
    const TokenView x_out = {forward.x_out.data(), c.tokens * width, width};
    const cuda::GatedAdaLNBackwardCudaArgs args = {
        {c.batch, c.tokens, width, in.tokens(in.grad_x_out), in.tokens(in.grad_h), x_out,
         in.tokens(in.y), in.row(in.gate), in.row(in.scale), forward.mean.data(),
         forward.rstd.data(), grad_x.data(), grad_y.data(), grad_gate.data(), grad_scale.data(),
         grad_shift.data(), x_dtype, dtype, 0},
        partial.data()};
    CHECK(variant_cuda_gated_adaln_backward(&args, sizeof args, 0, nullptr) == 0, "launch failed");
    compare("grad_y", grad_y, want.grad_y);
    compare("grad_gate", grad_gate, want.grad_gate);
  } else {
    const cuda::AdaLNBackwardCudaArgs args = {
        {c.batch, c.tokens, width, in.tokens(in.grad_h), in.tokens(in.x), in.row(in.scale),
         forward.mean.data(), forward.rstd.data(), grad_x.data(), grad_scale.data(),
         grad_shift.data(), x_dtype, dtype, 0},
        partial.data()};
    CHECK(variant_cuda_adaln_backward(&args, sizeof args, 0, nullptr) == 0, "launch failed");
  }
  compare("grad_x", grad_x, want.grad_x);
  compare("grad_scale", grad_scale, want.grad_scale);
  compare("grad_shift", grad_shift, want.grad_shift);
}

template <class TX, class T>
void test_matches_plain_computations(const Case& c, bool gated, std::mt19937& engine) {
  const Inputs<TX, T> in(c, engine);
  const Forward<TX, T> forward = run_forward(c, gated, in);
  const Expected want = expect(c, gated, in, forward.x_out);
  compare("x_out", forward.x_out, want.x_out);
  compare("h", forward.h, want.h);
  compare("mean", forward.mean, want.mean);
  compare("rstd", forward.rstd, want.rstd);
  check_backward(c, gated, in, forward, want);
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
