// Paged attention: copies look the rows of K and V up in the page table. The kernels and their
// launches, for pages of the queries' dtype and for 8-bit pages.
#pragma once

#include "launch.h"
#include "paged_attention.h"
#include "softmax_plain.cuh"
#include "softmax_tiles.cuh"

namespace variant::cuda {

// View of one head in all pages.
template <class Element>
struct HeadPages {
  const Element* data;
  int64_t page_stride, slot_stride;

  __device__ const Element* row(int page, int64_t slot) const {
    return data + page * page_stride + slot * slot_stride;
  }
};
template <class Element>
__device__ inline HeadPages<Element> pages_of_head(const HeadView& pages, int64_t h) {
  return {row<Element>(pages, 0, 0, h), pages.batch_stride, pages.token_stride};
}

// One tile of queries of one head of one sequence, and one part of its keys.
template <class T, class Page = T>
struct PagedSource {
  const T* q;
  HeadPages<Page> k_pages, v_pages;
  const int32_t* table;
  int64_t q_stride;
  int queries, page_size, page_shift, num_pages, first, last;

  __device__ const T* query(int r) const { return r < queries ? q + r * q_stride : nullptr; }
  __device__ int visible(int) const { return last; }
  // Page and slot of token s.
  __device__ int find(int s, int64_t* slot) const {
    const int entry = page_shift >= 0 ? s >> page_shift : s / page_size;
    *slot = s - entry * page_size;
    const int page = table[entry];
    return page < 0 ? 0 : page >= num_pages ? num_pages - 1 : page;
  }
  __device__ void locate(int s, const Page** k, const Page** v) const {
    int64_t slot;
    const int page = find(s, &slot);
    *k = k_pages.row(page, slot);
    *v = v_pages.row(page, slot);
  }
};

struct PagedParams {
  PagedAttentionArgs a;
  int page_shift;  // page_size is 1 << page_shift; -1: not a power of two
  float scale_log2;
  bool negate;

  // Types and functions that 8-bit pages replace (paged_attention_kv8.cuh).
  template <class T>
  using Source = PagedSource<T>;
  template <class T, int kHeadDim, int kKeys, int kWarps>
  using Tile = SoftmaxTile<T, kHeadDim, kKeys, kWarps>;
  template <class T, int kColumns>
  using PlainTile = cuda::PlainTile<T, kColumns>;
  template <class T>
  __device__ void set_scales(PagedSource<T>&, int64_t) const {}
  bool fits_tiles() const {
    return is_aligned(a.q, 2) && is_aligned(a.k_pages, 2) && is_aligned(a.v_pages, 2);
  }
};

// The index of each row that this block writes.
struct OutputIndex {
  int64_t b, h, t, split;

  // Of row r of the tile in (B, T, H) or (S, B, T, H).
  __device__ int64_t operator()(const PagedAttentionArgs& a, int r) const {
    return ((split * a.batch + b) * a.tokens + t + r) * a.heads + h;
  }
};

// Fills the source of one block and returns the index of its results.
template <class Tile, class Page>
__device__ inline OutputIndex tile_of_block(const PagedParams& p,
                                            PagedSource<typename Tile::T, Page>& source) {
  using T = typename Tile::T;
  const PagedAttentionArgs& a = p.a;
  const unsigned tiles = ceil_div(a.tokens, Tile::kQueries);
  unsigned rest = blockIdx.x;
  const int tile = rest % tiles;
  rest /= tiles;
  const int h = rest % static_cast<unsigned>(a.heads);
  rest /= static_cast<unsigned>(a.heads);
  const int b = rest % static_cast<unsigned>(a.batch);
  const int split = rest / static_cast<unsigned>(a.batch);
  const int t = tile * Tile::kQueries;

  const int capacity = static_cast<int>(a.entries * a.page_size);
  int length = a.kv_lens[b];
  length = length < 0 ? 0 : length > capacity ? capacity : length;
  // Parts are whole numbers of tiles; only the last part has a boundary.
  const int splits = static_cast<int>(a.splits);
  const int part = ((length + splits - 1) / splits + Tile::kKeys - 1) / Tile::kKeys * Tile::kKeys;
  source.first = split * part;
  source.last = length - source.first < part ? length : source.first + part;
  source.queries = static_cast<int>(a.tokens - t < Tile::kQueries ? a.tokens - t : Tile::kQueries);
  source.q = row<T>(a.q, b, t, h);
  source.q_stride = a.q.token_stride;
  source.k_pages = pages_of_head<Page>(a.k_pages, h);
  source.v_pages = pages_of_head<Page>(a.v_pages, h);
  source.table = a.page_table + b * a.page_table_stride;
  source.page_size = static_cast<int>(a.page_size);
  source.page_shift = p.page_shift;
  source.num_pages = static_cast<int>(a.num_pages);
  return {b, h, t, split};
}

// Apart: a logarithm of the sum would lose the digits of the sum to a large score.
__device__ inline void write_statistics(const PagedAttentionArgs& a, int64_t row, float largest,
                                        float total) {
  a.statistics[row] = largest;
  a.statistics[a.splits * a.batch * a.tokens * a.heads + row] = total;
}

template <class Tile, class Params>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks) paged_attention_kernel(Params p) {
  using T = typename Tile::T;
  const PagedAttentionArgs& a = p.a;
  typename Params::template Source<T> source;
  const OutputIndex index = tile_of_block<Tile>(p, source);
  p.set_scales(source, index.h);
  const int head_dim = static_cast<int>(a.head_dim);
  SoftmaxState<Tile> state;
  attend_tile<Tile>(dynamic_shared<T>(), source, source.first, source.last, head_dim, p.scale_log2,
                    p.negate, state);
  if (a.splits == 1) {
    T* out = static_cast<T*>(a.out);
    write_tile<Tile>(state, source.queries, head_dim,
                     [&](int r, int column, float first, float second) {
                       T* to = out + index(a, r) * a.head_dim + column;
                       *reinterpret_cast<uint32_t*>(to) = pack2<T>(first, second);
                     });
    return;
  }
  write_tile<Tile>(state, source.queries, head_dim,
                   [&](int r, int column, float first, float second) {
                     float* to = a.partial + index(a, r) * a.head_dim + column;
                     *reinterpret_cast<float2*>(to) = make_float2(first, second);
                   });
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = static_cast<int>(threadIdx.x) / kWarp * 16 + half * 8 + lane / 4;
    if (lane % 4 != 0 || r >= source.queries) continue;
    write_statistics(a, index(a, r), state.largest[half], state.total[half]);
  }
}

template <class Tile, class Params>
__global__ void __launch_bounds__(Tile::kThreads) paged_attention_plain_kernel(Params p) {
  using T = typename Tile::T;
  const PagedAttentionArgs& a = p.a;
  typename Params::template Source<T> source;
  const OutputIndex index = tile_of_block<Tile>(p, source);
  p.set_scales(source, index.h);
  const int head_dim = static_cast<int>(a.head_dim);
  PlainState<Tile> state;
  attend_plain<Tile>(dynamic_shared<float>(), source, source.first, source.last, head_dim,
                     p.scale_log2, p.negate, state);
  const bool whole = a.splits == 1;
  write_plain<Tile>(state, source.queries, head_dim, [&](int r, int column, float value) {
    const int64_t to = index(a, r) * a.head_dim + column;
    if (whole) {
      static_cast<T*>(a.out)[to] = narrow<T>(value);
    } else {
      a.partial[to] = value;
    }
  });
  if (whole) return;
#pragma unroll
  for (int i = 0; i < Tile::kPerWarp; ++i) {
    const int r = static_cast<int>(threadIdx.x) / kWarp * Tile::kPerWarp + i;
    if (threadIdx.x % kWarp != 0 || r >= source.queries) continue;
    write_statistics(a, index(a, r), state.largest[i], state.total[i]);
  }
}

constexpr int kCombineWarps = 4;

// out = sum of weight * partial / sum of weight over the parts; a warp for each row.
// weight = 2^(scale_log2 (largest score - that of all parts)) * sum of exponentials.
template <class T>
__global__ void __launch_bounds__(kCombineWarps* kWarp)
    paged_attention_combine_kernel(const float* partial, const float* statistics, T* out,
                                   int64_t rows, int splits, int head_dim, float scale_log2) {
  const int lane = threadIdx.x % kWarp;
  const int64_t r = int64_t{blockIdx.x} * kCombineWarps + threadIdx.x / kWarp;
  if (r >= rows) return;
  float largest = kMinusInfinity;
  for (int s = 0; s < splits; ++s) largest = fmaxf(largest, statistics[s * rows + r]);
  // Without keys the weights of all parts are zero. fmaxf ignores NaN, but the sum does not.
  const float origin = largest == kMinusInfinity ? 0.0f : largest;
  const auto weight = [&](int s) {
    const float* of_part = statistics + s * rows + r;
    return ex2((of_part[0] - origin) * scale_log2) * of_part[splits * rows];
  };
  float total = 0.0f;
  for (int s = 0; s < splits; ++s) total += weight(s);
  const float share = total == 0.0f ? 0.0f : 1.0f / total;
  for (int d = lane; d < head_dim; d += kWarp) {
    float sum = 0.0f;
    for (int s = 0; s < splits; ++s) {
      sum += weight(s) * partial[(s * rows + r) * head_dim + d];
    }
    out[r * head_dim + d] = narrow<T>(sum * share);
  }
}

template <class Tile, class Params>
int launch_tiles(void (*kernel)(Params), const Params& p, void* stream) {
  const PagedAttentionArgs& a = p.a;
  const int64_t blocks = ceil_div(a.tokens, Tile::kQueries) * a.heads * a.batch * a.splits;
  return launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(Tile::kThreads),
                Tile::kSharedBytes, stream, p);
}

template <class T, int kHeadDim, int kKeys, class Params>
int launch_width(const Params& p, void* stream) {
  if (p.a.tokens <= 16) {
    using Tile = typename Params::template Tile<T, kHeadDim, kKeys, 1>;
    return launch_tiles<Tile>(paged_attention_kernel<Tile, Params>, p, stream);
  }
  using Tile = typename Params::template Tile<T, kHeadDim, kKeys, 4>;
  return launch_tiles<Tile>(paged_attention_kernel<Tile, Params>, p, stream);
}

template <class T, int kColumns, class Params>
int launch_plain(const Params& p, void* stream) {
  using Tile = typename Params::template PlainTile<T, kColumns>;
  return launch_tiles<Tile>(paged_attention_plain_kernel<Tile, Params>, p, stream);
}

template <class T, class Params>
int attend(const Params& p, void* stream) {
  const int64_t d = p.a.head_dim;
  if constexpr (sizeof(T) == 2) {
    if (p.fits_tiles()) {
      return d <= 32    ? launch_width<T, 32, 64>(p, stream)
             : d <= 64  ? launch_width<T, 64, 64>(p, stream)
             : d <= 96  ? launch_width<T, 96, 32>(p, stream)
             : d <= 128 ? launch_width<T, 128, 32>(p, stream)
                        : launch_width<T, 256, 16>(p, stream);
    }
  }
  return d <= 64    ? launch_plain<T, 2>(p, stream)
         : d <= 128 ? launch_plain<T, 4>(p, stream)
                    : launch_plain<T, 8>(p, stream);
}

template <class T, class Params>
int forward(const Params& p, void* stream) {
  const PagedAttentionArgs& a = p.a;
  const int error = attend<T>(p, stream);
  if (error != 0 || a.splits == 1) return error;
  const int64_t rows = a.batch * a.tokens * a.heads;
  return launch(paged_attention_combine_kernel<T>,
                dim3(static_cast<unsigned>(ceil_div(rows, kCombineWarps))),
                dim3(kCombineWarps * kWarp), 0, stream, static_cast<const float*>(a.partial),
                static_cast<const float*>(a.statistics), static_cast<T*>(a.out), rows,
                static_cast<int>(a.splits), static_cast<int>(a.head_dim), p.scale_log2);
}

// Derives the other parameters from p.a.
inline void derive_params(PagedParams& p) {
  const PagedAttentionArgs& a = p.a;
  p.page_shift = -1;
  for (int shift = 0; shift < 31; ++shift) {
    if (a.page_size == int64_t{1} << shift) p.page_shift = shift;
  }
  // A scale of zero would turn masked scores of -inf into NaN; 1e-30 gives the results of zero
  // without that.
  const float size = a.softmax_scale < 0.0f ? -a.softmax_scale : a.softmax_scale;
  p.scale_log2 = (size > 1e-30f ? size : 1e-30f) * 1.4426950408889634f;
  p.negate = a.softmax_scale < 0.0f;
}

template <class Params>
int forward(Params p, void* stream) {
  derive_params(p);
  switch (p.a.dtype) {
    case DType::kFloat32:
      return forward<float>(p, stream);
    case DType::kBFloat16:
      return forward<BF16>(p, stream);
    default:
      return forward<Half>(p, stream);
  }
}

}  // namespace variant::cuda
