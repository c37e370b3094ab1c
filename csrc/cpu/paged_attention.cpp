// Paged attention: the rows of K and V are found through the page table while they are packed.
// Slots past a sequence's length are never read, so what they hold (NaN, say) cannot matter.
#include "../include/paged_attention.h"

#include "attention_core.h"

namespace variant::VARIANT_ISA_NAMESPACE {
namespace {

template <class T>
void forward(const PagedAttentionForwardArgs& a) {
  const int64_t panels_in_all = (a.tokens + kPanel - 1) / kPanel;
  if (a.batch * a.heads * panels_in_all == 0) return;
  const int64_t per_task = panels_per_task(panels_in_all, a.batch * a.heads, a.num_threads);
  const int64_t tasks_per_head = (panels_in_all + per_task - 1) / per_task;
  const int64_t tasks = a.batch * a.heads * tasks_per_head;
  int64_t all_keys = 0;
  for (int64_t b = 0; b < a.batch; ++b) all_keys += a.kv_lens[b];
  const int64_t work = all_keys * a.tokens * a.heads * a.head_dim / 8;
  const int threads = static_cast<int>(min_of(tasks, threads_for(a.num_threads, work)));
  const int64_t floats = round_up(ForwardScratch::floats(per_task, a.head_dim), kPanel);
  Scratch<float> scratch(floats * threads);
  Scratch<QueryPanel> panels(per_task * threads);
  parallel_for(threads, tasks, [&](int64_t task, int thread) {
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
    QueryPanel* mine = panels.get() + thread * per_task;
    for (int64_t p = 0; p < count; ++p) {
      const int64_t begin = (first + p) * kPanel;
      mine[p] = {begin, min_of(kPanel, a.tokens - begin), keys, keys};
    }
    const int32_t* table = a.page_table + b * a.page_table_stride;
    const auto paged = [&](const HeadView& pages) {
      return [&, pages](int64_t s) {
        return row<T>(pages, table[s / a.page_size], s % a.page_size, h);
      };
    };
    ForwardScratch memory(scratch.get() + thread * floats, per_task, a.head_dim);
    attend_panels<T>(
        mine, count, a.head_dim, a.softmax_scale, nullptr,
        [&](int64_t t) { return row<T>(a.q, b, t, h); }, paged(a.k_pages), paged(a.v_pages), out,
        nullptr, memory);
  });
}

}  // namespace

void paged_attention_forward(const PagedAttentionForwardArgs& a) {
  a.dtype == DType::kFloat32 ? forward<float>(a) : forward<BF16>(a);
}

}  // namespace variant::VARIANT_ISA_NAMESPACE
