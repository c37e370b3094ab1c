// Gradients of block-causal attention against a plain computation in double: tensor cores and plain
// products, tiles that scales cut anywhere.
#include "../block_causal_attention_backward.cu"
#include "tensors.h"

using namespace variant;
using namespace variant::test;

namespace {

struct Case {
  int64_t batch, heads, width;
  std::vector<int64_t> scales;
  int64_t shift = 0;  // offset of q, k and v from a 16-byte boundary, in elements
  float softmax_scale = 0.3f;
};

template <class T>
void test_matches_a_plain_computation(const Case& c, std::mt19937& engine) {
  int64_t length = 0;
  std::vector<int64_t> visible;
  for (int64_t tokens : c.scales) {
    length += tokens;
    visible.resize(length, length);
  }
  const int64_t width = c.width, head = c.heads * width, token = 3 * head, batch = length * token;
  const int64_t count = c.batch * length * head;
  const Shifted<T> qkv(c.batch * batch, c.shift, engine), grad(count, 0, engine);
  std::vector<T> out = nans<T>(count);
  std::vector<float> lse = nans<float>(c.batch * c.heads * length);
  std::vector<double> want_dq(count), want_dk(count), want_dv(count);
  for (int64_t b = 0; b < c.batch; ++b) {
    for (int64_t h = 0; h < c.heads; ++h) {
      const auto in = [&](int64_t part, int64_t t, int64_t d) {
        return qkv[b * batch + t * token + part * head + h * width + d];
      };
      const auto index = [&](int64_t t) { return ((b * length + t) * c.heads + h) * width; };
      for (int64_t t = 0; t < length; ++t) {
        std::vector<double> p(visible[t]), slope(visible[t]), mean(width);
        double peak = -1e300, sum = 0, delta = 0;
        for (int64_t s = 0; s < visible[t]; ++s) {
          for (int64_t d = 0; d < width; ++d) p[s] += in(0, t, d) * in(1, s, d) * c.softmax_scale;
          peak = std::max(peak, p[s]);
        }
        for (double& x : p) sum += x = std::exp(x - peak);
        lse[(b * c.heads + h) * length + t] = static_cast<float>(peak + std::log(sum));
        for (int64_t s = 0; s < visible[t]; ++s) {
          p[s] /= sum;
          for (int64_t d = 0; d < width; ++d) {
            mean[d] += p[s] * in(2, s, d);
            slope[s] += grad[index(t) + d] * in(2, s, d);
            want_dv[index(s) + d] += p[s] * grad[index(t) + d];
          }
          delta += p[s] * slope[s];
        }
        for (int64_t d = 0; d < width; ++d) {
          out[index(t) + d] = narrow<T>(static_cast<float>(mean[d]));
        }
        for (int64_t s = 0; s < visible[t]; ++s) {
          const double g = p[s] * (slope[s] - delta) * c.softmax_scale;
          for (int64_t d = 0; d < width; ++d) {
            want_dq[index(t) + d] += g * in(1, s, d);
            want_dk[index(s) + d] += g * in(0, t, d);
          }
        }
      }
    }
  }
  std::vector<T> dq = nans<T>(count), dk = nans<T>(count), dv = nans<T>(count);
  std::vector<float> delta = nans<float>(lse.size());
  const auto view = [&](int64_t part) {
    return HeadView{qkv.data() + part * head, batch, token, width};
  };
  const auto whole = [&](const T* data) { return HeadView{data, length * head, head, width}; };
  const cuda::BlockCausalBackwardCudaArgs args = {
      {c.batch, length, c.heads, width, whole(grad.data()), view(0), view(1), view(2),
       whole(out.data()), lse.data(), c.scales.data(), static_cast<int64_t>(c.scales.size()),
       dq.data(), dk.data(), dv.data(), c.softmax_scale, dtype_of<T>(), 0},
      delta.data()};
  CHECK(variant_cuda_block_causal_attention_backward(&args, sizeof args, 0, nullptr) == 0,
        "launch failed");
  // out, P and dS are rounded to T before they are multiplied.
  compare("dq", dq, want_dq, 2.0, 1.0);
  compare("dk", dk, want_dk, 2.0, 1.0);
  compare("dv", dv, want_dv, 2.0, 1.0);
}

}  // namespace

int main() {
  std::mt19937 engine(6);
  for (const Case& c : {
           Case{1, 1, 16, {1}},
           Case{2, 2, 24, {1, 4, 9}},
           Case{1, 1, 64, {1, 4, 9, 16, 25, 36}},
           Case{1, 1, 32, {60, 10, 70}, 0, -0.4f},
           Case{1, 1, 72, {3, 40}},
           Case{1, 2, 128, {1, 2, 35}},
           Case{1, 1, 256, {2, 17}},
           Case{1, 1, 40, {1, 4, 30}, 1},
       }) {
    test_matches_a_plain_computation<BF16>(c, engine);
    test_matches_a_plain_computation<Half>(c, engine);
    test_matches_a_plain_computation<float>(c, engine);
  }
}
