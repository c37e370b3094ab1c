// Guidance, top-k, top-p and the draw, one row at a time. Compiled without fused multiply-adds: a
// token must not depend on the instruction set, the batch or the threads.
#include "../include/sample_tokens.h"

#include "parallel.h"
#include "sample_select.h"
#include "simd.h"

namespace variant::VARIANT_ISA_NAMESPACE {
namespace {

struct Uniform {
  // Philox4x32-10 (Salmon et al., SC 2011): the first 53 bits of one block, in [0, 1).
  static double draw(uint64_t seed, uint64_t image, uint32_t position) {
    uint32_t c0 = position, c1 = 0;
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

// One thread's memory for one row. The n entries that top-k keeps are copied; without top-k the row
// itself is used. The end of each array is padded to a whole block.
struct RowScratch {
  double* d;           // [n] logit - largest; -inf in the padding
  double* weights;     // [n] exp(d), 0 where dropped and in the padding
  double* block_sums;  // [n / kBlock]
  double* scratch;     // [2 n] for top_p_threshold; before that, floats for kth_largest
  float* logits;       // [V] guided
  float* top_k;        // [n] the logits that top-k keeps
  int32_t* index;      // [n] of the entry in the row

  static int64_t entries(int64_t vocab) { return round_up(vocab, kBlock) + kBlock; }
  static int64_t bytes(int64_t vocab) { return entries(vocab) * (5 * 8 + 3 * 4); }
  RowScratch(char* at, int64_t vocab) {
    const int64_t n = entries(vocab);
    d = reinterpret_cast<double*>(at);
    weights = d + n;
    block_sums = weights + n;
    scratch = block_sums + n;
    logits = reinterpret_cast<float*>(scratch + 2 * n);
    top_k = logits + n;
    index = reinterpret_cast<int32_t*>(top_k + n);
  }
};

struct Extremes {
  SampleStatus status;
  float smallest, largest;
};

// a = (1 + t) c - t u, each product rounded to float32. With t = 0 u is not read.
template <class T, bool kGuided>
inline Extremes guide(const T* cond, const T* uncond, int64_t vocab, double t, float* out) {
  const float with = static_cast<float>(1.0 + t), without = static_cast<float>(t);
  VecF tops = splat(-kInfinity), bottoms = splat(kInfinity);
  VecI nans = {};
  for_vectors(vocab, [&](int64_t i, auto lanes) {
    VecF guided = load(cond + i, lanes);
    if constexpr (kGuided) guided = guided * with - load(uncond + i, lanes) * without;
    store(out + i, guided, lanes);
    const VecF high = fill_beyond(guided, -kInfinity, lanes);
    const VecF low = fill_beyond(guided, kInfinity, lanes);
    tops = high > tops ? high : tops;
    bottoms = low < bottoms ? low : bottoms;
    nans |= high != high;
  });
  float largest = -kInfinity, smallest = kInfinity;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (nans[lane]) return {SampleStatus::kNaN, 0, 0};
    largest = tops[lane] > largest ? tops[lane] : largest;
    smallest = bottoms[lane] < smallest ? bottoms[lane] : smallest;
  }
  if (largest == kInfinity) return {SampleStatus::kPositiveInfinity, 0, 0};
  if (largest == -kInfinity) return {SampleStatus::kAllMasked, 0, 0};
  return {SampleStatus::kOk, smallest, largest};
}

// d and the weights of n logits (n: whole blocks). Differences are exact for a Philox draw, as in
// the float64 definition; rounded to float32 for multinomial, as in torch's softmax.
inline void weigh(const float* logits, int64_t n, float largest, bool rounded, RowScratch& s) {
  float group[kWideLanes];
  for (int64_t i = 0; i < n; i += kWideLanes) {
    VecD d;
    if (rounded) {
      for (int lane = 0; lane < kWideLanes; ++lane) group[lane] = logits[i + lane] - largest;
      d = load_widened(group);
    } else {
      d = load_widened(logits + i) - static_cast<double>(largest);
    }
    store_wide(s.d + i, d);
    store_wide(s.weights + i, exp_wide(d));
  }
}

// Clears the weights below the threshold, sums blocks, returns the total.
inline double sum_blocks(RowScratch& s, int64_t n, double threshold) {
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    WideSums sums;
    for (int64_t i = begin; i < begin + kBlock; i += kSums) {
      for (int j = 0; j < kSums / kWideLanes; ++j) {
        const int64_t at = i + j * kWideLanes;
        const VecD weight = load_wide(s.d + at) >= threshold ? load_wide(s.weights + at) : VecD{};
        store_wide(s.weights + at, weight);
        sums.part[j] += weight;
      }
    }
    s.block_sums[begin / kBlock] = sums.total();
    total += s.block_sums[begin / kBlock];
  }
  return total;
}

// The first entry with a cumulative weight above target: finds its block, then the entry.
inline int64_t entry_at(const RowScratch& s, int64_t n, double target) {
  int64_t block = 0;
  double sum = 0;
  while ((block + 1) * kBlock < n && sum + s.block_sums[block] <= target) {
    sum += s.block_sums[block++];
  }
  const int64_t end = (block + 1) * kBlock;
  for (int64_t i = block * kBlock; i < end; ++i) {
    sum += s.weights[i];
    if (sum > target) return i;
  }
  // Rounding moved the target to the block's end: returns the last entry with a weight above zero.
  int64_t last = end - 1;
  while (s.weights[last] == 0.0) --last;
  return last;
}

struct Drawn {
  SampleStatus status;
  int64_t token;
};

template <class T>
Drawn sample_row(const SampleTokensArgs& a, int64_t r, RowScratch& s) {
  const int64_t b = r / a.tokens, t = r % a.tokens, vocab = a.vocab;
  const T* cond = row<T>(a.logits, b, t);
  const T* uncond = row<T>(a.logits, a.batch + b, t);
  const Extremes extremes = a.guidance == 0.0
                                ? guide<T, false>(cond, uncond, vocab, a.guidance, s.logits)
                                : guide<T, true>(cond, uncond, vocab, a.guidance, s.logits);
  if (extremes.status != SampleStatus::kOk) return {extremes.status, 0};
  const float largest = extremes.largest;
  pad(s.logits, vocab, kBlock);

  float* logits = s.logits;
  float smallest = extremes.smallest;
  int64_t count = vocab;
  const bool by_rank = a.top_k > 0 && a.top_k < vocab;
  if (by_rank) {
    float* scratch = reinterpret_cast<float*>(s.scratch);
    smallest = kth_largest(s.logits, vocab, a.top_k, smallest, largest, scratch);
    count = compact_ge(s.logits, round_up(vocab, kLanes), smallest, s.top_k, s.index);
    // With a threshold of -inf the padding passes too.
    count = min_of(count, vocab);
    pad(s.top_k, count, kBlock);
    logits = s.top_k;
  }
  const int64_t n = round_up(count, kBlock);
  weigh(logits, n, largest, a.exponential != nullptr, s);
  double total = sum_blocks(s, n, -static_cast<double>(kInfinity));
  if (a.top_p > 0.0 && a.top_p < 1.0) {
    // Below -700 all weights are zero.
    const double least = static_cast<double>(smallest) - static_cast<double>(largest) - 1.0;
    TopPThreshold top_p =
        top_p_threshold(s.d, s.weights, count, least > -701.0 ? least : -701.0,
                        (1.0 - a.top_p) * total, s.scratch, s.scratch + RowScratch::entries(vocab));
    for (int64_t i = 0; top_p.dropped_ties > 0; ++i) {
      if (s.d[i] != top_p.value) continue;
      s.weights[i] = 0.0;
      --top_p.dropped_ties;
    }
    total = sum_blocks(s, n, top_p.value);
  }

  if (a.exponential) {
    const float* exponential = a.exponential + r * vocab;
    int64_t best = -1;
    float best_ratio = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (s.weights[i] == 0.0) continue;
      const int64_t token = by_rank ? s.index[i] : i;
      const float ratio = static_cast<float>(s.weights[i] / total) / exponential[token];
      if (best < 0 || ratio > best_ratio) {
        best = token;
        best_ratio = ratio;
      }
    }
    return {SampleStatus::kOk, best};
  }
  const double uniform = Uniform::draw(a.seed, static_cast<uint64_t>(a.image_ids[b]),
                                       static_cast<uint32_t>(a.position + t));
  const int64_t entry = entry_at(s, n, uniform * total);
  return {SampleStatus::kOk, by_rank ? s.index[entry] : entry};
}

template <class T>
void sample(const SampleTokensArgs& a) {
  const int64_t num_rows = a.batch * a.tokens;
  a.error->status = SampleStatus::kOk;
  if (num_rows == 0) return;
  const int threads =
      static_cast<int>(min_of(num_rows, threads_for(a.num_threads, 4 * num_rows * a.vocab)));
  const int64_t bytes = RowScratch::bytes(a.vocab);
  Scratch<char> scratch(bytes * threads);
  Scratch<uint8_t> status(num_rows);
  parallel_for(threads, num_rows, [&](int64_t r, int thread) {
    RowScratch memory(scratch.get() + thread * bytes, a.vocab);
    const Drawn drawn = sample_row<T>(a, r, memory);
    a.out[r] = drawn.token;
    status.get()[r] = static_cast<uint8_t>(drawn.status);
  });
  for (int64_t r = 0; r < num_rows; ++r) {
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
