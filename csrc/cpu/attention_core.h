// Attention for one head, forward: queries in panels, keys in tiles, softmax on the way.
//
// Scores are held transposed, S[key, query]: queries run along the lanes. Their maxima and sums are
// then plain vector operations, K is used as it lies in memory (never transposed), and P is read
// back in the other order by the product with V. For every tile of keys:
//   m' = max(m, max over keys of s);  p = exp(s - m')
//   l  = l * exp(m - m') + sum of p;  o = o * exp(m - m') + p V;  m = m'
// and at the end  out = o / l,  lse = m + log(l). Everything between load and store is float32.
#pragma once

#include "gemm.h"
#include "parallel.h"

namespace variant::VARIANT_ISA_NAMESPACE {
namespace {

constexpr int64_t kKeysPerTile = 96;
// What one task holds at a time; more queries are cut into more tasks.
constexpr int64_t kMaxQueriesPerTask = 1024;

// Queries [begin, begin + count) fill the lanes of one panel; count <= kPanel.
// least and most: keys that the first and the last of them see.
struct QueryPanel {
  int64_t begin, count, least, most;
};

inline int vectors_of(int64_t lanes) { return static_cast<int>((lanes + kLanes - 1) / kLanes); }

// Float32 working memory of one task.
struct ForwardScratch {
  float* q;           // [panel][D][kPanel], scaled
  float* out;         // [panel * kPanel + lane][width_up]
  float *peak, *sum;  // [panel * kPanel + lane]
  float* keys;        // [kKeysPerTile][width_up]
  float* values;      // panels of [kKeysPerTile][kPanel]
  float* scores;      // [kKeysPerTile][kPanel]
  int64_t width_up;   // D in whole vectors

  static int64_t floats(int64_t panels, int64_t head_dim) {
    const int64_t up = round_up(head_dim, kLanes), wide = round_up(head_dim, kPanel);
    return panels * kPanel * (head_dim + up + 2) + kKeysPerTile * (up + wide + kPanel);
  }
  ForwardScratch(float* at, int64_t panels, int64_t head_dim) {
    const auto take = [&](int64_t count) {
      float* taken = at;
      at += count;
      return taken;
    };
    width_up = round_up(head_dim, kLanes);
    q = take(panels * kPanel * head_dim);
    out = take(panels * kPanel * width_up);
    keys = take(kKeysPerTile * width_up);
    values = take(kKeysPerTile * round_up(head_dim, kPanel));
    scores = take(kKeysPerTile * kPanel);
    peak = take(panels * kPanel);
    sum = take(panels * kPanel);
  }
};

// One step of the running softmax over a panel's scores for `keys` keys starting at first_key.
// Scores become probabilities in place; rescale receives exp(m - m') per lane.
// kMasked: query lane i sees keys below visible[i] only.
template <int kTileVectors, bool kMasked>
inline void softmax_step(float* scores, int64_t keys, int64_t first_key, const int32_t* visible,
                         float* peak, float* sum, float* rescale) {
  VecF top[kTileVectors], total[kTileVectors], factor[kTileVectors];
  VecI limit[kTileVectors];
  for (int j = 0; j < kTileVectors; ++j) {
    top[j] = load(peak + j * kLanes);
    if (kMasked) __builtin_memcpy(&limit[j], visible + j * kLanes, sizeof(VecI));
  }
  const auto seen = [&](int64_t key, int j) {
    return limit[j] > static_cast<int32_t>(first_key + key);
  };
  for (int64_t key = 0; key < keys; ++key) {
    for (int j = 0; j < kTileVectors; ++j) {
      const VecF score = load(scores + key * kPanel + j * kLanes);
      if (kMasked) {
        top[j] = seen(key, j) ? maximum(score, top[j]) : top[j];
      } else {
        top[j] = maximum(score, top[j]);
      }
    }
  }
  for (int j = 0; j < kTileVectors; ++j) {
    // A lane that has seen no key yet keeps its -inf; there is nothing to rescale.
    const VecF before = load(peak + j * kLanes);
    factor[j] = before == top[j] ? splat(1.0f) : exp_approx(before - top[j]);
    store(peak + j * kLanes, top[j]);
    store(rescale + j * kLanes, factor[j]);
    total[j] = VecF{};
  }
  for (int64_t key = 0; key < keys; ++key) {
    for (int j = 0; j < kTileVectors; ++j) {
      float* at = scores + key * kPanel + j * kLanes;
      VecF p = exp_approx(load(at) - top[j]);
      if (kMasked) p = seen(key, j) ? p : VecF{};
      store(at, p);
      total[j] += p;
    }
  }
  for (int j = 0; j < kTileVectors; ++j) {
    store(sum + j * kLanes, load(sum + j * kLanes) * factor[j] + total[j]);
  }
}

template <bool kMasked>
inline void softmax_panel(int vectors, float* scores, int64_t keys, int64_t first_key,
                          const int32_t* visible, float* peak, float* sum, float* rescale) {
  switch (vectors) {
    case 1:
      return softmax_step<1, kMasked>(scores, keys, first_key, visible, peak, sum, rescale);
    case 2:
      return softmax_step<2, kMasked>(scores, keys, first_key, visible, peak, sum, rescale);
#if defined(__AVX512F__)
    case 3:
      return softmax_step<3, kMasked>(scores, keys, first_key, visible, peak, sum, rescale);
    case 4:
      return softmax_step<4, kMasked>(scores, keys, first_key, visible, peak, sum, rescale);
#endif
  }
}

// Attention of num_panels panels of one head. q(t) is the row of query t, k(s) and v(s) those of
// key s, out(t) where its result goes, lse (may be null) the head's array over queries.
// visible[t]: keys that query t sees, non-decreasing in t; read only where a panel's queries
// differ.
template <class T, class Q, class K, class V, class O>
inline void attend_panels(const QueryPanel* panels, int64_t num_panels, int64_t head_dim,
                          float softmax_scale, const int32_t* visible, Q q, K k, V v, O out,
                          float* lse, ForwardScratch& s) {
  const int64_t panel_q = head_dim * kPanel, up = s.width_up;
  for (int64_t p = 0; p < num_panels; ++p) {
    float* packed = s.q + p * panel_q;
    for (int64_t i = 0; i < panels[p].count; ++i) {
      pack_column<T>(q(panels[p].begin + i), head_dim, softmax_scale, packed + i);
    }
    // Lanes without a query compute on zeros and are never stored.
    for (int64_t i = panels[p].count; i < vectors_of(panels[p].count) * kLanes; ++i) {
      for (int64_t d = 0; d < head_dim; ++d) packed[d * kPanel + i] = 0.0f;
    }
    for (int64_t i = 0; i < kPanel; ++i) {
      s.peak[p * kPanel + i] = -__builtin_inff();
      s.sum[p * kPanel + i] = 0.0f;
    }
    __builtin_memset(s.out + p * kPanel * up, 0, sizeof(float) * kPanel * up);
  }
  const int64_t all_keys = panels[num_panels - 1].most;
  for (int64_t first = 0; first < all_keys; first += kKeysPerTile) {
    const int64_t in_tile = min_of(kKeysPerTile, all_keys - first);
    for (int64_t i = 0; i < in_tile; ++i) {
      pack_row<T>(k(first + i), head_dim, 1.0f, s.keys + i * up);
      pack_panel_row<T>(v(first + i), head_dim, 1.0f, s.values, kKeysPerTile, i);
    }
    for (int64_t p = 0; p < num_panels; ++p) {
      const QueryPanel& panel = panels[p];
      const int64_t keys = min_of(in_tile, panel.most - first);
      if (keys <= 0) continue;
      const int vectors = vectors_of(panel.count);
      float *peak = s.peak + p * kPanel, *sum = s.sum + p * kPanel;
      float* o = s.out + p * kPanel * up;
      multiply<false>(keys, vectors, head_dim, Operand{s.keys, up, 1}, s.q + p * panel_q, s.scores,
                      kPanel);
      float rescale[kPanel];
      if (first + keys > panel.least) {
        int32_t limits[kPanel] = {};
        __builtin_memcpy(limits, visible + panel.begin, sizeof(int32_t) * panel.count);
        softmax_panel<true>(vectors, s.scores, keys, first, limits, peak, sum, rescale);
      } else {
        softmax_panel<false>(vectors, s.scores, keys, first, nullptr, peak, sum, rescale);
      }
      for (int64_t i = 0; i < panel.count; ++i) {
        if (rescale[i] == 1.0f) continue;
        for (int64_t d = 0; d < up; d += kLanes) {
          store(o + i * up + d, load(o + i * up + d) * rescale[i]);
        }
      }
      multiply_panels<true>(panel.count, head_dim, keys, Operand{s.scores, 1, kPanel}, s.values,
                            kKeysPerTile, o, up);
    }
  }
  for (int64_t p = 0; p < num_panels; ++p) {
    for (int64_t i = 0; i < panels[p].count; ++i) {
      const int64_t t = panels[p].begin + i, lane = p * kPanel + i;
      T* target = out(t);
      const float sum = s.sum[lane];
      for_vectors(head_dim, [&](int64_t d, auto lanes) {
        store(target + d, load(s.out + lane * up + d) / sum, lanes);
      });
      if (lse) lse[t] = s.peak[lane] + static_cast<float>(__builtin_log(sum));
    }
  }
}

// How many panels one task takes: all that fit its memory, fewer when there would be less than two
// tasks per thread. Results do not depend on it.
inline int64_t panels_per_task(int64_t num_panels, int64_t heads_in_all, int num_threads) {
  int64_t per_task = min_of(num_panels, max_of(1, kMaxQueriesPerTask / kPanel));
  while (per_task > 1 &&
         heads_in_all * ((num_panels + per_task - 1) / per_task) < 2 * num_threads) {
    per_task = (per_task + 1) / 2;
  }
  return per_task;
}

}  // namespace
}  // namespace variant::VARIANT_ISA_NAMESPACE
