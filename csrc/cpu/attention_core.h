// Forward attention of one head: queries in panels, keys in tiles, online softmax.
//
// Scores are held transposed, S[key, query]: queries run along the lanes. Their maxima and sums are
// then plain vector operations, K is used as it lies in memory (never transposed), and P is read
// back in the other order by the product with V. With c = softmax_scale * log2(e), for every tile
// of keys:
//   m' = max(m, max over keys of s);  p = 2^(c s - c m')
//   l  = l * 2^(c (m - m')) + sum of p;  o = o * 2^(c (m - m')) + p V;  m = m'
// and at the end  out = o / l,  lse = log(2) * c m + log(l). Everything but the operands of
// bfloat16 dot products (q, K, V and p rounded to bfloat16) is float32; l sums p before it is
// rounded.
#pragma once

#include "gemm.h"

namespace variant::VARIANT_ISA_NAMESPACE {
namespace {

// The most keys of one tile: their scores are held at the same time.
template <class Cell>
constexpr int64_t kMaxTileKeys = Cell::kGroup == 2 ? 192 : 96;
// The most queries of one task; longer calls are split into more tasks.
constexpr int64_t kMaxQueriesPerTask = 1024;
constexpr float kLog2E = 1.44269504088896341f, kLn2 = 0.693147180559945309f;

// Keys of one tile. All tiles have the same size, so that the last one is not small, and hold whole
// row tiles of the product.
template <class Cell>
inline int64_t tile_keys_for(int64_t keys) {
  const int64_t tiles = (keys + kMaxTileKeys<Cell> - 1) / kMaxTileKeys<Cell>;
  return tiles == 0 ? kRows : round_up((keys + tiles - 1) / tiles, kRows);
}
static_assert(kMaxTileKeys<Single> % kRows == 0, "rounding up to whole rows stays in the maximum");
static_assert(kRows % 2 == 0, "a tile is a whole number of groups of two keys");

// 2^x for x <= 126 or so: 2^n * p(x - n), n the nearest integer, p a polynomial that is 1 at 0
// (minimax in relative error: 2.8e-6 with 4 terms, 9.1e-8 with 5). Below -126.5 it is 0, -inf
// included; NaN stays NaN.
template <int kTerms>
inline VecF exp2_approx(VecF x) {
  const VecF lowest = splat(-127.0f);
  const VecF clamped = lowest > x ? lowest : x;
  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits.
  const VecF shifted = clamped + 12582912.0f;
  const VecF f = clamped - (shifted - 12582912.0f);
  VecF p;
  if (kTerms == 4) {
    p = f * 0.00958285294f + 0.0559064262f;
    p = p * f + 0.240240991f;
    p = p * f + 0.693124175f;
  } else {
    p = f * 0.00132647273f + 0.00967151299f;
    p = p * f + 0.0555073358f;
    p = p * f + 0.240222424f;
    p = p * f + 0.693147004f;
  }
  p = p * f + 1.0f;
  return p * as_float((as_int(shifted) << 23) + 0x3f800000);
}

// Queries [begin, begin + count) fill the lanes of one panel; count <= kPanel. The first query sees
// `least` keys and the last one `most`.
struct QueryPanel {
  int64_t begin, count, least, most;
};

// Working memory of one task, in cells and float32.
struct ForwardScratch {
  float* q;           // [panel][cells of D][kPanel]
  float* out;         // [panel * kPanel + lane][width_up]
  float *peak, *sum;  // [panel * kPanel + lane]
  float* keys;        // [tile_keys][cells of D, whole vectors]
  float* values;      // panels of [groups of tile_keys][kPanel]
  float* scores;      // [tile_keys][kPanel]; p takes the first rows over, [groups][kPanel]
  int64_t width_up;   // D in whole vectors

  static int64_t floats(int64_t panels, int64_t tile_keys, int64_t head_dim) {
    const int64_t up = round_up(head_dim, kLanes), wide = round_up(head_dim, kPanel);
    return panels * kPanel * (head_dim + up + 2) + tile_keys * (up + wide + kPanel);
  }
  ForwardScratch(float* at, int64_t panels, int64_t tile_keys, int64_t head_dim) {
    const auto take = [&](int64_t count) {
      float* part = at;
      at += count;
      return part;
    };
    width_up = round_up(head_dim, kLanes);
    q = take(panels * kPanel * head_dim);
    out = take(panels * kPanel * width_up);
    keys = take(tile_keys * width_up);
    values = take(tile_keys * round_up(head_dim, kPanel));
    scores = take(tile_keys * kPanel);
    peak = take(panels * kPanel);
    sum = take(panels * kPanel);
  }
};

// Scores of one tile of keys, and their maxima per lane. kMasked: query lane i sees only the tile's
// first visible[i] keys; the scores of the others are -inf.
template <class Cell, int kTileVectors, bool kMasked>
inline void score_tile(int64_t keys, int64_t depth, Operand k, const float* q,
                       const int32_t* visible, float* scores, VecF* tops) {
  VecF top[kTileVectors];
  VecI limit[kTileVectors];
  for (int j = 0; j < kTileVectors; ++j) {
    top[j] = splat(-__builtin_inff());
    if (kMasked) __builtin_memcpy(&limit[j], visible + j * kLanes, sizeof(VecI));
  }
  multiply_rows<Cell, kTileVectors>(
      keys, depth, k, q, [](int64_t, int) { return VecF{}; },
      [&](int64_t key, const auto& sums) {
        for (const auto& row : sums.at) {
          for (int j = 0; j < kTileVectors; ++j) {
            VecF score = row[j];
            if (kMasked) {
              score = limit[j] > static_cast<int32_t>(key) ? score : splat(-__builtin_inff());
            }
            top[j] = maximum(score, top[j]);
            store(scores + key * kPanel + j * kLanes, score);
          }
          ++key;
        }
      });
  for (int j = 0; j < kTileVectors; ++j) tops[j] = top[j];
}

// Packs two rows of numbers (queries along the lanes) into one row of cells.
inline VecF to_cells(Single, VecF first, VecF) { return first; }
#if defined(__AVX512BF16__)
inline VecF to_cells(Pair, VecF first, VecF second) {
  typedef uint16_t Halves __attribute__((vector_size(64)));
  const __m512bh packed = _mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  Halves order;
  for (int i = 0; i < 32; ++i) order[i] = static_cast<uint16_t>(i / 2 + i % 2 * 16);
  return (VecF)_mm512_permutexvar_epi16((__m512i)order, (__m512i)packed);
}
#endif

// The rounding error of a shift below this is at most 2^-12, and multiplies every p of a tile by
// the same number. Beyond it tiles would be weighted wrongly; from 2^31 on the error can exceed the
// range of 2^x.
constexpr float kExactShift = 8192.0f;

// Lanes whose shift reaches kExactShift or is NaN.
inline VecI huge_lanes(VecF shift) {
  return ~((shift < splat(kExactShift)) & (shift > splat(-kExactShift)));
}

// Whether a shift of `count` vectors reaches kExactShift or is NaN.
inline bool is_huge(const VecF* shifts, int count) {
  VecI huge = {};
  for (int j = 0; j < count; ++j) huge |= huge_lanes(shifts[j]);
  int32_t any = 0;
  for (int i = 0; i < kLanes; ++i) any |= huge[i];
  return any != 0;
}

// Subtracts huge peaks from their scores first, which is exact where it matters, and leaves no
// shifts for them. A query's result does not depend on the other queries of its tile.
template <int kTileVectors>
[[gnu::noinline, gnu::cold]] void subtract_peaks(float* scores, int64_t keys, const VecF* peaks,
                                                 VecF* shifts) {
  for (int j = 0; j < kTileVectors; ++j) {
    const VecI huge = huge_lanes(shifts[j]);
    const VecF peak = as_float(huge & as_int(peaks[j]));
    for (int64_t key = 0; key < keys; ++key) {
      float* at = scores + key * kPanel + j * kLanes;
      store(at, load(at) - peak);
    }
    shifts[j] = as_float(~huge & as_int(shifts[j]));
  }
}

// Replaces scores by probabilities p = 2^(factor * (s - peak)), packed as cells of P; sums receives
// their sums per lane. Zeros complete the last group.
template <class Cell, int kTileVectors>
inline void exponentials(float* scores, int64_t keys, float factor, const VecF* peaks, VecF* sums) {
  VecF shifts[kTileVectors], shift[kTileVectors], total[kTileVectors];
  for (int j = 0; j < kTileVectors; ++j) shifts[j] = peaks[j] * factor;
  if (is_huge(shifts, kTileVectors)) subtract_peaks<kTileVectors>(scores, keys, peaks, shifts);
  for (int j = 0; j < kTileVectors; ++j) {
    shift[j] = shifts[j];
    total[j] = VecF{};
  }
  const auto probability = [&](int64_t key, int j) {
    const VecF score = load(scores + key * kPanel + j * kLanes);
    return exp2_approx<Cell::kExpTerms>(score * factor - shift[j]);
  };
  int64_t key = 0;
  for (; key + Cell::kGroup <= keys; key += Cell::kGroup) {
    for (int j = 0; j < kTileVectors; ++j) {
      const VecF first = probability(key, j);
      const VecF second = Cell::kGroup == 2 ? probability(key + 1, j) : VecF{};
      total[j] += Cell::kGroup == 2 ? first + second : first;
      store(scores + key / Cell::kGroup * kPanel + j * kLanes, to_cells(Cell{}, first, second));
    }
  }
  if (key < keys) {
    for (int j = 0; j < kTileVectors; ++j) {
      const VecF first = probability(key, j);
      total[j] += first;
      store(scores + key / Cell::kGroup * kPanel + j * kLanes, to_cells(Cell{}, first, VecF{}));
    }
  }
  for (int j = 0; j < kTileVectors; ++j) sums[j] = total[j];
}

// Packs queries as the columns of one panel of B; lanes without a query are zero.
template <class Cell, class T, class Row>
inline void pack_columns(int64_t count, int64_t width, Row row, float* panel) {
  const int64_t cells = width / Cell::kGroup;
  for (int64_t lane = 0; lane < count; lane += kLanes) {
    const int64_t rows = min_of(kLanes, count - lane);
    for_vectors(cells, [&](int64_t cell, auto lanes) {
      // One vector of every row, transposed: column i becomes row cell + i of the panel.
      VecF block[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        block[i] = i < rows ? load_cells(Cell{}, row(lane + i), cell, lanes) : VecF{};
      }
      transpose(block);
      const int64_t columns = min_of(kLanes, cells - cell);
      for (int i = 0; i < columns; ++i) store(panel + (cell + i) * kPanel + lane, block[i]);
    });
  }
}

inline void negate_cells(Single, float* cells, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) store(cells + i, -load(cells + i));
}
#if defined(__AVX512BF16__)
inline void negate_cells(Pair, float* cells, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    store(cells + i, as_float(as_int(load(cells + i)) ^ static_cast<int32_t>(0x80008000)));
  }
}
#endif

// Packs queries as panels of B; `negate` changes their sign.
template <class Cell, class T, class Q>
inline void pack_queries(const QueryPanel* panels, int64_t num_panels, int64_t head_dim,
                         bool negate, Q q, ForwardScratch& s) {
  const int64_t panel_cells = head_dim / Cell::kGroup * kPanel;
  for (int64_t p = 0; p < num_panels; ++p) {
    float* packed = s.q + p * panel_cells;
    pack_columns<Cell, T>(
        panels[p].count, head_dim, [&](int64_t i) { return q(panels[p].begin + i); }, packed);
    if (negate) negate_cells(Cell{}, packed, panel_cells);
  }
}

// Packs keys [first, first + keys) as rows of A and their values as panels of B.
template <class Cell, class Row, class Rows>
inline void pack_tile(int64_t first, int64_t keys, int64_t head_dim, int64_t panel_rows, Rows rows,
                      ForwardScratch& s) {
  constexpr int kGroup = Cell::kGroup;
  const int64_t key_stride = cells_up<Cell>(head_dim);
  Row k[kMaxTileKeys<Cell>], v[kMaxTileKeys<Cell> + 1];
  rows(first, keys, k, v);
  v[keys] = Row{};  // the second value of an odd last group: zeros
  for (int64_t i = 0; i < keys; ++i) pack_row(Cell{}, k[i], head_dim, s.keys + i * key_stride);
  for (int64_t i = 0; i < keys; i += kGroup) {
    pack_panel_group(Cell{}, v[i], v[i + kGroup - 1], head_dim, s.values, panel_rows, i / kGroup);
  }
}

// Scores of the panel packed at q with the first `keys` keys of the tile that begins at `first`.
template <class Cell, int kTileVectors>
inline void score(const QueryPanel& panel, int64_t first, int64_t keys, int64_t head_dim,
                  const float* q, const int32_t* visible, ForwardScratch& s, VecF* tops) {
  const int64_t cells = head_dim / Cell::kGroup;
  const Operand tile{s.keys, cells_up<Cell>(head_dim), 1};
  if (first + keys <= panel.least) {
    score_tile<Cell, kTileVectors, false>(keys, cells, tile, q, nullptr, s.scores, tops);
    return;
  }
  // Lanes without a query see every key: their scores of zero stay finite.
  int32_t limits[kPanel];
  for (int64_t i = 0; i < kPanel; ++i) {
    limits[i] = i < panel.count ? visible[panel.begin + i] - static_cast<int32_t>(first)
                                : static_cast<int32_t>(keys);
  }
  score_tile<Cell, kTileVectors, true>(keys, cells, tile, q, limits, s.scores, tops);
}

// m' = max(m, tops) replaces tops and peak. shrink = 2^(factor * (m - m')) is the factor of earlier
// sums; the first tile has none.
template <int kTileVectors>
inline void rescale(bool is_first, float factor, VecF* tops, float* peak, float* shrink) {
  for (int j = 0; j < kTileVectors; ++j) {
    if (!is_first) {
      const VecF before = load(peak + j * kLanes);
      tops[j] = maximum(before, tops[j]);
      store(shrink + j * kLanes, exp2_approx<5>((before - tops[j]) * factor));
    }
    store(peak + j * kLanes, tops[j]);
  }
}

// l = l * shrink + the sums of this tile's p.
template <int kTileVectors>
inline void accumulate(bool is_first, VecF* totals, const float* shrink, float* sum) {
  for (int j = 0; j < kTileVectors; ++j) {
    if (!is_first) totals[j] += load(sum + j * kLanes) * load(shrink + j * kLanes);
    store(sum + j * kLanes, totals[j]);
  }
}

// out = o / l and lse of every query.
template <class T, class O>
inline void write_panels(const QueryPanel* panels, int64_t num_panels, int64_t head_dim,
                         float factor, O out, float* lse, const ForwardScratch& s) {
  for (int64_t p = 0; p < num_panels; ++p) {
    for (int64_t i = 0; i < panels[p].count; ++i) {
      const int64_t t = panels[p].begin + i, lane = p * kPanel + i;
      T* target = out(t);
      const float sum = s.sum[lane], share = 1.0f / sum;
      for_vectors(head_dim, [&](int64_t d, auto lanes) {
        store(target + d, load(s.out + lane * s.width_up + d) * share, lanes);
      });
      if (lse) lse[t] = s.peak[lane] * factor * kLn2 + static_cast<float>(__builtin_log(sum));
    }
  }
}

// Attention of num_panels panels of one head. q(t) is the row of query t; rows(s, count, k, v)
// writes the addresses of the rows of keys [s, s + count), as Row; out(t) is the address of query
// t's result; lse is the head's array over queries, or null. visible[t]: number of keys that query
// t sees, non-decreasing in t; read only if a panel's queries differ. tile_keys: from
// tile_keys_for, the same for every task of a head.
template <class T, class Row = const T*, class Q, class Rows, class O>
inline void attend_panels(const QueryPanel* panels, int64_t num_panels, int64_t head_dim,
                          int64_t tile_keys, float softmax_scale, const int32_t* visible, Q q,
                          Rows rows, O out, float* lse, ForwardScratch& s) {
  // Types and sizes
  using Cell = typename CellOf<T>::type;
  constexpr int kGroup = Cell::kGroup;
  const int64_t panel_rows = tile_keys / kGroup, panel_cells = head_dim / kGroup * kPanel;

  // Queries The maximum of scaled scores is the scaled maximum only for a positive factor, so the
  // sign is applied to q. A factor of zero would turn a masked -inf into NaN; the smallest normal
  // number replaces it.
  const float factor = max_of(__builtin_fabsf(softmax_scale) * kLog2E, __FLT_MIN__);
  pack_queries<Cell, T>(panels, num_panels, head_dim, softmax_scale < 0, q, s);

  // Tiles of keys
  const int64_t all_keys = panels[num_panels - 1].most;
  for (int64_t first = 0; first < all_keys; first += tile_keys) {
    const int64_t in_tile = min_of(tile_keys, all_keys - first);
    pack_tile<Cell, Row>(first, in_tile, head_dim, panel_rows, rows, s);
    for (int64_t p = 0; p < num_panels; ++p) {
      const QueryPanel& panel = panels[p];
      const int64_t keys = min_of(in_tile, panel.most - first);
      if (keys <= 0) continue;
      const bool is_first = first == 0;
      float shrink[kPanel];
      with_vectors(vectors_of(panel.count), [&](auto count) {
        constexpr int kTileVectors = decltype(count)::value;
        VecF tops[kTileVectors], totals[kTileVectors];
        score<Cell, kTileVectors>(panel, first, keys, head_dim, s.q + p * panel_cells, visible, s,
                                  tops);
        rescale<kTileVectors>(is_first, factor, tops, s.peak + p * kPanel, shrink);
        exponentials<Cell, kTileVectors>(s.scores, keys, factor, tops, totals);
        accumulate<kTileVectors>(is_first, totals, shrink, s.sum + p * kPanel);
      });
      multiply_add_panels<Cell>(panel.count, head_dim, (keys + kGroup - 1) / kGroup,
                                Operand{s.scores, 1, kPanel}, s.values, panel_rows, is_first,
                                shrink, s.out + p * kPanel * s.width_up, s.width_up);
    }
  }

  // Outputs
  write_panels<T>(panels, num_panels, head_dim, factor, out, lse, s);
}

// Panels of one task: as many as fit its memory, fewer if that gives less than two tasks per
// thread. Results do not depend on this number.
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
