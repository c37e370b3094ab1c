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

// One thread's memory for one row.
struct RowScratch {
  float* logits;    // [V] guided
  uint32_t* order;  // [V] ordered(logits)
  uint8_t* kept;    // [V]
  double* weights;  // [V] exp(logit - largest); 0 where dropped

  static int64_t bytes(int64_t vocab) { return round_up(vocab, 64) * (4 + 4 + 1 + 8); }
  RowScratch(char* at, int64_t vocab) {
    const int64_t up = round_up(vocab, 64);
    weights = reinterpret_cast<double*>(at);
    logits = reinterpret_cast<float*>(at + up * 8);
    order = reinterpret_cast<uint32_t*>(at + up * 12);
    kept = reinterpret_cast<uint8_t*>(at + up * 16);
  }
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

// ordered() of the k-th largest logit: one byte of it at a time, from the top.
inline uint32_t kth_largest(const uint32_t* order, int64_t vocab, int64_t k) {
  uint32_t prefix = 0, known = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    int64_t counts[256] = {};
    for (int64_t i = 0; i < vocab; ++i) {
      if ((order[i] & known) == prefix) ++counts[(order[i] >> shift) & 255];
    }
    int byte = 255;
    while (counts[byte] < k) k -= counts[byte--];
    prefix |= static_cast<uint32_t>(byte) << shift;
    known |= 255u << shift;
  }
  return prefix;
}

// Drops, in ascending order (lower index first among equals), every kept entry whose cumulative
// weight is at most `allowance`; never the last. The boundary is found byte by byte as above, with
// weights in the place of counts, so nothing is sorted.
inline void drop_tail(RowScratch& s, int64_t vocab, double allowance) {
  uint32_t prefix = 0, known = 0;
  double below = 0;  // weight of everything under the prefix
  for (int shift = 24; shift >= 0; shift -= 8) {
    double sums[256] = {};
    int64_t counts[256] = {};
    for (int64_t i = 0; i < vocab; ++i) {
      if (!s.kept[i] || (s.order[i] & known) != prefix) continue;
      const int byte = (s.order[i] >> shift) & 255;
      sums[byte] += s.weights[i];
      ++counts[byte];
    }
    int chosen = -1, highest = -1;
    double sum = below;
    for (int byte = 0; byte < 256; ++byte) {
      if (!counts[byte]) continue;
      highest = byte;
      if (sum + sums[byte] > allowance) {
        chosen = byte;
        break;
      }
      sum += sums[byte];
    }
    if (chosen < 0) {  // rounding: everything lies within the allowance; keep the largest
      chosen = highest;
      sum -= sums[chosen];
    }
    below = sum;
    prefix |= static_cast<uint32_t>(chosen) << shift;
    known |= 255u << shift;
  }
  int64_t last = -1;
  bool larger = false;
  for (int64_t i = 0; i < vocab; ++i) {
    if (s.kept[i] && s.order[i] == prefix) last = i;
    larger |= s.kept[i] && s.order[i] > prefix;
  }
  double sum = below;
  for (int64_t i = 0; i < vocab; ++i) {
    if (!s.kept[i] || s.order[i] > prefix) continue;
    if (s.order[i] < prefix) {
      s.kept[i] = 0;
    } else {
      sum += s.weights[i];
      if (sum <= allowance && (larger || i != last)) s.kept[i] = 0;
    }
  }
}

struct Drawn {
  SampleStatus status;
  int64_t token;
};

template <class T>
Drawn sample_row(const SampleTokensArgs& a, int64_t r, RowScratch& s) {
  const int64_t b = r / a.tokens, t = r % a.tokens, vocab = a.vocab;
  guide(row<T>(a.logits, b, t), row<T>(a.logits, a.batch + b, t), vocab, a.guidance, s.logits);
  float largest = -__builtin_inff();
  bool nan = false;
  for (int64_t i = 0; i < vocab; ++i) {
    nan |= s.logits[i] != s.logits[i];
    largest = s.logits[i] > largest ? s.logits[i] : largest;
  }
  if (nan) return {SampleStatus::kNaN, 0};
  if (largest == __builtin_inff()) return {SampleStatus::kPositiveInfinity, 0};
  if (largest == -__builtin_inff()) return {SampleStatus::kAllMasked, 0};

  const bool by_rank = a.top_k > 0 && a.top_k < vocab;
  const bool by_mass = a.top_p > 0.0 && a.top_p < 1.0;
  if (by_rank || by_mass) {
    for (int64_t i = 0; i < vocab; ++i) s.order[i] = ordered(s.logits[i]);
  }
  const uint32_t floor = by_rank ? kth_largest(s.order, vocab, a.top_k) : 0;
  for (int64_t i = 0; i < vocab; ++i) s.kept[i] = !by_rank || s.order[i] >= floor;

  // Written in whole vectors: the scratch is padded.
  for (int64_t i = 0; i < vocab; i += kLanes) {
    const Tail lanes{static_cast<int>(min_of(kLanes, vocab - i))};
    const VecD weight =
        exp_double(__builtin_convertvector(load(s.logits + i, lanes) - largest, VecD));
    __builtin_memcpy(s.weights + i, &weight, sizeof weight);
  }
  const auto clear_dropped = [&] {
    double total = 0;
    for (int64_t i = 0; i < vocab; ++i) {
      s.weights[i] = s.kept[i] ? s.weights[i] : 0.0;
      total += s.weights[i];
    }
    return total;
  };
  double total = clear_dropped();
  if (by_mass) {
    drop_tail(s, vocab, (1.0 - a.top_p) * total);
    total = clear_dropped();
  }

  if (a.exponential) {
    const float* exponential = a.exponential + r * vocab;
    int64_t best = -1;
    float best_ratio = 0;
    for (int64_t i = 0; i < vocab; ++i) {
      if (!s.kept[i]) continue;
      const float ratio = static_cast<float>(s.weights[i] / total) / exponential[i];
      if (best < 0 || ratio > best_ratio) {
        best = i;
        best_ratio = ratio;
      }
    }
    return {SampleStatus::kOk, best};
  }
  const double u = Uniform::draw(a.seed, static_cast<uint64_t>(a.image_ids[b]),
                                 static_cast<uint32_t>(a.position + t));
  const double target = u * total;
  double sum = 0;
  int64_t last = 0;
  for (int64_t i = 0; i < vocab; ++i) {
    sum += s.weights[i];
    if (sum > target) return {SampleStatus::kOk, i};
    if (s.weights[i] > 0) last = i;
  }
  return {SampleStatus::kOk, last};  // u * total was rounded up to the total
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
