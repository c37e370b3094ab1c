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

// Out and lse of one head of packed q, k and v.
template <class T>
struct Result {
  std::vector<T> out;
  std::vector<float> lse;

  static HeadView part(const std::vector<T>& qkv, int64_t number, int64_t width) {
    return {qkv.data() + number * width, 0, 3 * width, width};
  }
  Result(const std::vector<T>& qkv, const std::vector<int64_t>& scales, int64_t length,
         int64_t width)
      : Result(part(qkv, 0, width), part(qkv, 1, width), part(qkv, 2, width), scales, length,
               width) {}
  Result(const HeadView& q, const HeadView& k, const HeadView& v,
         const std::vector<int64_t>& scales, int64_t length, int64_t width)
      : out(nans<T>(length * width)), lse(nans<float>(length)) {
    const auto num_scales = static_cast<int64_t>(scales.size());
    const BlockCausalForwardArgs args = {
        1,          length,     1,    width,         q, k, v, scales.data(), num_scales,
        out.data(), lse.data(), 0.3f, dtype_of<T>(), 0};
    CHECK(variant_cuda_block_causal_attention_forward(&args, sizeof args, 0, nullptr) == 0,
          "launch failed");
  }
};

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b, int64_t count) {
  return std::memcmp(a.data(), b.data(), count * sizeof(T)) == 0;
}

// Not even NaN of a later scale reaches an earlier one.
template <class T>
void test_later_scales_do_not_change_earlier_ones(std::mt19937& engine) {
  const int64_t width = 40;
  const std::vector<int64_t> scales = {3, 70, 30};
  const int64_t earlier = 73, length = 103;
  std::vector<T> qkv = random_tensor<T>(length * 3 * width, engine);
  const Result<T> before(qkv, scales, length, width);
  for (int64_t i = earlier * 3 * width; i < length * 3 * width; ++i) {
    qkv[i] = narrow<T>(static_cast<float>(kNaN));
  }
  const Result<T> after(qkv, scales, length, width);
  CHECK(same_bits(before.out, after.out, earlier * width), "out of an earlier scale changed");
  CHECK(same_bits(before.lse, after.lse, earlier), "lse of an earlier scale changed");
  CHECK(!same_bits(before.lse, after.lse, length), "the later scale did not change");
}

template <class T>
void test_rows_may_lie_4_gib_apart(std::mt19937& engine) {
  const int64_t width = 8, length = 2;
  const std::vector<T> qkv = random_tensor<T>(length * 3 * width, engine);
  const Result<T> want(qkv, {length}, length, width);
  SparseTensor<T> far(kFarStride + 2 * width);
  for (int64_t t = 0; t < length; ++t) {
    std::copy_n(&qkv[(3 * t + 1) * width], 2 * width, far.data() + t * kFarStride);
  }
  const HeadView q = {qkv.data(), 0, 3 * width, width}, k = {far.data(), 0, kFarStride, width};
  const HeadView v = {far.data() + width, 0, kFarStride, width};
  const Result<T> got(q, k, v, {length}, length, width);
  std::vector<double> expected;
  for (T x : want.out) expected.push_back(widen(x));
  compare("far rows", got.out, expected);
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
           Case{1, 1, 72, {3, 70}},
           Case{1, 1, 128, {2, 66}},
           Case{1, 1, 256, {2, 40}},
           Case{1, 1, 40, {1, 4, 30}, 1},
       }) {
    test_matches_a_plain_computation<BF16>(c, engine);
    test_matches_a_plain_computation<Half>(c, engine);
    test_matches_a_plain_computation<float>(c, engine);
  }
  test_later_scales_do_not_change_earlier_ones<BF16>(engine);
  test_later_scales_do_not_change_earlier_ones<float>(engine);
  test_rows_may_lie_4_gib_apart<BF16>(engine);
  test_scales_that_do_not_fit_are_refused();
}
