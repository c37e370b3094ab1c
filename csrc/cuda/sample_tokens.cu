// A block samples one row. Instead of sorting, it finds the thresholds of top-k and top-p digit by
// digit in histograms, of counts for top-k and of weights for top-p. Weights are exp of a float64
// difference, rounded to 45 bits after the point: their sums are exact, so a token depends neither
// on the order of additions nor on the GPU.
#include "sample_tokens.h"

#include "elements.cuh"
#include "launch.h"
#include "philox.cuh"
#include "primitives.h"
#include "reduce.cuh"

namespace variant::cuda {
namespace {

using Mass = unsigned long long;  // a type that atomicAdd supports

// Weights below 2^-46 of the largest become zero: all of them together would be drawn once in 10^9
// times.
constexpr double kFixedPoint = 0x1p45;
constexpr int kBins = 256;
// The first digit is the distance from the largest logit in steps of 1 / kStepsPerUnit, the others
// are the four bytes of the number: with the bytes alone most of a row would fall into a few bins
// of the first histogram.
constexpr int kDigits = 5;
constexpr float kStepsPerUnit = 8.0f;

// exp(d) for d <= 0, to about 3e-10; below -700 as exp(-700).
__device__ inline double exp_wide(double d) {
  d = d < -700.0 ? -700.0 : d;
  // Adding 1.5 * 2^52 rounds to an integer and leaves it in the low bits.
  const double shifted = d * 1.4426950408889634 + 6755399441055744.0;
  const double n = shifted - 6755399441055744.0;
  // log 2 in two parts: n times the first is exact, because its last bits are zero.
  const double r = (d - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10;
  double p = r * (1.0 / 40320) + 1.0 / 5040;
  p = p * r + 1.0 / 720;
  p = p * r + 1.0 / 120;
  p = p * r + 1.0 / 24;
  p = p * r + 1.0 / 6;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  const long long exponent = __double_as_longlong(shifted) - 0x4338000000000000ll;
  return p * __longlong_as_double((exponent + 1023) << 52);
}

// Keys have the order of the floats; both zeros have the same key.
__device__ inline unsigned key_of(float x) {
  const unsigned bits = __float_as_uint(x + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ inline float value_of(unsigned key) {
  return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key);
}

// The guided logits of one row. Entry i = n * kThreads + thread is this thread's n-th, and entries
// of one n and one warp are a section of 32. kItems > 0: values and weights stay in registers; 0:
// they are recomputed in every pass, and the row may have any length.
template <class T, int kThreads, int kItems>
class Row {
 public:
  static constexpr int kWarps = kThreads / kWarp;

  __device__ Row(const T* cond, const T* uncond, int vocab, double t)
      : cond_(cond),
        uncond_(uncond),
        vocab_(vocab),
        more_(static_cast<float>(1.0 + t)),
        less_(static_cast<float>(t)),
        guided_(t != 0.0) {
    if constexpr (kItems > 0) {
#pragma unroll
      for (int n = 0; n < kItems; ++n) values_[n] = load(entry(n));
    }
  }

  __device__ static int entry(int n) { return n * kThreads + static_cast<int>(threadIdx.x); }
  __device__ static int section(int n) {
    return n * kWarps + static_cast<int>(threadIdx.x) / kWarp;
  }
  __device__ int turns() const { return kItems > 0 ? kItems : (vocab_ + kThreads - 1) / kThreads; }
  __device__ int sections() const { return turns() * kWarps; }

  // f(n, value): all threads of a warp make the same calls; beyond the row the value is -inf.
  template <class F>
  __device__ void each(const F& f) const {
    if constexpr (kItems > 0) {
#pragma unroll
      for (int n = 0; n < kItems; ++n) f(n, values_[n]);
    } else {
      for (int n = 0; n < turns(); ++n) f(n, load(entry(n)));
    }
  }

  // The differences are exact for a Philox draw, as in the float64 definition; rounded to float32
  // for multinomial, as in torch's softmax.
  __device__ void weigh(float largest, bool rounded) {
    largest_ = largest;
    rounded_ = rounded;
    if constexpr (kItems > 0) {
#pragma unroll
      for (int n = 0; n < kItems; ++n) weights_[n] = weight_of(values_[n]);
    }
  }
  __device__ Mass weight(int n, float value) const {
    if constexpr (kItems > 0) return weights_[n];
    return weight_of(value);
  }
  __device__ Mass weight_of(float value) const {
    const double d = rounded_ ? static_cast<double>(value - largest_)
                              : static_cast<double>(value) - static_cast<double>(largest_);
    return static_cast<Mass>(exp_wide(d) * kFixedPoint + 0.5);
  }

 private:
  // a = (1 + t) c - t u, each product rounded. With t = 0 u is not read.
  __device__ float load(int i) const {
    if (i >= vocab_) return -__builtin_huge_valf();
    const float c = widen(cond_[i]);
    return guided_ ? __fsub_rn(__fmul_rn(c, more_), __fmul_rn(widen(uncond_[i]), less_)) : c;
  }

  const T *cond_, *uncond_;
  int vocab_;
  float more_, less_, largest_;
  bool guided_, rounded_;
  float values_[kItems > 0 ? kItems : 1];
  Mass weights_[kItems > 0 ? kItems : 1];
};

struct Edge {
  unsigned key;  // of the value at the boundary
  Mass before;   // measure of all entries before it
  Mass equal;    // measure of the entries equal to it
};

struct Histogram {
  Mass bins[kBins];
  int digit;
  Mass before, inside;
};

// Called by warp 0. Finds the first bin with which the running sum exceeds `limit`, or the last bin
// that is not empty.
__device__ inline void find_bin(Histogram& h, Mass limit) {
  constexpr int kPerLane = kBins / kWarp;
  const int lane = threadIdx.x;
  Mass mine = 0;
  for (int i = 0; i < kPerLane; ++i) mine += h.bins[lane * kPerLane + i];
  const Mass through = scan_lanes(mine);
  const unsigned past = __ballot_sync(kAllLanes, through > limit);
  const unsigned filled = __ballot_sync(kAllLanes, mine > 0);
  const int chosen = past != 0 ? __ffs(static_cast<int>(past)) - 1 : kWarp - 1 - __clz(filled);
  if (lane != chosen) return;
  Mass before = through - mine;
  int digit = -1;
  for (int i = 0; i < kPerLane; ++i) {
    const Mass inside = h.bins[lane * kPerLane + i];
    if (inside == 0) continue;
    if (digit >= 0) before += h.inside;
    digit = lane * kPerLane + i;
    h.inside = inside;
    if (before + inside > limit) break;
  }
  h.digit = digit;
  h.before = before;
}

// Returns the first value, in descending order if kFromTop, else ascending, with which the running
// sum of measure(n, value) exceeds `limit`; if none does, the last value with a measure above zero.
template <bool kFromTop, class RowType, class Measure>
__device__ inline Edge find_edge(const RowType& row, float largest, Mass limit, Histogram& h,
                                 const Measure& measure) {
  Edge edge = {0, 0, 0};
  int edge_step = 0;
  for (int digit = 0; digit < kDigits; ++digit) {
    for (int i = threadIdx.x; i < kBins; i += blockDim.x) h.bins[i] = 0;
    __syncthreads();
    row.each([&](int n, float value) {
      const float below = (largest - value) * kStepsPerUnit;
      const int step = below < kBins - 1 ? static_cast<int>(below) : kBins - 1;
      const unsigned key = key_of(value);
      int bin;
      if (digit == 0) {
        bin = kBins - 1 - step;
      } else {
        if (step != edge_step) return;
        // The bytes before this one; a shift by 32 would be undefined.
        if (digit > 1 && key >> (40 - 8 * digit) != edge.key >> (40 - 8 * digit)) return;
        bin = key >> (32 - 8 * digit) & (kBins - 1);
      }
      const Mass mass = measure(n, value);
      if (mass > 0) atomicAdd(&h.bins[kFromTop ? kBins - 1 - bin : bin], mass);
    });
    __syncthreads();
    if (threadIdx.x < kWarp) find_bin(h, limit - edge.before);
    __syncthreads();
    const int bin = kFromTop ? kBins - 1 - h.digit : h.digit;
    edge.before += h.before;
    edge.equal = h.inside;
    if (digit == 0) {
      edge_step = kBins - 1 - bin;
    } else {
      edge.key |= static_cast<unsigned>(bin) << (32 - 8 * digit);
    }
  }
  return edge;
}

// Called by warp 0. Replaces each entry by the sum of the entries before it and returns the sum of
// all.
template <class T>
__device__ inline T scan_sections(T* sums, int count) {
  T carry = 0;
  for (int base = 0; base < count; base += kWarp) {
    const int i = base + static_cast<int>(threadIdx.x);
    const T mine = i < count ? sums[i] : T{0};
    const T through = scan_lanes(mine);
    if (i < count) sums[i] = carry + through - mine;
    carry += __shfl_sync(kAllLanes, through, kWarp - 1);
  }
  return carry;
}

struct Best {
  float ratio;
  int entry;  // -1: none
};
__device__ inline Best better(Best a, Best b) {
  if (a.entry < 0) return b;
  if (b.entry < 0 || a.ratio > b.ratio) return a;
  if (b.ratio > a.ratio) return b;
  return a.entry < b.entry ? a : b;
}

template <class T, int kThreads, int kItems>
__global__ void __launch_bounds__(kThreads, 1) sample_tokens_kernel(SampleTokensArgs a) {
  using RowType = Row<T, kThreads, kItems>;
  constexpr int kWarps = kThreads / kWarp;
  __shared__ Histogram histogram;
  __shared__ float float_scratch[kWarps];
  __shared__ Mass mass_scratch[kWarps];
  __shared__ int entry_scratch[kWarps];
  __shared__ Mass total_mass;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t r = blockIdx.x, b = r / a.tokens, t = r % a.tokens;
  const int vocab = static_cast<int>(a.vocab);
  const double guidance = a.guidance_later != nullptr ? *a.guidance_later : a.guidance;
  RowType row_values(row<T>(a.logits, b, t), row<T>(a.logits, a.batch + b, t), vocab, guidance);
  Mass* sums = dynamic_shared<Mass>();  // of sections
  int* ties = reinterpret_cast<int*>(sums + row_values.sections());

  // NaN counts as +inf; values beyond the row are -inf.
  float largest = -__builtin_huge_valf();
  row_values.each(
      [&](int, float x) { largest = fmaxf(largest, x == x ? x : __builtin_huge_valf()); });
  largest = reduce_block(largest, float_scratch, Largest());
  // Logits are not validated on a GPU: a row that cannot be sampled gives token 0.
  if (!(largest > -__builtin_huge_valf() && largest < __builtin_huge_valf())) {
    if (threadIdx.x == 0) a.out[r] = 0;
    return;
  }
  row_values.weigh(largest, a.exponential != nullptr);

  unsigned threshold = 0;  // entries with smaller keys are dropped
  Mass dropped_ties = 0;   // and this many with an equal key, lower entries first
  if (a.top_k > 0 && a.top_k < a.vocab) {
    const Mass before = static_cast<Mass>(a.top_k - 1);
    threshold = find_edge<true>(row_values, largest, before, histogram, [&](int n, float) {
                  return Mass{RowType::entry(n) < vocab};
                }).key;
  }
  if (a.top_p > 0.0 && a.top_p < 1.0) {
    const auto kept_weight = [&](int n, float x) {
      return key_of(x) >= threshold ? row_values.weight(n, x) : Mass{0};
    };
    Mass total = 0;
    row_values.each([&](int n, float x) { total += kept_weight(n, x); });
    total = reduce_block(total, mass_scratch, Plus());
    const Mass allowance = static_cast<Mass>((1.0 - a.top_p) * static_cast<double>(total));
    const Edge edge = find_edge<false>(row_values, largest, allowance, histogram, kept_weight);
    const Mass weight = row_values.weight_of(value_of(edge.key));
    const Mass ties_at_edge = edge.equal / weight;
    const Mass max_dropped = edge.key == key_of(largest) ? ties_at_edge - 1 : ties_at_edge;
    dropped_ties = allowance > edge.before ? (allowance - edge.before) / weight : 0;
    dropped_ties = dropped_ties < max_dropped ? dropped_ties : max_dropped;
    threshold = edge.key;
  }
  if (dropped_ties > 0) {
    row_values.each([&](int n, float x) {
      const unsigned equal = __ballot_sync(kAllLanes, key_of(x) == threshold);
      if (lane == 0) ties[RowType::section(n)] = __popc(equal);
    });
    __syncthreads();
    if (warp == 0) scan_sections(ties, row_values.sections());
    __syncthreads();
  }
  // The weight after the filters; all lanes of a warp call together.
  const auto left = [&](int n, float x) {
    const unsigned key = key_of(x);
    bool stays = key >= threshold;
    if (dropped_ties > 0) {
      const unsigned equal = __ballot_sync(kAllLanes, key == threshold);
      const Mass rank = ties[RowType::section(n)] + __popc(equal & ((1u << lane) - 1));
      stays = stays && !(key == threshold && rank < dropped_ties);
    }
    return stays ? row_values.weight(n, x) : Mass{0};
  };

  row_values.each([&](int n, float x) {
    const Mass sum = reduce_lanes<kWarp>(left(n, x), Plus());
    if (lane == 0) sums[RowType::section(n)] = sum;
  });
  __syncthreads();
  if (warp == 0) {
    const Mass total = scan_sections(sums, row_values.sections());
    if (lane == 0) total_mass = total;
  }
  __syncthreads();
  const Mass total = total_mass;

  if (a.exponential != nullptr) {
    const float* exponential = a.exponential + r * a.vocab;
    const double share = 1.0 / static_cast<double>(total);
    Best best = {0.0f, -1};
    row_values.each([&](int n, float x) {
      const Mass weight = left(n, x);
      if (weight == 0) return;
      const int i = RowType::entry(n);
      const float p = static_cast<float>(static_cast<double>(weight) * share);
      best = better(best, {__fdiv_rn(p, exponential[i]), i});
    });
#pragma unroll
    for (int apart = kWarp / 2; apart > 0; apart /= 2) {
      const Best other = {__shfl_xor_sync(kAllLanes, best.ratio, apart),
                          __shfl_xor_sync(kAllLanes, best.entry, apart)};
      best = better(best, other);
    }
    if (lane == 0) {
      float_scratch[warp] = best.ratio;
      entry_scratch[warp] = best.entry;
    }
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (int i = 1; i < kWarps; ++i) best = better(best, {float_scratch[i], entry_scratch[i]});
    a.out[r] = best.entry;
    return;
  }

  const int64_t seed = a.seed_later != nullptr ? *a.seed_later : a.seed;
  const double uniform = philox_uniform(static_cast<uint64_t>(seed),
                                        static_cast<uint64_t>(a.image_ids[b * a.image_stride]),
                                        static_cast<uint32_t>(a.position + t));
  Mass target = static_cast<Mass>(uniform * static_cast<double>(total));
  // u * total may round up to the total, which selects the last entry.
  target = target < total ? target : total - 1;
  row_values.each([&](int n, float x) {
    const int section = RowType::section(n);
    const Mass begin = sums[section];
    const Mass end = section + 1 < row_values.sections() ? sums[section + 1] : total;
    if (target < begin || target >= end) return;  // the same for all lanes
    const Mass through = begin + scan_lanes(left(n, x));
    const unsigned past = __ballot_sync(kAllLanes, through > target);
    if (lane == __ffs(static_cast<int>(past)) - 1) a.out[r] = RowType::entry(n);
  });
}

template <class T, int kThreads, int kItems>
int launch_rows(const SampleTokensArgs& a, void* stream) {
  const int64_t turns = kItems > 0 ? kItems : ceil_div(a.vocab, kThreads);
  const int64_t sections = turns * (kThreads / kWarp);
  const size_t shared_bytes = sections * (sizeof(Mass) + sizeof(int));
  return launch(sample_tokens_kernel<T, kThreads, kItems>,
                dim3(static_cast<unsigned>(a.batch * a.tokens)), dim3(kThreads), shared_bytes,
                stream, a);
}

template <class T>
int sample_rows(const SampleTokensArgs& a, void* stream) {
  return a.vocab <= 128    ? launch_rows<T, 64, 2>(a, stream)
         : a.vocab <= 1024 ? launch_rows<T, 256, 4>(a, stream)
         : a.vocab <= 4096 ? launch_rows<T, 512, 8>(a, stream)
                           : launch_rows<T, 512, 0>(a, stream);
}

int sample(const SampleTokensArgs& a, void* stream) {
  if (a.vocab > kMostEntries) return kInvalidValue;
  switch (a.dtype) {
    case DType::kFloat32:
      return sample_rows<float>(a, stream);
    case DType::kBFloat16:
      return sample_rows<BF16>(a, stream);
    default:
      return sample_rows<Half>(a, stream);
  }
}

}  // namespace
}  // namespace variant::cuda

VARIANT_CUDA_API int variant_cuda_sample_tokens(const variant::cuda::SampleTokensArgs* args,
                                                int64_t args_bytes, int device, void* stream) {
  if (args_bytes != sizeof(*args)) return variant::cuda::kInvalidValue;
  const variant::DeviceGuard guard(device);
  return variant::cuda::sample(*args, stream);
}
