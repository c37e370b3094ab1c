#include <numeric>
#include <tuple>

#include "check.h"

using namespace variant;
using namespace variant::test;

namespace {

// Philox4x32-10, written from the paper's description with 64-bit words.
double uniform(uint64_t seed, uint64_t image, uint32_t position) {
  uint64_t c[4] = {position, 0, image & 0xffffffff, image >> 32};
  uint64_t k[2] = {seed & 0xffffffff, seed >> 32};
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = c[0] * 0xD2511F53u, b = c[2] * 0xCD9E8D57u;
    const uint64_t next[4] = {(b >> 32) ^ c[1] ^ k[0], b & 0xffffffff, (a >> 32) ^ c[3] ^ k[1],
                              a & 0xffffffff};
    std::copy(next, next + 4, c);
    k[0] = (k[0] + 0x9E3779B9u) & 0xffffffff;
    k[1] = (k[1] + 0xBB67AE85u) & 0xffffffff;
  }
  return (static_cast<double>(c[0] >> 5) * 67108864.0 + static_cast<double>(c[1] >> 6)) / 0x1p53;
}

// By sorting, in double. image < 0: argmax of p / exponential instead of Philox.
int64_t naive(std::vector<float> a, int64_t top_k, double top_p, double u,
              const float* exponential) {
  const size_t vocab = a.size();
  std::vector<size_t> order(vocab);
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t i, size_t j) { return a[i] < a[j]; });
  const float largest = a[order.back()];
  std::vector<double> weights(vocab);
  const bool by_rank = top_k > 0 && top_k < static_cast<int64_t>(vocab);
  const float floor = by_rank ? a[order[vocab - static_cast<size_t>(top_k)]] : -INFINITY;
  double total = 0;
  for (size_t i = 0; i < vocab; ++i) {
    weights[i] = a[i] >= floor ? std::exp(static_cast<double>(a[i]) - largest) : 0.0;
    total += weights[i];
  }
  if (top_p > 0 && top_p < 1) {
    double sum = 0, left = 0;
    for (size_t rank = 0; rank < vocab; ++rank) {
      const size_t i = order[rank];
      sum += weights[i];
      if (sum <= (1 - top_p) * total && rank + 1 < vocab) weights[i] = 0;
      left += weights[i];
    }
    total = left;
  }
  double sum = 0, best = -1;
  int64_t answer = 0;
  for (size_t i = 0; i < vocab; ++i) {
    if (exponential) {
      if (weights[i] > 0 && weights[i] / total / exponential[i] > best) {
        best = weights[i] / total / exponential[i];
        answer = static_cast<int64_t>(i);
      }
    } else {
      sum += weights[i];
      if (sum > u * total) return static_cast<int64_t>(i);
      if (weights[i] > 0) answer = static_cast<int64_t>(i);
    }
  }
  return answer;
}

void draws_match_a_sorted_double_computation(const char* isa, const KernelTable& table) {
  std::mt19937 engine(6);
  const int64_t batch = 3, tokens = 5;
  const std::vector<int64_t> ids = {4, (int64_t{1} << 40) + 3, -2};
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    for (const int64_t vocab : {1, 7, 100, 1030}) {
      Values logits = Values::random(dtype, 2 * batch * tokens * vocab, engine, 3.0);
      if (vocab == 7) {  // ties and negative zero
        for (int64_t i = 0; i < logits.size(); ++i) logits.set(i, i % 3 ? 0.0 : -0.0);
      }
      if (vocab == 100) {  // masked entries, and some far below the largest
        for (int64_t i = 0; i < batch * tokens * vocab; ++i) {
          if (i % 100 >= 30) logits.set(i, i % 2 ? -INFINITY : -1e6 - static_cast<double>(i % 7));
        }
      }
      std::vector<float> exponential(batch * tokens * vocab);
      std::exponential_distribution<float> draw;
      for (float& e : exponential) e = draw(engine) + 1e-6f;
      for (const auto& [t, top_k, top_p] :
           std::vector<std::tuple<double, int64_t, double>>{{0, 0, 0},
                                                            {1.5, 0, 0},
                                                            {1.5, 40, 0.9},
                                                            {3, 0, 0.95},
                                                            {0.7, 3, 0.5},
                                                            {1.5, 1, 0},
                                                            {2, 0, 1.0},
                                                            {1, 0, 1e-9}}) {
        for (const bool philox : {true, false}) {
          std::vector<int64_t> out(batch * tokens, -1);
          SampleError error{SampleStatus::kNaN, 0};
          const uint64_t seed = (uint64_t{5} << 40) + 17;
          table.sample_tokens({batch, tokens, vocab,
                               TokenView{logits.data(), tokens * vocab, vocab}, t, top_k, top_p,
                               seed, ids.data(), 3, philox ? nullptr : exponential.data(),
                               out.data(), &error, dtype, 2});
          CHECK(error.status == SampleStatus::kOk, "%s: row %lld", isa,
                static_cast<long long>(error.row));
          for (int64_t r = 0; r < batch * tokens; ++r) {
            std::vector<float> a(vocab);
            for (int64_t i = 0; i < vocab; ++i) {
              const float cond = static_cast<float>(logits[r * vocab + i]);
              const float uncond = static_cast<float>(logits[(batch * tokens + r) * vocab + i]);
              volatile float grown = static_cast<float>(1 + t) * cond;
              volatile float subtracted = static_cast<float>(t) * uncond;
              a[i] = t == 0 ? cond : grown - subtracted;
            }
            const double u = uniform(seed, static_cast<uint64_t>(ids[r / tokens]),
                                     static_cast<uint32_t>(3 + r % tokens));
            const int64_t want =
                naive(a, top_k, top_p, u, philox ? nullptr : &exponential[r * vocab]);
            CHECK(out[r] == want, "%s vocab %lld t %g k %lld p %g row %lld: got %lld, want %lld",
                  isa, static_cast<long long>(vocab), t, static_cast<long long>(top_k), top_p,
                  static_cast<long long>(r), static_cast<long long>(out[r]),
                  static_cast<long long>(want));
          }
        }
      }
    }
  }
}

void a_row_that_cannot_be_sampled_is_named(const char* isa, const KernelTable& table) {
  const int64_t batch = 1, tokens = 4, vocab = 9;
  const std::vector<int64_t> ids = {0};
  for (const auto& [value, everywhere, status] :
       std::vector<std::tuple<double, bool, SampleStatus>>{
           {kNaN, false, SampleStatus::kNaN},
           {INFINITY, false, SampleStatus::kPositiveInfinity},
           {-INFINITY, true, SampleStatus::kAllMasked}}) {
    Values logits(DType::kFloat32, 2 * tokens * vocab, 0.5);
    for (int64_t i = 0; i < (everywhere ? vocab : 1); ++i) logits.set(2 * vocab + i, value);
    std::vector<int64_t> out(tokens);
    SampleError error{SampleStatus::kOk, -1};
    table.sample_tokens({batch, tokens, vocab, TokenView{logits.data(), tokens * vocab, vocab}, 0.0,
                         0, 0.0, 1, ids.data(), 0, nullptr, out.data(), &error, DType::kFloat32,
                         2});
    CHECK(error.status == status && error.row == 2, "%s: status %d, row %lld", isa,
          static_cast<int>(error.status), static_cast<long long>(error.row));
  }
}

}  // namespace

int main() {
  for_each_isa([](const char* isa, const KernelTable& table) {
    draws_match_a_sorted_double_computation(isa, table);
    a_row_that_cannot_be_sampled_is_named(isa, table);
  });
}
