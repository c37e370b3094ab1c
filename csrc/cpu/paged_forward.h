// Paged attention for pages of any dtype. Packing looks the rows of K and V up in the page table.
// Slots past a sequence's length are never read, so they may hold anything, NaN included.
#pragma once

#include "../include/paged_attention.h"
#include "attention_core.h"

namespace variant::VARIANT_ISA_NAMESPACE {

// Of paged_attention_float16.cpp.
void paged_attention_float16_forward(const PagedAttentionForwardArgs& a);

namespace {

// Pages of q's dtype.
template <class T>
struct PlainPages {
  typedef const T* Row;
  HeadView k, v;
  Row key(int64_t page, int64_t slot, int64_t h) const { return row<T>(k, page, slot, h); }
  Row value(int64_t page, int64_t slot, int64_t h) const { return row<T>(v, page, slot, h); }
};

// A single key has probability 1 for every finite score, and NaN otherwise. The first scale of
// every image is such a call; computing it takes less time than packing its operands.
template <class T, class Row>
inline void attend_one_key(const T* q, Row k, Row v, int64_t head_dim, float softmax_scale,
                           T* out) {
  VecF products = {};
  for_vectors(head_dim,
              [&](int64_t d, auto lanes) { products += load(q + d, lanes) * load(k + d, lanes); });
  const float score = sum_lanes(products) * softmax_scale;
  const float nothing = score - score;
  for_vectors(head_dim,
              [&](int64_t d, auto lanes) { store(out + d, load(v + d, lanes) + nothing, lanes); });
}

// pages.key(page, slot, head) and pages.value(...) return rows: Pages::Row is const T*, or a type
// with the same packing functions. a.k_pages and a.v_pages are not read.
template <class T, class Pages>
void forward(const PagedAttentionForwardArgs& a, Pages pages) {
  using Row = typename Pages::Row;
  const int64_t panels_in_all = (a.tokens + kPanel - 1) / kPanel;
  if (a.batch * a.heads * panels_in_all == 0) return;
  const int64_t per_task = panels_per_task(panels_in_all, a.batch * a.heads, a.num_threads);
  const int64_t tasks_per_head = (panels_in_all + per_task - 1) / per_task;
  const int64_t tasks = a.batch * a.heads * tasks_per_head;
  int64_t all_keys = 0, longest = 0;
  for (int64_t b = 0; b < a.batch; ++b) {
    all_keys += a.kv_lens[b];
    longest = max_of(longest, int64_t{a.kv_lens[b]});
  }
  // The first term is the fixed cost of a head: packing, and the latency of short sums.
  const int64_t work = a.batch * a.heads * 256 + all_keys * a.tokens * a.heads * a.head_dim / 8;
  const int threads = static_cast<int>(min_of(tasks, threads_for(a.num_threads, work)));
  using Cell = typename CellOf<T>::type;
  const int64_t floats = round_up(
      ForwardScratch::floats(per_task, min_of(longest + kRows, kMaxTileKeys<Cell>), a.head_dim),
      kPanel);
  Scratch<float> scratch(floats * threads);
  Scratch<QueryPanel> panels(per_task * threads);
  // A chunk is about 30 us of work, and each thread gets at least eight chunks.
  const int64_t work_per_task = max_of(1, work / tasks);
  const int64_t chunk =
      max_of(1, min_of(kMinParallelElements * 4 / work_per_task, tasks / (8 * threads)));
  parallel_for(
      threads, tasks,
      [&](int64_t task, int thread) {
        const int64_t b = task / (a.heads * tasks_per_head);
        const int64_t h = task / tasks_per_head % a.heads;
        const int64_t first = task % tasks_per_head * per_task;
        const int64_t count = min_of(per_task, panels_in_all - first);
        const int64_t keys = a.kv_lens[b];
        const auto out = [&](int64_t t) {
          return static_cast<T*>(a.out) + ((b * a.tokens + t) * a.heads + h) * a.head_dim;
        };
        if (keys == 0) {
          const int64_t end = min_of(a.tokens, (first + count) * kPanel);
          for (int64_t t = first * kPanel; t < end; ++t) {
            __builtin_memset(out(t), 0, sizeof(T) * a.head_dim);
          }
          return;
        }
        const int32_t* table = a.page_table + b * a.page_table_stride;
        if (keys == 1) {
          const Row k = pages.key(table[0], 0, h), v = pages.value(table[0], 0, h);
          const int64_t end = min_of(a.tokens, (first + count) * kPanel);
          for (int64_t t = first * kPanel; t < end; ++t) {
            attend_one_key(row<T>(a.q, b, t, h), k, v, a.head_dim, a.softmax_scale, out(t));
          }
          return;
        }
        QueryPanel* mine = panels.get() + thread * per_task;
        for (int64_t p = 0; p < count; ++p) {
          const int64_t begin = (first + p) * kPanel;
          mine[p] = {begin, min_of(kPanel, a.tokens - begin), keys, keys};
        }
        const auto rows = [&](int64_t s, int64_t num_rows, Row* k, Row* v) {
          int64_t entry = s / a.page_size, slot = s % a.page_size;
          for (int64_t i = 0; i < num_rows; ++i) {
            k[i] = pages.key(table[entry], slot, h);
            v[i] = pages.value(table[entry], slot, h);
            if (++slot == a.page_size) {
              slot = 0;
              ++entry;
            }
          }
        };
        const int64_t tile_keys = tile_keys_for<Cell>(keys);
        ForwardScratch memory(scratch.get() + thread * floats, per_task, tile_keys, a.head_dim);
        attend_panels<T, Row>(
            mine, count, a.head_dim, tile_keys, a.softmax_scale, nullptr,
            [&](int64_t t) { return row<T>(a.q, b, t, h); }, rows, out, nullptr, memory);
      },
      chunk);
}

}  // namespace
}  // namespace variant::VARIANT_ISA_NAMESPACE
