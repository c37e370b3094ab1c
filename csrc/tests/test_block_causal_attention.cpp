#include "check.h"

using namespace variant;
using namespace variant::test;

namespace {

struct Case {
  int64_t batch, heads, width;
  std::vector<int64_t> scale_lengths;
  float softmax_scale = 0.4f;
};

void run_case(const char* isa, const KernelTable& table, const Case& c, DType dtype,
              std::mt19937& engine) {
  int64_t length = 0;
  std::vector<int64_t> visible;
  for (int64_t tokens : c.scale_lengths) {
    length += tokens;
    visible.resize(length, length);
  }
  const int64_t slot = c.heads * c.width, stride = 3 * slot, count = c.batch * length * slot;
  Values qkv = Values::random(dtype, c.batch * length * stride, engine);
  Values grad = Values::random(dtype, count, engine);
  const size_t bytes = dtype == DType::kFloat32 ? 4 : 2;
  const auto part = [&](int64_t which) {
    return HeadView{static_cast<char*>(qkv.data()) + which * slot * bytes, length * stride, stride,
                    c.width};
  };
  const HeadView flat_grad = {grad.data(), length * slot, slot, c.width};
  const float softmax_scale = c.softmax_scale;

  std::vector<double> want(count, 0.0), want_lse(c.batch * c.heads * length);
  std::vector<double> dq(count, 0.0), dk(count, 0.0), dv(count, 0.0);
  for (int64_t b = 0; b < c.batch; ++b) {
    for (int64_t h = 0; h < c.heads; ++h) {
      const auto in = [&](int64_t which, int64_t t, int64_t d) {
        return qkv[(b * length + t) * stride + which * slot + h * c.width + d];
      };
      const auto flat = [&](int64_t t, int64_t d) {
        return ((b * length + t) * c.heads + h) * c.width + d;
      };
      for (int64_t t = 0; t < length; ++t) {
        std::vector<double> p(visible[t]), dp(visible[t]);
        double peak = -1e300, sum = 0, delta = 0;
        for (int64_t s = 0; s < visible[t]; ++s) {
          for (int64_t d = 0; d < c.width; ++d) p[s] += in(0, t, d) * in(1, s, d) * softmax_scale;
          peak = std::max(peak, p[s]);
        }
        for (double& x : p) sum += x = std::exp(x - peak);
        want_lse[(b * c.heads + h) * length + t] = peak + std::log(sum);
        for (int64_t s = 0; s < visible[t]; ++s) {
          p[s] /= sum;
          for (int64_t d = 0; d < c.width; ++d) {
            want[flat(t, d)] += p[s] * in(2, s, d);
            dp[s] += grad[flat(t, d)] * in(2, s, d);
            dv[flat(s, d)] += p[s] * grad[flat(t, d)];
          }
          delta += p[s] * dp[s];
        }
        for (int64_t s = 0; s < visible[t]; ++s) {
          const double ds = p[s] * (dp[s] - delta) * softmax_scale;
          for (int64_t d = 0; d < c.width; ++d) {
            dq[flat(t, d)] += ds * in(1, s, d);
            dk[flat(s, d)] += ds * in(0, t, d);
          }
        }
      }
    }
  }
  Values out(dtype, count), lse(DType::kFloat32, c.batch * c.heads * length);
  table.block_causal_attention_forward({c.batch, length, c.heads, c.width, part(0), part(1),
                                        part(2), c.scale_lengths.data(),
                                        static_cast<int64_t>(c.scale_lengths.size()), out.data(),
                                        static_cast<float*>(lse.data()), softmax_scale, dtype, 2});
  check_close(isa, "out", out, want);
  check_close(isa, "lse", lse, want_lse);
  // With many threads a head takes two passes, with one thread a single one. The bits must agree.
  std::vector<Values> first;
  for (const int threads : {1, 2, 3}) {
    Values got_dq(dtype, count), got_dk(dtype, count), got_dv(dtype, count);
    table.block_causal_attention_backward(
        {c.batch, length, c.heads, c.width, flat_grad, part(0), part(1), part(2),
         HeadView{out.data(), length * slot, slot, c.width}, static_cast<float*>(lse.data()),
         c.scale_lengths.data(), static_cast<int64_t>(c.scale_lengths.size()), got_dq.data(),
         got_dk.data(), got_dv.data(), softmax_scale, dtype, threads});
    check_close(isa, "dq", got_dq, dq);
    check_close(isa, "dk", got_dk, dk);
    check_close(isa, "dv", got_dv, dv);
    if (threads == 1) {
      first = {got_dq, got_dk, got_dv};
      continue;
    }
    for (int64_t i = 0; i < count; ++i) {
      CHECK(got_dq[i] == first[0][i] && got_dk[i] == first[1][i] && got_dv[i] == first[2][i],
            "%s: %d threads change element %lld", isa, threads, static_cast<long long>(i));
    }
  }
}

// Scores of 1e11: the softmax is one-hot, and the rounding error of a score exceeds the range of
// 2^x.
void huge_scores_choose_the_largest(const char* isa, const KernelTable& table, DType dtype,
                                    std::mt19937& engine) {
  const std::vector<int64_t> scale_lengths = {1, 4, 200};
  const int64_t length = 205, width = 64, count = length * width;
  Values q = Values::random(dtype, count, engine, 1e5),
         k = Values::random(dtype, count, engine, 1e5);
  Values v = Values::random(dtype, count, engine), grad = Values::random(dtype, count, engine);
  const auto view = [&](Values& x) { return HeadView{x.data(), count, width, width}; };
  for (const float softmax_scale : {0.125f, 1.0f, -0.125f}) {
    std::vector<double> want, want_lse;
    for (int64_t t = 0; t < length; ++t) {
      const int64_t visible = t < 1 ? 1 : t < 5 ? 5 : length;
      double peak = -INFINITY;
      int64_t best = 0;
      for (int64_t s = 0; s < visible; ++s) {
        double score = 0;
        for (int64_t d = 0; d < width; ++d) score += q[t * width + d] * k[s * width + d];
        if (score * softmax_scale > peak) {
          peak = score * softmax_scale;
          best = s;
        }
      }
      want_lse.push_back(peak);
      for (int64_t d = 0; d < width; ++d) want.push_back(v[best * width + d]);
    }
    Values out(dtype, count), lse(DType::kFloat32, length);
    table.block_causal_attention_forward(
        {1, length, 1, width, view(q), view(k), view(v), scale_lengths.data(), 3, out.data(),
         static_cast<float*>(lse.data()), softmax_scale, dtype, 2});
    check_close(isa, "out of huge scores", out, want);
    check_close(isa, "lse of huge scores", lse, want_lse);
    Values dq(dtype, count), dk(dtype, count), dv(dtype, count);
    table.block_causal_attention_backward({1, length, 1, width, view(grad), view(q), view(k),
                                           view(v), view(out), static_cast<float*>(lse.data()),
                                           scale_lengths.data(), 3, dq.data(), dk.data(), dv.data(),
                                           softmax_scale, dtype, 2});
    for (int64_t i = 0; i < count; ++i) {
      CHECK(std::isfinite(dq[i]) && std::isfinite(dk[i]) && std::isfinite(dv[i]),
            "%s %s: element %lld of a gradient is %g, %g, %g", isa, q.name(),
            static_cast<long long>(i), dq[i], dk[i], dv[i]);
    }
  }
}

}  // namespace

int main() {
  for_each_isa([](const char* isa, const KernelTable& table) {
    std::mt19937 engine(5);
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
      // Three wide tokens have 1/sqrt(D): if the softmax is nearly one-hot, gradients nearly
      // vanish, and the rest is the rounding error of `out`, an input of the backward pass.
      for (const Case& c : {Case{1, 1, 16, {1}}, Case{2, 3, 24, {1, 4, 9, 16, 25}},
                            Case{1, 1, 64, {1, 4, 36, 100}}, Case{1, 2, 256, {9, 16}},
                            Case{1, 1, 40, {81, 4, 100}}, Case{1, 2, 80, {1, 1, 1}, 0.11f},
                            Case{1, 1, 32, {3, 5, 90}, -0.3f}, Case{1, 1, 16, {2, 7}, 0.0f}}) {
        run_case(isa, table, c, dtype, engine);
      }
      huge_scores_choose_the_largest(isa, table, dtype, engine);
    }
  });
}
