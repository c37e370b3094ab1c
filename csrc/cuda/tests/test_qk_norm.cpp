// qk_norm forward and backward, and its fused form, against plain computations in double: every
// number of lanes per head, strided and misaligned rows, zero rows, clamped factors.
#include "../qk_norm.cu"
#include "../qk_norm_append_paged_kv.cu"
#include "tensors.h"

using namespace variant;
using namespace variant::test;

namespace {

struct Case {
  int64_t batch, tokens, heads, width;
  int64_t shift = 0;  // offset of the inputs from a 16-byte boundary, in elements
};

// exp(min(s, log 100)), its largest argument past the clamp.
std::vector<float> random_scales(int64_t heads, std::mt19937& engine) {
  std::vector<float> scales = random_tensor<float>(heads, engine);
  scales[0] = 6.0f;
  return scales;
}
double factor_of(float scale) {
  return std::exp(std::min(static_cast<double>(scale), std::log(100.0)));
}

// x / max(|x|, 1e-12) * factor, for one head that begins at x[from].
template <class Tensor>
std::vector<double> normalised(const Tensor& x, int64_t from, int64_t width, double factor) {
  double squares = 0;
  for (int64_t d = 0; d < width; ++d) squares += x[from + d] * x[from + d];
  const double divisor = std::max(std::sqrt(squares), 1e-12);
  std::vector<double> out(width);
  for (int64_t d = 0; d < width; ++d) out[d] = x[from + d] / divisor * factor;
  return out;
}

template <class T>
void test_forward_and_backward_match(const Case& c, std::mt19937& engine) {
  const int64_t head = c.heads * c.width, token = 3 * head, batch = c.tokens * token;
  const int64_t rows = c.batch * c.tokens, count = rows * head;
  Shifted<T> q(c.batch * batch, c.shift, engine), k(c.batch * batch, c.shift, engine);
  // A head of zeros: its norm is clamped.
  for (int64_t d = 0; d < c.width; ++d) q.memory[q.shift + d] = narrow<T>(0.0f);
  const Shifted<T> grad_q(count, 0, engine), grad_k(count, 0, engine);
  const std::vector<float> scales = random_scales(c.heads, engine);
  const HeadView q_view = {q.data(), batch, token, c.width};
  const HeadView k_view = {k.data(), batch, token, c.width};
  const HeadView grad_q_view = {grad_q.data(), c.tokens * head, head, c.width};
  const HeadView grad_k_view = {grad_k.data(), c.tokens * head, head, c.width};

  std::vector<double> want_q, want_k, want_dq, want_dk, want_ds(c.heads, 0.0);
  const auto append = [](std::vector<double>& all, const std::vector<double>& part) {
    all.insert(all.end(), part.begin(), part.end());
  };
  // Gradient of one head: (g - u (g . u)) / |x|, and g / eps where the norm is clamped.
  const auto gradient = [&](const Shifted<T>& g, int64_t g_from, const Shifted<T>& x, int64_t from,
                            double factor, double* along) {
    const std::vector<double> unit = normalised(x, from, c.width, 1.0);
    double squares = 0, dot = 0;
    for (int64_t d = 0; d < c.width; ++d) {
      squares += x[from + d] * x[from + d];
      dot += g[g_from + d] * unit[d];
    }
    const double norm = std::sqrt(squares);
    std::vector<double> out(c.width);
    for (int64_t d = 0; d < c.width; ++d) {
      out[d] = norm < 1e-12 ? g[g_from + d] * factor / 1e-12
                            : (g[g_from + d] - unit[d] * dot) * factor / norm;
    }
    *along = dot;
    return out;
  };
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t h = 0; h < c.heads; ++h) {
      const int64_t from = r * token + h * c.width, g_from = r * head + h * c.width;
      const double factor = factor_of(scales[h]);
      append(want_q, normalised(q, from, c.width, factor));
      append(want_k, normalised(k, from, c.width, 1.0));
      double along = 0;
      append(want_dk, gradient(grad_k, g_from, k, from, 1.0, &along));
      append(want_dq, gradient(grad_q, g_from, q, from, factor, &along));
      if (scales[h] <= std::log(100.0)) want_ds[h] += along * factor;
    }
  }

  std::vector<T> q_out = nans<T>(count), k_out = nans<T>(count);
  const QkNormForwardArgs forward = {
      c.batch,       c.tokens,     c.heads,      c.width,       q_view, k_view,
      scales.data(), q_out.data(), k_out.data(), dtype_of<T>(), 0};
  CHECK(variant_cuda_qk_norm_forward(&forward, sizeof forward, 0, nullptr) == 0, "launch failed");
  compare("q", q_out, want_q);
  compare("k", k_out, want_k);

  std::vector<T> dq = nans<T>(count), dk = nans<T>(count);
  std::vector<float> ds = nans<float>(c.heads);
  const int64_t pieces = cuda::ceil_div(rows, cuda::kQkNormTokensPerPiece);
  std::vector<float> partial = nans<float>(pieces * c.heads);
  const cuda::QkNormBackwardCudaArgs backward = {
      {c.batch, c.tokens, c.heads, c.width, grad_q_view, grad_k_view, q_view, k_view, scales.data(),
       dq.data(), dk.data(), ds.data(), dtype_of<T>(), 0},
      partial.data()};
  CHECK(variant_cuda_qk_norm_backward(&backward, sizeof backward, 0, nullptr) == 0,
        "launch failed");
  // The gradient at the clamped head is 1e12 times the others, so it is compared separately.
  for (int64_t d = 0; d < c.width; ++d) {
    const double got = widen(dq[d]);
    if (!std::is_same_v<T, Half>) {  // the largest float16 is 65504
      CHECK(std::fabs(got - want_dq[d]) <= tolerance_of<T>() * std::fabs(want_dq[d]),
            "clamped dq[%lld]: got %g, expected %g", static_cast<long long>(d), got, want_dq[d]);
    }
    dq[d] = narrow<T>(0.0f);
    want_dq[d] = 0;
  }
  compare("dq", dq, want_dq);
  compare("dk", dk, want_dk);
  compare("dscale_mul", ds, want_ds);
}

template <class T>
void test_fused_form_writes_queries_and_pages(const Case& c, bool norm, std::mt19937& engine) {
  const int64_t head = c.heads * c.width, token = 3 * head, batch = c.tokens * token;
  const int64_t rows = c.batch * c.tokens, page_size = 3;
  const int64_t pages = cuda::ceil_div(rows, page_size) + 1;
  const Shifted<T> qkv(c.batch * batch, c.shift, engine);
  const std::vector<float> scales = random_scales(c.heads, engine);
  std::vector<int64_t> slots(pages * page_size);
  for (size_t i = 0; i < slots.size(); ++i) slots[i] = static_cast<int64_t>(i);
  std::shuffle(slots.begin(), slots.end(), engine);
  slots.resize(rows);
  slots.shrink_to_fit();
  if (rows > 2) slots[1] = -1;
  if (rows > 2) slots[2] = pages * page_size;  // past the last page
  const int64_t stored = pages * page_size * head;
  std::vector<T> q_out = nans<T>(norm ? rows * head : 0);
  std::vector<T> k_pages(stored, narrow<T>(7.0f)), v_pages(stored, narrow<T>(7.0f));
  std::vector<double> want_q, want_k(stored, 7.0), want_v(stored, 7.0);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t h = 0; h < c.heads; ++h) {
      const int64_t from = r * token + h * c.width;
      if (norm) {
        const std::vector<double> q = normalised(qkv, from, c.width, factor_of(scales[h]));
        want_q.insert(want_q.end(), q.begin(), q.end());
      }
      if (slots[r] < 0 || slots[r] >= pages * page_size) continue;
      const std::vector<double> k = normalised(qkv, from + head, c.width, 1.0);
      for (int64_t d = 0; d < c.width; ++d) {
        const int64_t to = slots[r] * head + h * c.width + d;
        want_k[to] = norm ? k[d] : qkv[from + head + d];
        want_v[to] = qkv[from + 2 * head + d];
      }
    }
  }
  const auto view = [&](int64_t part) {
    return HeadView{qkv.data() + part * head, batch, token, c.width};
  };
  const cuda::QkNormAppendPagedKvCudaArgs args = {{c.batch,
                                                   c.tokens,
                                                   c.heads,
                                                   c.width,
                                                   page_size,
                                                   view(0),
                                                   view(1),
                                                   view(2),
                                                   norm ? scales.data() : nullptr,
                                                   norm ? q_out.data() : nullptr,
                                                   k_pages.data(),
                                                   v_pages.data(),
                                                   page_size * head,
                                                   head,
                                                   c.width,
                                                   page_size * head,
                                                   head,
                                                   c.width,
                                                   slots.data(),
                                                   dtype_of<T>(),
                                                   0},
                                                  pages};
  CHECK(variant_cuda_qk_norm_append_paged_kv(&args, sizeof args, 0, nullptr) == 0, "launch failed");
  compare("q", q_out, want_q);
  compare("k_pages", k_pages, want_k);
  compare("v_pages", v_pages, want_v);
}

template <class T>
void test_dtype(std::mt19937& engine) {
  for (const Case& c : {Case{1, 1, 1, 16}, Case{2, 3, 2, 24}, Case{1, 70, 2, 64}, Case{2, 2, 3, 80},
                        Case{1, 3, 2, 256}, Case{2, 3, 1, 40, 1}}) {
    test_forward_and_backward_match<T>(c, engine);
    test_fused_form_writes_queries_and_pages<T>(c, true, engine);
    test_fused_form_writes_queries_and_pages<T>(c, false, engine);
  }
}

}  // namespace

int main() {
  std::mt19937 engine(3);
  test_dtype<float>(engine);
  test_dtype<BF16>(engine);
  test_dtype<Half>(engine);
}
