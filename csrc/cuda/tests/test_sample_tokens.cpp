// Sampling against its definition with a sort, in double: guidance, top-k with ties, top-p with
// ties, draws by Philox and as in multinomial, rows in registers and rows that are read again.
#include <numeric>
#include "../sample_tokens.cu"

#include "tensors.h"

using namespace variant;
using namespace variant::test;

namespace {

struct Case {
  int64_t batch, tokens, vocab;
  double guidance;
  int64_t top_k;
  double top_p;
  bool ties = false, multinomial = false;
};

double uniform_of(uint64_t seed, uint64_t image, uint32_t position) {
  uint64_t c[4] = {position, 0, image & 0xffffffff, image >> 32};
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int i = 0; i < 10; ++i) {
    const uint64_t product0 = 0xD2511F53ull * c[0], product1 = 0xCD9E8D57ull * c[2];
    const uint64_t next[4] = {(product1 >> 32) ^ c[1] ^ k0, product1 & 0xffffffff,
                              (product0 >> 32) ^ c[3] ^ k1, product0 & 0xffffffff};
    std::copy(next, next + 4, c);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return static_cast<double>(((c[0] >> 5) << 26) + (c[1] >> 6)) / 9007199254740992.0;
}

// The kept weights of one guided row, by the definition.
std::vector<double> kept_weights(const std::vector<float>& logits, int64_t top_k, double top_p) {
  const size_t n = logits.size();
  std::vector<size_t> order(n);
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t i, size_t j) { return logits[i] < logits[j]; });
  const double largest = logits[order.back()];
  std::vector<double> weights(n);
  for (size_t i = 0; i < n; ++i) weights[i] = std::exp(logits[i] - largest);
  if (top_k > 0 && top_k < static_cast<int64_t>(n)) {
    const float kth = logits[order[n - static_cast<size_t>(top_k)]];
    for (size_t i = 0; i < n; ++i) weights[i] = logits[i] < kth ? 0.0 : weights[i];
  }
  if (top_p > 0 && top_p < 1) {
    const double total = std::accumulate(weights.begin(), weights.end(), 0.0);
    double sum = 0;
    for (size_t i = 0; i + 1 < n; ++i) {
      sum += weights[order[i]];
      if (sum > (1 - top_p) * total) break;
      weights[order[i]] = 0;
    }
  }
  return weights;
}

template <class T>
void test_draws_what_the_definition_draws(const Case& c, std::mt19937& engine) {
  const int64_t stride = c.vocab + 3, rows = c.batch * c.tokens;
  std::vector<T> logits = random_tensor<T>(2 * rows * stride, engine, 2.0);
  // Equal logits all over, and masked ones.
  for (size_t i = 0; c.ties && i < logits.size(); ++i) {
    if (i % 3 == 1) logits[i] = narrow<T>(0.5f * static_cast<float>(static_cast<int>(i) % 4));
    if (i % 7 == 2) logits[i] = narrow<T>(-1e4f);
  }
  // Without guidance the second half is not read.
  for (size_t i = logits.size() / 2; c.guidance == 0 && i < logits.size(); ++i) {
    logits[i] = narrow<T>(static_cast<float>(kNaN));
  }
  std::vector<float> exponential;
  if (c.multinomial) {
    std::exponential_distribution<float> draw(1.0f);
    exponential.resize(rows * c.vocab);
    for (float& x : exponential) x = draw(engine);
  }
  std::vector<int64_t> images(c.batch), out(rows, -1);
  for (int64_t& image : images) image = static_cast<int64_t>(engine()) << 20;
  const int64_t seed = 0x123456789abcdef, position = 91;
  // A replayed graph reads its guidance and seed from memory.
  const double guidance_later = c.guidance;
  const int64_t seed_later = seed;
  const bool later = c.top_k % 2 == 1;
  const cuda::SampleTokensArgs args = {c.batch,
                                       c.tokens,
                                       c.vocab,
                                       TokenView{logits.data(), c.tokens * stride, stride},
                                       later ? 77.0 : c.guidance,
                                       later ? &guidance_later : nullptr,
                                       c.top_k,
                                       c.top_p,
                                       later ? 5 : seed,
                                       later ? &seed_later : nullptr,
                                       images.data(),
                                       1,
                                       position,
                                       c.multinomial ? exponential.data() : nullptr,
                                       out.data(),
                                       dtype_of<T>()};
  CHECK(variant_cuda_sample_tokens(&args, sizeof args, 0, nullptr) == 0, "launch failed");
  for (int64_t r = 0; r < rows; ++r) {
    std::vector<float> guided(c.vocab);
    for (int64_t i = 0; i < c.vocab; ++i) {
      guided[i] = widen(logits[r * stride + i]);
      if (c.guidance == 0) continue;
      const volatile float with = guided[i] * static_cast<float>(1 + c.guidance);
      const volatile float without =
          widen(logits[(rows + r) * stride + i]) * static_cast<float>(c.guidance);
      guided[i] = with - without;
    }
    const std::vector<double> weights = kept_weights(guided, c.top_k, c.top_p);
    const double total = std::accumulate(weights.begin(), weights.end(), 0.0);
    int64_t want = -1;
    if (c.multinomial) {
      float best = -1;
      for (int64_t i = 0; i < c.vocab; ++i) {
        const float ratio = static_cast<float>(weights[i] / total) / exponential[r * c.vocab + i];
        if (weights[i] > 0 && ratio > best) {
          best = ratio;
          want = i;
        }
      }
    } else {
      const double u = uniform_of(seed, static_cast<uint64_t>(images[r / c.tokens]),
                                  static_cast<uint32_t>(position + r % c.tokens));
      double sum = 0;
      for (int64_t i = 0; i < c.vocab; ++i) {
        sum += weights[i];
        if (weights[i] > 0) want = i;
        if (sum > u * total) break;
      }
    }
    CHECK(out[r] == want, "%s V %lld row %lld: drew %lld, expected %lld", name_of<T>(),
          static_cast<long long>(c.vocab), static_cast<long long>(r),
          static_cast<long long>(out[r]), static_cast<long long>(want));
  }
}

void test_a_row_that_nothing_can_be_drawn_from_gives_token_0() {
  const float inf = std::numeric_limits<float>::infinity(), nan = std::nanf("");
  const std::vector<float> logits = {-inf, -inf, -inf, 1, nan, 2, 1, inf, 2, 0, 0, 9,
                                     0,    0,    0,    0, 0,   0, 0, 0,   0, 0, 0, 0};
  const std::vector<int64_t> images = {0};
  std::vector<int64_t> out(4, -1);
  const cuda::SampleTokensArgs args = {1,
                                       4,
                                       3,
                                       TokenView{logits.data(), 12, 3},
                                       0.0,
                                       nullptr,
                                       1,
                                       0.5,
                                       3,
                                       nullptr,
                                       images.data(),
                                       1,
                                       0,
                                       nullptr,
                                       out.data(),
                                       DType::kFloat32};
  CHECK(variant_cuda_sample_tokens(&args, sizeof args, 0, nullptr) == 0, "launch failed");
  CHECK((out == std::vector<int64_t>{0, 0, 0, 2}), "drew %lld %lld %lld %lld",
        static_cast<long long>(out[0]), static_cast<long long>(out[1]),
        static_cast<long long>(out[2]), static_cast<long long>(out[3]));
}

void test_a_row_too_long_to_sum_is_refused() {
  cuda::SampleTokensArgs args = {};
  args.vocab = cuda::kMostEntries + 1;
  CHECK(variant_cuda_sample_tokens(&args, sizeof args, 0, nullptr) != 0, "accepted");
}

}  // namespace

int main() {
  std::mt19937 engine(7);
  for (const Case& c : {
           Case{1, 1, 1, 0.0, 1, 0.0},
           Case{2, 5, 37, 1.5, 5, 0.0},
           Case{2, 5, 100, 0.0, 0, 0.9},
           Case{1, 9, 128, 0.7, 40, 0.96, true},
           Case{1, 9, 77, 0.0, 9, 0.5, true},
           Case{1, 3, 515, 2.0, 40, 0.96},
           Case{1, 2, 1300, 0.5, 900, 0.8},
           Case{1, 5, 64, 1.0, 0, 0.0},
           Case{1, 5, 64, 1.0, 20, 0.7, true, true},
           Case{1, 1, 4131, 0.3, 0, 0.95, true},
           Case{1, 1, 4131, 0.3, 601, 0.95, false, true},
       }) {
    test_draws_what_the_definition_draws<float>(c, engine);
    test_draws_what_the_definition_draws<BF16>(c, engine);
    test_draws_what_the_definition_draws<Half>(c, engine);
  }
  test_a_row_that_nothing_can_be_drawn_from_gives_token_0();
  test_a_row_too_long_to_sum_is_refused();
}
