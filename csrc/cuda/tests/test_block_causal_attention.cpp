// Block-causal attention and its log of sums against a plain computation in double.
#include "../block_causal_attention.cu"
#include "tensors.h"

using namespace variant;
using namespace variant::test;

namespace {

struct Case {
  int64_t batch, heads, width;
  std::vector<int64_t> scales;
  int64_t shift = 0;  // offset of q from a 16-byte boundary, in elements
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
  const int64_t head = c.heads * c.width, token = 3 * head, batch = length * token;
  const Shifted<T> qkv(c.batch * batch, c.shift, engine);
  std::vector<double> want(c.batch * length * head, 0.0), want_lse(c.batch * c.heads * length);
  for (int64_t b = 0; b < c.batch; ++b) {
    for (int64_t h = 0; h < c.heads; ++h) {
      for (int64_t t = 0; t < length; ++t) {
        const int64_t from = b * batch + h * c.width,
                      to = ((b * length + t) * c.heads + h) * c.width;
        std::vector<double> p(visible[t]);
        double peak = -1e300, sum = 0;
        for (int64_t s = 0; s < visible[t]; ++s) {
          for (int64_t d = 0; d < c.width; ++d) {
            p[s] += qkv[from + t * token + d] * qkv[from + s * token + head + d] * c.softmax_scale;
          }
          peak = std::max(peak, p[s]);
        }
        for (double& x : p) sum += x = std::exp(x - peak);
        want_lse[(b * c.heads + h) * length + t] = peak + std::log(sum);
        for (int64_t s = 0; s < visible[t]; ++s) {
          for (int64_t d = 0; d < c.width; ++d) {
            want[to + d] += p[s] / sum * qkv[from + s * token + 2 * head + d];
          }
        }
      }
    }
  }
  std::vector<T> out = nans<T>(c.batch * length * head);
  std::vector<float> lse = nans<float>(c.batch * c.heads * length);
  const auto view = [&](int64_t part) {
    return HeadView{qkv.data() + part * head, batch, token, c.width};
  };
  const BlockCausalForwardArgs args = {c.batch,
                                       length,
                                       c.heads,
                                       c.width,
                                       view(0),
                                       view(1),
                                       view(2),
                                       c.scales.data(),
                                       static_cast<int64_t>(c.scales.size()),
                                       out.data(),
                                       lse.data(),
                                       c.softmax_scale,
                                       dtype_of<T>(),
                                       0};
  CHECK(variant_cuda_block_causal_attention_forward(&args, sizeof args, 0, nullptr) == 0,
        "launch failed");
  compare("out", out, want);
  compare("lse", lse, want_lse);
}

void test_scales_that_do_not_fit_are_refused() {
  const std::vector<int64_t> many(cuda::kMostScales + 1, 1), few = {1, 2};
  BlockCausalForwardArgs args = {};
  args.length = static_cast<int64_t>(many.size());
  args.num_scales = args.length;
  args.scale_lengths = many.data();
  CHECK(variant_cuda_block_causal_attention_forward(&args, sizeof args, 0, nullptr) != 0,
        "accepted too many scales");
  args.num_scales = 2;
  args.scale_lengths = few.data();
  CHECK(variant_cuda_block_causal_attention_forward(&args, sizeof args, 0, nullptr) != 0,
        "accepted scales that leave tokens out");
}

}  // namespace

int main() {
  std::mt19937 engine(5);
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
  test_scales_that_do_not_fit_are_refused();
}
