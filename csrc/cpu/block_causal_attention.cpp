// Block-causal attention over all scales at once, forward and backward.
#include "../include/block_causal_attention.h"

#include "attention_core.h"

namespace variant::VARIANT_ISA_NAMESPACE {
namespace {

// A scale with at least this many tokens starts a new panel; smaller ones share panels.
constexpr int64_t kOwnPanelTokens = kPanel / 2;

// The query panels and what each query sees: plain arrays sized for the worst case.
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
        const int64_t taken = min_of(kPanel - last.count, end - t);
        last.count += taken;
        last.most = end;
        t += taken;
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
  const int64_t floats = round_up(ForwardScratch::floats(per_task, a.head_dim), kPanel);
  Scratch<float> scratch(floats * threads);
  parallel_for(threads, tasks, [&](int64_t task, int thread) {
    // The last panels see the most keys: handed out first, so that threads end together.
    const int64_t first = (tasks_per_head - 1 - task / (a.batch * a.heads)) * per_task;
    const int64_t b = task % (a.batch * a.heads) / a.heads, h = task % a.heads;
    ForwardScratch memory(scratch.get() + thread * floats, per_task, a.head_dim);
    attend_panels<T>(
        layout.panels() + first, min_of(per_task, layout.count() - first), a.head_dim,
        a.softmax_scale, layout.visible(), [&](int64_t t) { return row<T>(a.q, b, t, h); },
        [&](int64_t s) { return row<T>(a.k, b, s, h); },
        [&](int64_t s) { return row<T>(a.v, b, s, h); },
        [&](int64_t t) {
          return static_cast<T*>(a.out) + ((b * a.length + t) * a.heads + h) * a.head_dim;
        },
        a.lse + (b * a.heads + h) * a.length, memory);
  });
}

// Backward of one head, with s = scale * q k^T, p = exp(s - lse), delta = rowsum(grad_out * out):
//   dv = p^T grad_out,   ds = p * (grad_out v^T - delta),   dk = ds^T (scale q),   dq = scale ds k
// P and dS are held transposed, [key, query], as in the forward pass. dk and dv of one tile of keys
// gather over the query panels in order; dq of one panel gathers over the key tiles in order. Both
// orders are fixed, so a head may be cut in two passes (one for dq, one for dk and dv) when there
// are fewer heads than threads, with the same bits.
struct BackwardScratch {
  float *q_columns, *grad_columns;  // [panel][D][kPanel]: transposed, for S and dP
  float* out_columns;               // [D][kPanel], one panel at a time
  float *q_rows, *grad_rows;        // per panel: panels of [kPanel][kPanel], for dk and dv
  float *delta, *lse;               // [panel * kPanel + lane]
  float* dq;                        // [panel * kPanel + lane][up]
  float *keys, *values;             // [kKeysPerTile][up]
  float* key_panels;                // panels of [kKeysPerTile][kPanel], for dq
  float *dk, *dv;                   // [kKeysPerTile][up]
  float *p, *ds;                    // [kKeysPerTile][kPanel]
  int64_t up, wide;

  template <class Take>
  void lay_out(int64_t panels, int64_t head_dim, Take take) {
    up = round_up(head_dim, kLanes);
    wide = round_up(head_dim, kPanel);
    q_columns = take(panels * kPanel * head_dim);
    grad_columns = take(panels * kPanel * head_dim);
    out_columns = take(kPanel * head_dim);
    q_rows = take(panels * kPanel * wide);
    grad_rows = take(panels * kPanel * wide);
    delta = take(panels * kPanel);
    lse = take(panels * kPanel);
    dq = take(panels * kPanel * up);
    keys = take(kKeysPerTile * up);
    values = take(kKeysPerTile * up);
    key_panels = take(kKeysPerTile * wide);
    dk = take(kKeysPerTile * up);
    dv = take(kKeysPerTile * up);
    p = take(kKeysPerTile * kPanel);
    ds = take(kKeysPerTile * kPanel);
  }
  static int64_t floats(int64_t panels, int64_t head_dim) {
    int64_t total = 0;
    BackwardScratch counted;
    counted.lay_out(panels, head_dim, [&](int64_t count) -> float* {
      total += round_up(count, 16);
      return nullptr;
    });
    return total;
  }
  static BackwardScratch at(float* memory, int64_t panels, int64_t head_dim) {
    BackwardScratch placed;
    placed.lay_out(panels, head_dim, [&](int64_t count) {
      float* taken = memory;
      memory += round_up(count, 16);
      return taken;
    });
    return placed;
  }
};

template <class T>
void pack_query_panel(const BlockCausalBackwardArgs& a, const QueryPanel& panel, int64_t b,
                      int64_t h, int64_t p, BackwardScratch& s) {
  float* q_columns = s.q_columns + p * kPanel * a.head_dim;
  float* grad_columns = s.grad_columns + p * kPanel * a.head_dim;
  float* q_rows = s.q_rows + p * kPanel * s.wide;
  float* grad_rows = s.grad_rows + p * kPanel * s.wide;
  for (int64_t i = 0; i < kPanel; ++i) {
    s.lse[p * kPanel + i] = 0.0f;
  }
  for (int64_t i = 0; i < panel.count; ++i) {
    const int64_t t = panel.begin + i;
    const T* q = row<T>(a.q, b, t, h);
    const T* grad = row<T>(a.grad_out, b, t, h);
    const T* out = row<T>(a.out, b, t, h);
    pack_column(q, a.head_dim, a.softmax_scale, q_columns + i);
    pack_column(grad, a.head_dim, 1.0f, grad_columns + i);
    pack_panel_row(q, a.head_dim, a.softmax_scale, q_rows, kPanel, i);
    pack_panel_row(grad, a.head_dim, 1.0f, grad_rows, kPanel, i);
    pack_column(out, a.head_dim, 1.0f, s.out_columns + i);
    s.lse[p * kPanel + i] = a.lse[(b * a.heads + h) * a.length + t];
  }
  for (int64_t i = panel.count; i < vectors_of(panel.count) * kLanes; ++i) {
    for (int64_t d = 0; d < a.head_dim; ++d) {
      q_columns[d * kPanel + i] = 0.0f;
      grad_columns[d * kPanel + i] = 0.0f;
      s.out_columns[d * kPanel + i] = 0.0f;
    }
  }
  // The same chain of sums as in dP: a query that sees one key gets a gradient of exactly zero.
  for (int j = 0; j < vectors_of(panel.count); ++j) {
    VecF delta = {};
    for (int64_t d = 0; d < a.head_dim; ++d) {
      delta += load(s.out_columns + d * kPanel + j * kLanes) *
               load(grad_columns + d * kPanel + j * kLanes);
    }
    store(s.delta + p * kPanel + j * kLanes, delta);
  }
}

// p holds scores and becomes probabilities, ds holds dP and becomes dS.
inline void probabilities_and_grads(float* p, float* ds, int64_t keys, int vectors,
                                    int64_t first_key, const int32_t* limits, bool masked,
                                    const float* lse, const float* delta) {
  for (int j = 0; j < vectors; ++j) {
    const VecF shift = load(lse + j * kLanes), offset = load(delta + j * kLanes);
    VecI limit;
    __builtin_memcpy(&limit, limits + j * kLanes, sizeof limit);
    for (int64_t key = 0; key < keys; ++key) {
      float* at = p + key * kPanel + j * kLanes;
      float* grad_at = ds + key * kPanel + j * kLanes;
      VecF probability = exp_approx(load(at) - shift);
      if (masked) {
        probability = limit > static_cast<int32_t>(first_key + key) ? probability : VecF{};
      }
      store(at, probability);
      store(grad_at, probability * (load(grad_at) - offset));
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
  const int64_t stride = a.heads * a.head_dim;
  const int64_t base = (b * a.length * a.heads + h) * a.head_dim;
  for (int64_t p = panels.begin; p < panels.end; ++p) {
    pack_query_panel<T>(a, layout.panel(p), b, h, p - panels.begin, s);
  }
  __builtin_memset(s.dq, 0, sizeof(float) * (panels.end - panels.begin) * kPanel * s.up);
  for (int64_t first = keys.begin; first < keys.end; first += kKeysPerTile) {
    const int64_t in_tile = min_of(kKeysPerTile, keys.end - first);
    for (int64_t i = 0; i < in_tile; ++i) {
      const T* k = row<T>(a.k, b, first + i, h);
      pack_row(k, a.head_dim, 1.0f, s.keys + i * s.up);
      pack_row(row<T>(a.v, b, first + i, h), a.head_dim, 1.0f, s.values + i * s.up);
      if (want_dq) pack_panel_row(k, a.head_dim, 1.0f, s.key_panels, kKeysPerTile, i);
    }
    __builtin_memset(s.dk, 0, sizeof(float) * in_tile * s.up);
    __builtin_memset(s.dv, 0, sizeof(float) * in_tile * s.up);
    for (int64_t p = panels.begin; p < panels.end; ++p) {
      const QueryPanel& panel = layout.panel(p);
      const int64_t tile_keys = min_of(in_tile, panel.most - first);
      if (tile_keys <= 0) continue;
      const int64_t at = p - panels.begin;
      const int vectors = vectors_of(panel.count);
      multiply<false>(tile_keys, vectors, a.head_dim, Operand{s.keys, s.up, 1},
                      s.q_columns + at * kPanel * a.head_dim, s.p, kPanel);
      multiply<false>(tile_keys, vectors, a.head_dim, Operand{s.values, s.up, 1},
                      s.grad_columns + at * kPanel * a.head_dim, s.ds, kPanel);
      int32_t limits[kPanel] = {};
      __builtin_memcpy(limits, layout.visible() + panel.begin, sizeof(int32_t) * panel.count);
      probabilities_and_grads(s.p, s.ds, tile_keys, vectors, first, limits,
                              first + tile_keys > panel.least, s.lse + at * kPanel,
                              s.delta + at * kPanel);
      if (want_dkv) {
        multiply_panels<true>(tile_keys, a.head_dim, panel.count, Operand{s.p, kPanel, 1},
                              s.grad_rows + at * kPanel * s.wide, kPanel, s.dv, s.up);
        multiply_panels<true>(tile_keys, a.head_dim, panel.count, Operand{s.ds, kPanel, 1},
                              s.q_rows + at * kPanel * s.wide, kPanel, s.dk, s.up);
      }
      if (want_dq) {
        multiply_panels<true>(panel.count, a.head_dim, tile_keys, Operand{s.ds, 1, kPanel},
                              s.key_panels, kKeysPerTile, s.dq + at * kPanel * s.up, s.up);
      }
    }
    if (want_dkv) {
      store_rows(s.dk, s.up, in_tile, a.head_dim, 1.0f,
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
  const int wanted = threads_for(a.num_threads, work);
  // Cutting a head costs two products of seven more, so only when threads would be idle.
  const bool cut = heads < wanted;
  const int64_t tiles = (a.length + kKeysPerTile - 1) / kKeysPerTile;
  const int64_t tasks_per_head = cut ? count + tiles : 1;
  const int64_t tasks = heads * tasks_per_head;
  const int threads = static_cast<int>(min_of(tasks, wanted));
  const int64_t floats = BackwardScratch::floats(count, a.head_dim);
  Scratch<float> scratch(floats * threads);
  parallel_for(threads, tasks, [&](int64_t task, int thread) {
    const int64_t b = task / tasks_per_head / a.heads, h = task / tasks_per_head % a.heads;
    BackwardScratch memory =
        BackwardScratch::at(scratch.get() + thread * floats, count, a.head_dim);
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
