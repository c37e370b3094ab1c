// Paged attention: copies look the rows of K and V up in the page table. The kernels and their
// launches, for pages of the queries' dtype and for 8-bit pages.
#pragma once

#include "divisor.h"
#include "launch.h"
#include "paged_attention.h"
#include "softmax_plain.cuh"
#include "softmax_tiles.cuh"

namespace variant::cuda {

// Views of one head in all pages.
template <class Element, class Step>
struct HeadPages {
  const Element* data;
  Step page_step, slot_step;

  __device__ const Element* row(int page, int slot) const {
    return advance(advance(data, slot, slot_step), page, page_step);
  }
};
template <class Element, class Step>
__device__ inline HeadPages<Element, Step> pages_of_head(const HeadView& pages, int64_t h) {
  return {row<Element>(pages, 0, 0, h), step_of<Step, Element>(pages.batch_stride),
          step_of<Step, Element>(pages.token_stride)};
}

// One tile of queries of one head of one sequence, and one part of its keys. Step: of distances
// between rows.
template <class T, class Step, class Page = T>
struct PagedSource {
  const T* q;
  HeadPages<Page, Step> k_pages, v_pages;
  const int32_t* table;
  int64_t q_stride;
  int queries, page_size, last_page, first, last;
  Divisor page_of;

  __device__ const T* query(int r) const { return r < queries ? q + r * q_stride : nullptr; }
  // Page and slot of token s.
  __device__ int find(int s, int* slot) const {
    const uint32_t entry = page_of.quotient(s);
    *slot = s - static_cast<int>(entry) * page_size;
    const int page = table[entry];
    const int at_least_first = page < 0 ? 0 : page;
    return at_least_first < last_page ? at_least_first : last_page;
  }
  __device__ void locate(int s, const Page** k, const Page** v) const {
    int slot;
    const int page = find(s, &slot);
    *k = k_pages.row(page, slot);
    *v = v_pages.row(page, slot);
  }
  // After this the rows start at `column`.
  __device__ void move_columns(int column) {
    k_pages.data = held(k_pages.data + column);
    v_pages.data = held(v_pages.data + column);
  }
};

struct PagedParams {
  PagedAttentionArgs a;
  Divisor page_of;  // the entry of a token
  float scale_log2;
  bool negate;

  // Types and functions that 8-bit pages replace (paged_attention_kv8.cuh).
  template <class T, class Step>
  using Source = PagedSource<T, Step>;
  template <class T, int kHeadDim, int kKeys, int kWarps>
  using Tile = SoftmaxTile<T, kHeadDim, kKeys, kWarps>;
  template <class T, int kColumns>
  using PlainTile = cuda::PlainTile<T, kColumns>;
  template <class T, class Step>
  __device__ void set_scales(PagedSource<T, Step>&, int64_t) const {}
  bool fits_tiles() const {
    return cuda::fits_tiles(a.q) && cuda::fits_tiles(a.k_pages) && cuda::fits_tiles(a.v_pages) &&
           is_short(2, a.k_pages.batch_stride) && is_short(2, a.v_pages.batch_stride);
  }
};

// What one block computes: a tile of queries of one head, over one part of the keys. All tiles of a
// head are neighbours, and each reads all of its keys: those stay in the L2 cache without the
// groups of tile_order.h.
struct PagedBlock {
  int b, h, t, split;
  int queries;

  // The index of row r of the tile in (B, T, H) or (S, B, T, H).
  __device__ int64_t index(const PagedAttentionArgs& a, int r) const {
    return ((split * a.batch + b) * a.tokens + t + r) * a.heads + h;
  }
};

template <int kQueries>
__device__ inline PagedBlock block_of(const PagedAttentionArgs& a, unsigned number) {
  const unsigned tiles = ceil_div(a.tokens, kQueries);
  const unsigned heads = static_cast<unsigned>(a.heads), batch = static_cast<unsigned>(a.batch);
  PagedBlock block;
  block.t = static_cast<int>(number % tiles) * kQueries;
  number /= tiles;
  block.h = static_cast<int>(number % heads);
  number /= heads;
  block.b = static_cast<int>(number % batch);
  block.split = static_cast<int>(number / batch);
  const int left = static_cast<int>(a.tokens) - block.t;
  block.queries = left < kQueries ? left : kQueries;
  return block;
}

// Fills the source of a block.
template <class Tile, class Step, class Page>
__device__ inline void locate_block(const PagedParams& p, const PagedBlock& block,
                                    PagedSource<typename Tile::T, Step, Page>& source) {
  using T = typename Tile::T;
  const PagedAttentionArgs& a = p.a;
  const int capacity = static_cast<int>(a.entries * a.page_size);
  int length = a.kv_lens[block.b];
  length = length < 0 ? 0 : length > capacity ? capacity : length;
  // Parts are whole numbers of tiles; only the last part has a boundary.
  const int splits = static_cast<int>(a.splits);
  const int part = ((length + splits - 1) / splits + Tile::kKeys - 1) / Tile::kKeys * Tile::kKeys;
  source.first = block.split * part;
  source.last = length - source.first < part ? length : source.first + part;
  source.queries = block.queries;
  source.q = row<T>(a.q, block.b, block.t, block.h);
  source.q_stride = a.q.token_stride;
  source.k_pages = pages_of_head<Page, Step>(a.k_pages, block.h);
  source.v_pages = pages_of_head<Page, Step>(a.v_pages, block.h);
  source.table = held(a.page_table + block.b * a.page_table_stride);
  source.page_size = static_cast<int>(a.page_size);
  source.page_of = p.page_of;
  source.last_page = static_cast<int>(a.num_pages) - 1;
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
  typename Params::template Source<T, uint32_t> source;
  const PagedBlock start = block_of<Tile::kQueries>(a, blockIdx.x);
  locate_block<Tile>(p, start, source);
  p.set_scales(source, start.h);
  const int head_dim = static_cast<int>(a.head_dim);
  SoftmaxState<Tile> state;
  attend_tile<Tile>(dynamic_shared<T>(), source, source.first, source.last, head_dim, p.scale_log2,
                    p.negate, state);
  // Computed again, because during the loop its numbers would take registers.
  const PagedBlock block = block_of<Tile::kQueries>(a, unknown(blockIdx.x));
  if (a.splits == 1) {
    T* out = static_cast<T*>(a.out);
    write_tile<Tile>(state, block.queries, head_dim,
                     [&](int r, int column, float first, float second) {
                       T* to = out + block.index(a, r) * a.head_dim + column;
                       *reinterpret_cast<uint32_t*>(to) = pack2<T>(first, second);
                     });
    return;
  }
  write_tile<Tile>(state, block.queries, head_dim,
                   [&](int r, int column, float first, float second) {
                     float* to = a.partial + block.index(a, r) * a.head_dim + column;
                     *reinterpret_cast<float2*>(to) = make_float2(first, second);
                   });
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = static_cast<int>(threadIdx.x) / kWarp * 16 + half * 8 + lane / 4;
    if (lane % 4 != 0 || r >= block.queries) continue;
    write_statistics(a, block.index(a, r), state.largest[half], state.total[half]);
  }
}

template <class Tile, class Params>
__global__ void __launch_bounds__(Tile::kThreads) paged_attention_plain_kernel(Params p) {
  using T = typename Tile::T;
  const PagedAttentionArgs& a = p.a;
  typename Params::template Source<T, int64_t> source;
  const PagedBlock block = block_of<Tile::kQueries>(a, blockIdx.x);
  locate_block<Tile>(p, block, source);
  p.set_scales(source, block.h);
  const int head_dim = static_cast<int>(a.head_dim);
  PlainState<Tile> state;
  attend_plain<Tile>(dynamic_shared<float>(), source, source.first, source.last, head_dim,
                     p.scale_log2, p.negate, state);
  const bool whole = a.splits == 1;
  write_plain<Tile>(state, block.queries, head_dim, [&](int r, int column, float value) {
    const int64_t to = block.index(a, r) * a.head_dim + column;
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
    if (threadIdx.x % kWarp != 0 || r >= block.queries) continue;
    write_statistics(a, block.index(a, r), state.largest[i], state.total[i]);
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
      return d <= 32    ? launch_width<T, 32, 32>(p, stream)
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
  p.page_of = divide_by(static_cast<int>(a.page_size));
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
