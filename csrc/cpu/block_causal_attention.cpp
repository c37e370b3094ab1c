// Block-causal attention over all scales at once, forward and backward.
#include "../include/block_causal_attention.h"

#include "attention_core.h"

namespace variant::VARIANT_ISA_NAMESPACE {
namespace {

// A scale with at least this many tokens starts a new panel; smaller ones share panels.
constexpr int64_t kOwnPanelTokens = kPanel / 2;

// The query panels, and the number of keys that each query sees: arrays sized for the worst case.
class Layout {
 public:
  Layout(const int64_t* scale_lengths, int64_t num_scales, int64_t length)
      : visible_(length + kPanel), panels_(length + 1) {
    int64_t begin = 0, count = 0;
    for (int64_t scale = 0; scale < num_scales; ++scale) {
      const int64_t tokens = scale_lengths[scale], end = begin + tokens;
      for (int64_t t = begin; t < end; ++t) visible_.get()[t] = static_cast<int32_t>(end);
      for (int64_t t = begin; t < end;) {
        const bool open =
            count > 0 && panel(count - 1).count < kPanel && (t > begin || tokens < kOwnPanelTokens);
        if (!open) panels_.get()[count++] = {t, 0, end, end};
        QueryPanel& last = panels_.get()[count - 1];
        const int64_t queries = min_of(kPanel - last.count, end - t);
        last.count += queries;
        last.most = end;
        t += queries;
      }
      begin = end;
    }
    count_ = count;
  }
  int64_t count() const { return count_; }
  const QueryPanel& panel(int64_t i) const { return panels_.get()[i]; }
  const QueryPanel* panels() const { return panels_.get(); }
  const int32_t* visible() const { return visible_.get(); }

 private:
  Scratch<int32_t> visible_;
  Scratch<QueryPanel> panels_;
  int64_t count_;
};

template <class T>
void forward(const BlockCausalForwardArgs& a) {
  if (a.batch * a.length * a.heads == 0) return;
  const Layout layout(a.scale_lengths, a.num_scales, a.length);
  const int64_t per_task = panels_per_task(layout.count(), a.batch * a.heads, a.num_threads);
  const int64_t tasks_per_head = (layout.count() + per_task - 1) / per_task;
  const int64_t tasks = a.batch * a.heads * tasks_per_head;
  const int64_t work = a.batch * a.heads * a.length * a.length * a.head_dim / 8;
  const int threads = static_cast<int>(min_of(tasks, threads_for(a.num_threads, work)));
  const int64_t tile_keys = tile_keys_for<typename CellOf<T>::type>(a.length);
  const int64_t floats = round_up(ForwardScratch::floats(per_task, tile_keys, a.head_dim), kPanel);
  Scratch<float> scratch(floats * threads);
  parallel_for(threads, tasks, [&](int64_t task, int thread) {
    // The last panels see the most keys. They come first, so that threads finish together.
    const int64_t first = (tasks_per_head - 1 - task / (a.batch * a.heads)) * per_task;
    const int64_t b = task % (a.batch * a.heads) / a.heads, h = task % a.heads;
    ForwardScratch memory(scratch.get() + thread * floats, per_task, tile_keys, a.head_dim);
    attend_panels<T>(
        layout.panels() + first, min_of(per_task, layout.count() - first), a.head_dim, tile_keys,
        a.softmax_scale, layout.visible(), [&](int64_t t) { return row<T>(a.q, b, t, h); },
        [&](int64_t s, int64_t count, const T** k, const T** v) {
          for (int64_t i = 0; i < count; ++i) {
            k[i] = row<T>(a.k, b, s + i, h);
            v[i] = row<T>(a.v, b, s + i, h);
          }
        },
        [&](int64_t t) {
          return static_cast<T*>(a.out) + ((b * a.length + t) * a.heads + h) * a.head_dim;
        },
        a.lse + (b * a.heads + h) * a.length, memory);
  });
}

// Keys of one tile in the backward pass.
constexpr int64_t kKeysPerTile = 96;

// Backward of one head, with s = scale * q k^T, p = exp(s - lse), delta = rowsum(grad_out * out):
//   dv = p^T grad_out,   ds = p * (grad_out v^T - delta),   dk = scale ds^T q,   dq = scale ds k
// P and dS are held transposed, [key, query], as in the forward pass, and are operands like the
// inputs: with bfloat16 dot products they are rounded to bfloat16. dk and dv of one tile of keys
// gather over the query panels, last first (it sees every key); dq of one panel gathers over the
// key tiles in order. Both orders are fixed, so a head may be cut in two passes (one for dq, one
// for dk and dv) when there are fewer heads than threads, with the same bits.
struct BackwardScratch {
  float *q_columns, *grad_columns;  // [panel][cells of D][kPanel]: transposed, for S and dP
  float* out_columns;               // [cells of D][kPanel], one panel at a time
  float *q_rows, *grad_rows;        // per panel: panels of [groups of queries][kPanel]
  float *delta, *shift;             // [panel * kPanel + lane]; shift: lse * log2(e)
  float* dq;                        // [panel * kPanel + lane][up]
  float *keys, *values;             // [kKeysPerTile][cells of D, whole vectors]
  float* key_panels;                // panels of [groups of keys][kPanel], for dq
  float *dk, *dv;                   // [kKeysPerTile][up]
  float *p, *ds;                    // [kKeysPerTile][kPanel]: numbers, then cells along queries
  float* ds_groups;                 // [groups of keys][kPanel]: cells along keys; ds if the same
  int64_t up, wide;

  template <class Cell, class Take>
  void lay_out(int64_t panels, int64_t head_dim, Take take) {
    up = round_up(head_dim, kLanes);
    wide = round_up(head_dim, kPanel);
    q_columns = take(panels * kPanel * head_dim / Cell::kGroup);
    grad_columns = take(panels * kPanel * head_dim / Cell::kGroup);
    out_columns = take(kPanel * head_dim / Cell::kGroup);
    q_rows = take(panels * kPanel * wide / Cell::kGroup);
    grad_rows = take(panels * kPanel * wide / Cell::kGroup);
    delta = take(panels * kPanel);
    shift = take(panels * kPanel);
    dq = take(panels * kPanel * up);
    keys = take(kKeysPerTile * up);
    values = take(kKeysPerTile * up);
    key_panels = take(kKeysPerTile * wide / Cell::kGroup);
    dk = take(kKeysPerTile * up);
    dv = take(kKeysPerTile * up);
    p = take(kKeysPerTile * kPanel);
    ds = take(kKeysPerTile * kPanel);
    ds_groups = Cell::kGroup == 1 ? ds : take(kKeysPerTile * kPanel / 2);
  }
  template <class Cell>
  static int64_t floats(int64_t panels, int64_t head_dim) {
    int64_t total = 0;
    BackwardScratch counted;
    counted.lay_out<Cell>(panels, head_dim, [&](int64_t count) -> float* {
      total += round_up(count, 16);
      return nullptr;
    });
    return total;
  }
  template <class Cell>
  static BackwardScratch at(float* memory, int64_t panels, int64_t head_dim) {
    BackwardScratch scratch;
    scratch.lay_out<Cell>(panels, head_dim, [&](int64_t count) {
      float* part = memory;
      memory += round_up(count, 16);
      return part;
    });
    return scratch;
  }
};

// Packs rows [0, count) of row(i) as panels of B; the product reduces over them.
template <class Cell, class Row>
inline void pack_panel_rows(int64_t count, int64_t width, Row row, float* panels,
                            int64_t panel_rows) {
  constexpr int kGroup = Cell::kGroup;
  for (int64_t i = 0; i < count; i += kGroup) {
    const auto* first = row(i);
    const auto* second = i + kGroup - 1 < count ? row(i + kGroup - 1) : nullptr;
    pack_panel_group(Cell{}, first, second, width, panels, panel_rows, i / kGroup);
  }
}

template <class T>
void pack_query_panel(const BlockCausalBackwardArgs& a, const QueryPanel& panel, int64_t b,
                      int64_t h, int64_t p, BackwardScratch& s) {
  using Cell = typename CellOf<T>::type;
  const int64_t cells = a.head_dim / Cell::kGroup, panel_rows = kPanel / Cell::kGroup;
  float* grad_columns = s.grad_columns + p * kPanel * cells;
  const auto q = [&](int64_t i) { return row<T>(a.q, b, panel.begin + i, h); };
  const auto grad = [&](int64_t i) { return row<T>(a.grad_out, b, panel.begin + i, h); };
  const auto out = [&](int64_t i) { return row<T>(a.out, b, panel.begin + i, h); };
  pack_columns<Cell, T>(panel.count, a.head_dim, q, s.q_columns + p * kPanel * cells);
  pack_columns<Cell, T>(panel.count, a.head_dim, grad, grad_columns);
  pack_columns<Cell, T>(panel.count, a.head_dim, out, s.out_columns);
  pack_panel_rows<Cell>(panel.count, a.head_dim, q, s.q_rows + p * panel_rows * s.wide, panel_rows);
  pack_panel_rows<Cell>(panel.count, a.head_dim, grad, s.grad_rows + p * panel_rows * s.wide,
                        panel_rows);
  for (int64_t i = 0; i < kPanel; ++i) {
    const int64_t t = panel.begin + i;
    s.shift[p * kPanel + i] =
        i < panel.count ? a.lse[(b * a.heads + h) * a.length + t] * kLog2E : 0.0f;
  }
  // Sums in the same order as dP, so that a query with one visible key has a gradient of exactly
  // zero.
  for (int j = 0; j < vectors_of(panel.count); ++j) {
    VecF delta = {};
    for (int64_t d = 0; d < cells; ++d) {
      delta = Cell::multiply_add(delta, load(s.out_columns + d * kPanel + j * kLanes),
                                 load(grad_columns + d * kPanel + j * kLanes));
    }
    store(s.delta + p * kPanel + j * kLanes, delta);
  }
}

// Packs one vector of queries as cells along the queries, into vector j of a row.
inline void store_cells(Single, float* row, int j, VecF x) { store(row + j * kLanes, x); }
#if defined(__AVX512BF16__)
inline void store_cells(Pair, float* row, int j, VecF x) {
  const __m256bh narrow = _mm512_cvtneps_pbh((__m512)x);
  __builtin_memcpy(row + j * kLanes / 2, &narrow, sizeof narrow);
}
#endif

// Replaces scores by exponents. Where the lse is huge they end at 0, because no probability exceeds
// 1: its rounding error may exceed the range of 2^x. NaN stays NaN.
[[gnu::noinline, gnu::cold]] void clamp_exponents(float* p, int64_t keys, int vectors, float factor,
                                                  const float* shifts) {
  const VecF zero = {};
  for (int64_t key = 0; key < keys; ++key) {
    for (int j = 0; j < vectors; ++j) {
      float* at = p + key * kPanel + j * kLanes;
      const VecF shift = load(shifts + j * kLanes), exponent = load(at) * factor - shift;
      store(at, huge_lanes(shift) & (zero < exponent) ? zero : exponent);
    }
  }
}

// Replaces scores in p by probabilities and dP in ds by dS, and packs both as cells. limits count
// from the tile's first key.
template <class Cell>
inline void probabilities_and_grads(float* p, float* ds, float* ds_groups, int64_t keys,
                                    int vectors, const int32_t* limits, bool masked, float factor,
                                    const float* shifts, const float* deltas) {
  constexpr int kGroup = Cell::kGroup;
  for (int j = 0; j < vectors; ++j) {
    const VecF shift = load(shifts + j * kLanes), delta = load(deltas + j * kLanes);
    VecI limit;
    __builtin_memcpy(&limit, limits + j * kLanes, sizeof limit);
    const auto grad = [&](int64_t key) {
      float *p_row = p + key * kPanel, *ds_row = ds + key * kPanel;
      const VecF exponent = load(p_row + j * kLanes) * factor - shift;
      VecF probability = exp2_approx<Cell::kExpTerms>(exponent);
      if (masked) probability = limit > static_cast<int32_t>(key) ? probability : VecF{};
      const VecF grad_score = probability * (load(ds_row + j * kLanes) - delta);
      store_cells(Cell{}, p_row, j, probability);
      store_cells(Cell{}, ds_row, j, grad_score);
      return grad_score;
    };
    for (int64_t key = 0; key < keys; key += kGroup) {
      const VecF first = grad(key);
      if (kGroup == 1) continue;
      const VecF second = key + 1 < keys ? grad(key + 1) : VecF{};
      store(ds_groups + key / 2 * kPanel + j * kLanes, to_cells(Cell{}, first, second));
    }
  }
}

template <class T>
inline void store_rows(const float* from, int64_t up, int64_t rows, int64_t head_dim, float factor,
                       T* to, int64_t stride) {
  for (int64_t i = 0; i < rows; ++i) {
    for_vectors(head_dim, [&](int64_t d, auto lanes) {
      store(to + i * stride + d, load(from + i * up + d) * factor, lanes);
    });
  }
}

struct Range {
  int64_t begin, end;
};

// Panels [panels.begin, panels.end) against keys [keys.begin, keys.end) of one head; writes dq of
// those panels and/or dk, dv of those keys.
template <class T>
void backward_range(const BlockCausalBackwardArgs& a, const Layout& layout, int64_t b, int64_t h,
                    Range panels, Range keys, bool want_dq, bool want_dkv, BackwardScratch& s) {
  using Cell = typename CellOf<T>::type;
  constexpr int kGroup = Cell::kGroup;
  const int64_t stride = a.heads * a.head_dim;
  const int64_t base = (b * a.length * a.heads + h) * a.head_dim;
  const int64_t cells = a.head_dim / kGroup, key_stride = cells_up<Cell>(a.head_dim);
  const int64_t query_groups = kPanel / kGroup, key_groups = kKeysPerTile / kGroup;
  for (int64_t p = panels.begin; p < panels.end; ++p) {
    pack_query_panel<T>(a, layout.panel(p), b, h, p - panels.begin, s);
  }
  for (int64_t first = keys.begin; first < keys.end; first += kKeysPerTile) {
    const int64_t in_tile = min_of(kKeysPerTile, keys.end - first);
    const auto k = [&](int64_t i) { return row<T>(a.k, b, first + i, h); };
    for (int64_t i = 0; i < in_tile; ++i) {
      pack_row(Cell{}, k(i), a.head_dim, s.keys + i * key_stride);
      pack_row(Cell{}, row<T>(a.v, b, first + i, h), a.head_dim, s.values + i * key_stride);
    }
    if (want_dq) pack_panel_rows<Cell>(in_tile, a.head_dim, k, s.key_panels, key_groups);
    for (int64_t p = panels.end - 1; p >= panels.begin; --p) {
      const QueryPanel& panel = layout.panel(p);
      const int64_t tile_keys = min_of(in_tile, panel.most - first);
      if (tile_keys <= 0) break;
      const int64_t at = p - panels.begin;
      const int vectors = vectors_of(panel.count);
      multiply<Cell>(tile_keys, vectors, cells, Operand{s.keys, key_stride, 1},
                     s.q_columns + at * kPanel * cells, s.p, kPanel);
      multiply<Cell>(tile_keys, vectors, cells, Operand{s.values, key_stride, 1},
                     s.grad_columns + at * kPanel * cells, s.ds, kPanel);
      int32_t limits[kPanel];
      for (int64_t i = 0; i < kPanel; ++i) {
        limits[i] =
            i < panel.count ? layout.visible()[panel.begin + i] - static_cast<int32_t>(first) : 0;
      }
      VecF shifts[kPanel / kLanes];
      for (int j = 0; j < vectors; ++j) shifts[j] = load(s.shift + at * kPanel + j * kLanes);
      float factor = a.softmax_scale * kLog2E;
      const float* shift = s.shift + at * kPanel;
      static constexpr float kNoShift[kPanel] = {};
      if (is_huge(shifts, vectors)) {
        clamp_exponents(s.p, tile_keys, vectors, factor, shift);
        factor = 1.0f;
        shift = kNoShift;
      }
      probabilities_and_grads<Cell>(s.p, s.ds, s.ds_groups, tile_keys, vectors, limits,
                                    first + tile_keys > panel.least, factor, shift,
                                    s.delta + at * kPanel);
      if (want_dkv) {
        const int64_t depth = (panel.count + kGroup - 1) / kGroup;
        const bool fresh = p == panels.end - 1;
        multiply_add_panels<Cell>(tile_keys, a.head_dim, depth, Operand{s.p, kPanel, 1},
                                  s.grad_rows + at * query_groups * s.wide, query_groups, fresh,
                                  nullptr, s.dv, s.up);
        multiply_add_panels<Cell>(tile_keys, a.head_dim, depth, Operand{s.ds, kPanel, 1},
                                  s.q_rows + at * query_groups * s.wide, query_groups, fresh,
                                  nullptr, s.dk, s.up);
      }
      if (want_dq) {
        multiply_add_panels<Cell>(panel.count, a.head_dim, (tile_keys + kGroup - 1) / kGroup,
                                  Operand{s.ds_groups, 1, kPanel}, s.key_panels, key_groups,
                                  first == keys.begin, nullptr, s.dq + at * kPanel * s.up, s.up);
      }
    }
    if (want_dkv) {
      store_rows(s.dk, s.up, in_tile, a.head_dim, a.softmax_scale,
                 static_cast<T*>(a.dk) + base + first * stride, stride);
      store_rows(s.dv, s.up, in_tile, a.head_dim, 1.0f,
                 static_cast<T*>(a.dv) + base + first * stride, stride);
    }
  }
  if (!want_dq) return;
  for (int64_t p = panels.begin; p < panels.end; ++p) {
    const QueryPanel& panel = layout.panel(p);
    store_rows(s.dq + (p - panels.begin) * kPanel * s.up, s.up, panel.count, a.head_dim,
               a.softmax_scale, static_cast<T*>(a.dq) + base + panel.begin * stride, stride);
  }
}

template <class T>
void backward(const BlockCausalBackwardArgs& a) {
  const int64_t heads = a.batch * a.heads;
  if (heads * a.length == 0) return;
  const Layout layout(a.scale_lengths, a.num_scales, a.length);
  const int64_t count = layout.count();
  const int64_t work = heads * a.length * a.length * a.head_dim / 8;
  const int available_threads = threads_for(a.num_threads, work);
  // Splitting a head costs two more products beside seven, so do it only if threads would be idle.
  const bool cut = heads < available_threads;
  const int64_t tiles = (a.length + kKeysPerTile - 1) / kKeysPerTile;
  const int64_t tasks_per_head = cut ? count + tiles : 1;
  const int64_t tasks = heads * tasks_per_head;
  const int threads = static_cast<int>(min_of(tasks, available_threads));
  using Cell = typename CellOf<T>::type;
  const int64_t floats = BackwardScratch::floats<Cell>(count, a.head_dim);
  Scratch<float> scratch(floats * threads);
  parallel_for(threads, tasks, [&](int64_t task, int thread) {
    const int64_t b = task / tasks_per_head / a.heads, h = task / tasks_per_head % a.heads;
    BackwardScratch memory =
        BackwardScratch::at<Cell>(scratch.get() + thread * floats, count, a.head_dim);
    const int64_t part = task % tasks_per_head;
    if (!cut) {
      backward_range<T>(a, layout, b, h, {0, count}, {0, a.length}, true, true, memory);
    } else if (part < count) {
      backward_range<T>(a, layout, b, h, {part, part + 1}, {0, layout.panel(part).most}, true,
                        false, memory);
    } else {
      const int64_t first = (part - count) * kKeysPerTile;
      backward_range<T>(a, layout, b, h, {0, count},
                        {first, min_of(a.length, first + kKeysPerTile)}, false, true, memory);
    }
  });
}

}  // namespace

void block_causal_attention_forward(const BlockCausalForwardArgs& a) {
  a.dtype == DType::kFloat32 ? forward<float>(a) : forward<BF16>(a);
}
void block_causal_attention_backward(const BlockCausalBackwardArgs& a) {
  a.dtype == DType::kFloat32 ? backward<float>(a) : backward<BF16>(a);
}

}  // namespace variant::VARIANT_ISA_NAMESPACE
