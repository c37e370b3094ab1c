// Guidance, top-k, top-p and the draw, one row at a time. Compiled without fused multiply-adds: a
// token must not depend on the instruction set, the batch or the threads.
#include "../include/sample_tokens.h"

#include "parallel.h"
#include "simd.h"

namespace variant::VARIANT_ISA_NAMESPACE {
namespace {

typedef double VecD __attribute__((vector_size(kLanes * 8)));
typedef int64_t VecL __attribute__((vector_size(kLanes * 8)));

// exp for x <= 0 in double, to about 3e-10: far below the last place of float32. Only products,
// sums and shifts of lanes, so every instruction set gives the same bits. Below -700: 0.
inline VecD exp_double(VecD x) {
  const VecD clamped = x < -700.0 ? VecD{} - 700.0 : x;
  const VecD shifted = clamped * 1.4426950408889634 + 6755399441055744.0;
  const VecD n = shifted - 6755399441055744.0;
  // log 2 in two parts: the first has zeros enough for n * it to be exact.
  const VecD r = (clamped - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10;
  VecD p = r * (1.0 / 40320) + 1.0 / 5040;
  p = p * r + 1.0 / 720;
  p = p * r + 1.0 / 120;
  p = p * r + 1.0 / 24;
  p = p * r + 1.0 / 6;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  const VecL exponent = (VecL)shifted - 0x4338000000000000;
  p = p * (VecD)((exponent + 1023) << 52);
  return x < -700.0 ? VecD{} : p;
}

// Float32 as unsigned integers of the same order; both zeros map to one value.
inline uint32_t ordered(float x) {
  const float value = x + 0.0f;  // -0 becomes +0
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

struct Uniform {
  // Philox4x32-10 (Salmon et al., SC 2011): the first 53 bits of one block, in [0, 1).
  static double draw(uint64_t seed, uint64_t image, uint32_t place) {
    uint32_t c0 = place, c1 = 0;
    uint32_t c2 = static_cast<uint32_t>(image), c3 = static_cast<uint32_t>(image >> 32);
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      const uint64_t product0 = uint64_t{0xD2511F53} * c0, product1 = uint64_t{0xCD9E8D57} * c2;
      const uint32_t n0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
      const uint32_t n2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
      c1 = static_cast<uint32_t>(product1);
      c3 = static_cast<uint32_t>(product0);
      c0 = n0;
      c2 = n2;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    const uint64_t bits = (static_cast<uint64_t>(c0 >> 5) << 26) + (c1 >> 6);
    return static_cast<double>(bits) * 0x1p-53;
  }
};

// Weights are summed in blocks of this many, each block in 16 interleaved sums: the order is the
// same on every instruction set.
constexpr int64_t kBlock = 64;

// One thread's memory for one row.
struct RowScratch {
  double* weights;      // [V] exp(logit - largest), 0 where dropped; zero up to a whole block
  double* block_sums;   // [V / kBlock]
  float* logits;        // [V] guided
  uint32_t* order;      // [V] ordered(logits)
  int32_t* candidates;  // [V]

  static int64_t bytes(int64_t vocab) { return round_up(vocab, kBlock) * (8 + 8 + 4 + 4 + 4); }
  RowScratch(char* at, int64_t vocab) {
    const int64_t up = round_up(vocab, kBlock);
    weights = reinterpret_cast<double*>(at);
    block_sums = reinterpret_cast<double*>(at + up * 8);
    logits = reinterpret_cast<float*>(at + up * 16);
    order = reinterpret_cast<uint32_t*>(at + up * 20);
    candidates = reinterpret_cast<int32_t*>(at + up * 24);
  }
};

// What top-k and top-p leave: everything above a value, and of its equals those from an index on.
struct Cut {
  uint32_t floor;
  int64_t first_equal;
};

// a = (1 + t) c - t u, each product rounded to float32. t = 0 ignores u altogether.
template <class T>
inline void guide(const T* cond, const T* uncond, int64_t vocab, double t, float* out) {
  const float with = static_cast<float>(1.0 + t), without = static_cast<float>(t);
  if (t == 0.0) {
    for_vectors(vocab,
                [&](int64_t i, auto lanes) { store(out + i, load(cond + i, lanes), lanes); });
    return;
  }
  for_vectors(vocab, [&](int64_t i, auto lanes) {
    const VecF grown = load(cond + i, lanes) * with, taken = load(uncond + i, lanes) * without;
    store(out + i, grown - taken, lanes);
  });
}

// Both cuts search the digits of ordered(), 11, 11 and 10 bits, from the top: entries are counted
// (or weighed) by digit, and only those that share the boundary's digits stay candidates.
constexpr int kDigits = 3;
constexpr int kShift[kDigits] = {21, 10, 0};
constexpr int kDigitValues[kDigits] = {2048, 2048, 1024};

inline int digit_of(uint32_t order, int digit) {
  return static_cast<int>(order >> kShift[digit]) & (kDigitValues[digit] - 1);
}

// Keeps the candidates whose digit is `value`, in their order; returns how many.
inline int64_t narrow_candidates(RowScratch& s, int64_t count, int digit, int value) {
  int64_t left = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t index = s.candidates[i];
    s.candidates[left] = index;
    left += digit_of(s.order[index], digit) == value;
  }
  return left;
}

// Top-k: everything not smaller than the k-th largest.
inline Cut cut_by_rank(RowScratch& s, int64_t vocab, int64_t k) {
  int64_t count = vocab;
  for (int64_t i = 0; i < vocab; ++i) s.candidates[i] = static_cast<int32_t>(i);
  uint32_t floor = 0;
  for (int digit = 0; digit < kDigits; ++digit) {
    int32_t counts[2048] = {};
    for (int64_t i = 0; i < count; ++i) ++counts[digit_of(s.order[s.candidates[i]], digit)];
    int value = kDigitValues[digit] - 1;
    while (counts[value] < k) k -= counts[value--];
    floor |= static_cast<uint32_t>(value) << kShift[digit];
    count = narrow_candidates(s, count, digit, value);
  }
  return {floor, 0};
}

// Top-p over what `before` leaves: in ascending order, lower index first among equals, every entry
// whose cumulative weight is at most `allowance` goes; the last never does.
inline Cut cut_by_mass(RowScratch& s, int64_t vocab, Cut before, double allowance) {
  int64_t count = 0;
  for (int64_t i = 0; i < vocab; ++i) {
    s.candidates[count] = static_cast<int32_t>(i);
    count += s.order[i] >= before.floor;
  }
  uint32_t floor = 0;
  double below = 0;     // weight of everything under the digits found so far
  bool largest = true;  // nothing lies above them
  for (int digit = 0; digit < kDigits; ++digit) {
    double sums[2048] = {};
    int32_t counts[2048] = {};
    for (int64_t i = 0; i < count; ++i) {
      const int value = digit_of(s.order[s.candidates[i]], digit);
      sums[value] += s.weights[s.candidates[i]];
      ++counts[value];
    }
    int top = kDigitValues[digit] - 1, value = 0;
    while (!counts[top]) --top;
    // Should rounding put everything within the allowance, the search ends at the largest.
    while (value < top && (!counts[value] || below + sums[value] <= allowance)) {
      below += sums[value++];
    }
    largest = largest && value == top;
    floor |= static_cast<uint32_t>(value) << kShift[digit];
    count = narrow_candidates(s, count, digit, value);
  }
  // The candidates left are equal and in index order.
  const int64_t may_go = largest ? count - 1 : count;
  int64_t gone = 0;
  while (gone < may_go && below + s.weights[s.candidates[gone]] <= allowance) {
    below += s.weights[s.candidates[gone++]];
  }
  // All of them gone: the next larger entries stay, and an index past the end says so.
  return {floor, gone < count ? s.candidates[gone] : vocab};
}

// Clears the weights that were cut, sums blocks, returns the total.
inline double apply_cut(RowScratch& s, int64_t vocab, bool any_cut, Cut cut) {
  double total = 0;
  for (int64_t begin = 0; begin < vocab; begin += kBlock) {
    double* weights = s.weights + begin;
    if (any_cut) {
      const int64_t end = min_of(vocab - begin, kBlock);
      for (int64_t i = 0; i < end; ++i) {
        const uint32_t order = s.order[begin + i];
        const bool kept =
            (order > cut.floor) | ((order == cut.floor) & (begin + i >= cut.first_equal));
        weights[i] = kept ? weights[i] : 0.0;
      }
    }
    double sums[16] = {};
    for (int64_t i = 0; i < kBlock; i += 16) {
      for (int lane = 0; lane < 16; ++lane) sums[lane] += weights[i + lane];
    }
    for (int half = 8; half > 0; half /= 2) {
      for (int lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
    }
    s.block_sums[begin / kBlock] = sums[0];
    total += sums[0];
  }
  return total;
}

struct Drawn {
  SampleStatus status;
  int64_t token;
};

template <class T>
Drawn sample_row(const SampleTokensArgs& a, int64_t r, RowScratch& s) {
  const int64_t b = r / a.tokens, t = r % a.tokens, vocab = a.vocab;
  guide(row<T>(a.logits, b, t), row<T>(a.logits, a.batch + b, t), vocab, a.guidance, s.logits);
  VecF tops = splat(-__builtin_inff());
  VecI nans = {};
  for_vectors(vocab, [&](int64_t i, auto lanes) {
    const VecF a = fill_beyond(load(s.logits + i, lanes), -__builtin_inff(), lanes);
    tops = maximum(a, tops);
    nans |= a != a;
  });
  float largest = -__builtin_inff();
  for (int lane = 0; lane < kLanes; ++lane) {
    if (nans[lane]) return {SampleStatus::kNaN, 0};
    largest = tops[lane] > largest ? tops[lane] : largest;
  }
  if (largest == __builtin_inff()) return {SampleStatus::kPositiveInfinity, 0};
  if (largest == -__builtin_inff()) return {SampleStatus::kAllMasked, 0};

  const bool by_rank = a.top_k > 0 && a.top_k < vocab;
  const bool by_mass = a.top_p > 0.0 && a.top_p < 1.0;
  if (by_rank || by_mass) {
    for (int64_t i = 0; i < vocab; ++i) s.order[i] = ordered(s.logits[i]);
  }
  const int64_t padded = round_up(vocab, kBlock);
  for (int64_t i = vocab / kLanes * kLanes; i < padded; ++i) s.weights[i] = 0.0;
  for_vectors(vocab, [&](int64_t i, auto lanes) {
    const VecF shifted = fill_beyond(load(s.logits + i, lanes) - largest, -1000.0f, lanes);
    const VecD weight = exp_double(__builtin_convertvector(shifted, VecD));
    __builtin_memcpy(s.weights + i, &weight, sizeof weight);
  });
  Cut cut = {0, 0};
  if (by_rank) cut = cut_by_rank(s, vocab, a.top_k);
  double total = apply_cut(s, vocab, by_rank, cut);
  if (by_mass) {
    cut = cut_by_mass(s, vocab, cut, (1.0 - a.top_p) * total);
    total = apply_cut(s, vocab, true, cut);
  }

  if (a.exponential) {
    const float* exponential = a.exponential + r * vocab;
    int64_t best = -1;
    float best_ratio = 0;
    for (int64_t i = 0; i < vocab; ++i) {
      if (s.weights[i] == 0.0) continue;
      const float ratio = static_cast<float>(s.weights[i] / total) / exponential[i];
      if (best < 0 || ratio > best_ratio) {
        best = i;
        best_ratio = ratio;
      }
    }
    return {SampleStatus::kOk, best};
  }
  // The first index whose cumulative weight passes u * total: its block, then inside it.
  const double target = Uniform::draw(a.seed, static_cast<uint64_t>(a.image_ids[b]),
                                      static_cast<uint32_t>(a.position + t)) *
                        total;
  int64_t block = 0;
  double sum = 0;
  while ((block + 1) * kBlock < padded && sum + s.block_sums[block] <= target) {
    sum += s.block_sums[block++];
  }
  for (int64_t i = block * kBlock; i < min_of(vocab, (block + 1) * kBlock); ++i) {
    sum += s.weights[i];
    if (sum > target) return {SampleStatus::kOk, i};
  }
  // Rounding put the target at the block's end: the last entry before it that has weight.
  int64_t last = min_of(vocab, (block + 1) * kBlock) - 1;
  while (s.weights[last] == 0.0) --last;
  return {SampleStatus::kOk, last};
}

template <class T>
void sample(const SampleTokensArgs& a) {
  const int64_t rows = a.batch * a.tokens;
  a.error->status = SampleStatus::kOk;
  if (rows == 0) return;
  const int threads =
      static_cast<int>(min_of(rows, threads_for(a.num_threads, 4 * rows * a.vocab)));
  const int64_t bytes = RowScratch::bytes(a.vocab);
  Scratch<char> scratch(bytes * threads);
  Scratch<uint8_t> status(rows);
  parallel_for(threads, rows, [&](int64_t r, int thread) {
    RowScratch memory(scratch.get() + thread * bytes, a.vocab);
    const Drawn drawn = sample_row<T>(a, r, memory);
    a.out[r] = drawn.token;
    status.get()[r] = static_cast<uint8_t>(drawn.status);
  });
  for (int64_t r = 0; r < rows; ++r) {
    if (status.get()[r] == 0) continue;
    *a.error = {static_cast<SampleStatus>(status.get()[r]), r};
    return;
  }
}

}  // namespace

void sample_tokens(const SampleTokensArgs& a) {
  a.dtype == DType::kFloat32 ? sample<float>(a) : sample<BF16>(a);
}

}  // namespace variant::VARIANT_ISA_NAMESPACE
