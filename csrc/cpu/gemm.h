// The register-tiled product of both attention kernels, and the packing of its operands.
//
//   C[i, j] = sum over k of A[i, k] * B[k, j]
//
// Operands are made of cells of 32 bits: one float32, or (with bfloat16 dot products) two bfloat16
// that follow one another along k. B is a panel: `depth` rows of kPanel cells, contiguous, so one
// panel stays in the first-level cache. Both strides of A are free, so transposed products need no
// transposed copy. kRows cells of A are broadcast and multiplied with kVectors vectors of B. Sums
// are float32. Every element of C is one chain of multiply-adds over k in order, in every tile: the
// bits do not depend on how rows are split.
#pragma once

#include "parallel.h"
#include "simd.h"

namespace variant::VARIANT_ISA_NAMESPACE {
namespace {

#if defined(__AVX512F__)
constexpr int kRows = 6, kVectors = 4;  // 24 accumulators of 32 registers
#elif defined(__AVX2__)
constexpr int kRows = 6, kVectors = 2;  // 12 accumulators of 16 registers
#else
constexpr int kRows = 4, kVectors = 2;  // 8 accumulators of 16 registers
#endif
constexpr int kPanel = kVectors * kLanes;

// A cell of one float32.
struct Single {
  static constexpr int kGroup = 1;  // numbers along the reduction in one cell
  // 2^x for probabilities: relative error below 1e-7.
  static constexpr int kExpTerms = 5;
  static VecF multiply_add(VecF sum, VecF a, VecF b) { return sum + a * b; }
};

template <class T>
struct CellOf {
  typedef Single type;
};

#if defined(__AVX512BF16__)
// A cell of two bfloat16, the first in the low half. Denormal numbers count as zero.
struct Pair {
  static constexpr int kGroup = 2;
  // Probabilities are rounded to 8 significant bits, but their sum is not: an error below 3e-6.
  static constexpr int kExpTerms = 4;
  static VecF multiply_add(VecF sum, VecF a, VecF b) {
    return (VecF)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
};

template <>
struct CellOf<BF16> {
  typedef Pair type;
};
#endif

struct Operand {
  const float* data;  // cells
  int64_t row_stride, depth_stride;
};

// Cells of both kinds are stored as float*; copies must preserve their bits.
inline VecF broadcast_cell(const float* p) {
#if defined(__AVX512F__)
  int32_t bits;
  __builtin_memcpy(&bits, p, 4);
  return (VecF)_mm512_set1_epi32(bits);
#else
  return splat(*p);
#endif
}

template <int kTileRows, int kTileVectors>
struct Sums {
  static constexpr int kTileRowCount = kTileRows;
  VecF at[kTileRows][kTileVectors];
};

// Rows [row, row + kTileRows): begin(row, j) returns the initial sum of vector j of a row, end(row,
// sums) receives the results.
template <class Cell, int kTileRows, int kTileVectors, class Begin, class End>
inline void multiply_tile(int64_t row, int64_t depth, Operand a, const float* b, Begin begin,
                          End end) {
  Sums<kTileRows, kTileVectors> sums;
  for (int i = 0; i < kTileRows; ++i) {
    for (int j = 0; j < kTileVectors; ++j) sums.at[i][j] = begin(row + i, j);
  }
  const float* cells = a.data + row * a.row_stride;
  for (int64_t k = 0; k < depth; ++k) {
    VecF columns[kTileVectors];
    for (int j = 0; j < kTileVectors; ++j) columns[j] = load(b + k * kPanel + j * kLanes);
    for (int i = 0; i < kTileRows; ++i) {
      const VecF cell = broadcast_cell(cells + i * a.row_stride + k * a.depth_stride);
      for (int j = 0; j < kTileVectors; ++j) {
        sums.at[i][j] = Cell::multiply_add(sums.at[i][j], cell, columns[j]);
      }
    }
  }
  end(row, sums);
}

template <class Cell, int kTileVectors, class Begin, class End>
inline void multiply_rows(int64_t rows, int64_t depth, Operand a, const float* b, Begin begin,
                          End end) {
  int64_t row = 0;
  const auto tile = [&](auto tile_rows) {
    multiply_tile<Cell, decltype(tile_rows)::value, kTileVectors>(row, depth, a, b, begin, end);
    row += decltype(tile_rows)::value;
  };
  while (rows - row >= kRows) tile(Count<kRows>{});
  switch (rows - row) {
    case 5:
      return tile(Count<5>{});
    case 4:
      return tile(Count<4>{});
    case 3:
      return tile(Count<3>{});
    case 2:
      return tile(Count<2>{});
    case 1:
      return tile(Count<1>{});
  }
}

// f(Count<vectors>{}) for a number of vectors known at run time, 1..kVectors.
template <class F>
inline void with_vectors(int vectors, F f) {
  switch (vectors) {
    case 1:
      return f(Count<1>{});
    case 2:
      return f(Count<2>{});
#if defined(__AVX512F__)
    case 3:
      return f(Count<3>{});
    case 4:
      return f(Count<4>{});
#endif
  }
}

inline int vectors_of(int64_t lanes) { return static_cast<int>((lanes + kLanes - 1) / kLanes); }

// C = A B for one panel, C with rows of c_stride float32.
template <class Cell>
inline void multiply(int64_t rows, int vectors, int64_t depth, Operand a, const float* b, float* c,
                     int64_t c_stride) {
  with_vectors(vectors, [&](auto count) {
    multiply_rows<Cell, decltype(count)::value>(
        rows, depth, a, b, [](int64_t, int) { return VecF{}; },
        [=](int64_t row, const auto& sums) {
          for (const auto& vectors_of_row : sums.at) {
            for (int j = 0; j < decltype(count)::value; ++j) {
              store(c + row * c_stride + j * kLanes, vectors_of_row[j]);
            }
            ++row;
          }
        });
  });
}

// C = scale[row] * C + A B for a B of several panels side by side (`width` columns in all, panel
// after panel, each of `panel_rows` rows of cells). scale null: all ones. fresh: C is uninitialised
// and is overwritten.
template <class Cell>
inline void multiply_add_panels(int64_t rows, int64_t width, int64_t depth, Operand a,
                                const float* b, int64_t panel_rows, bool fresh, const float* scale,
                                float* c, int64_t c_stride) {
  for (int64_t column = 0; column < width; column += kPanel) {
    float* at = c + column;
    const float* panel = b + column * panel_rows;
    with_vectors(vectors_of(min_of(width - column, kPanel)), [&](auto count) {
      constexpr int kTileVectors = decltype(count)::value;
      // The previous C is added last: a sum over thousands of keys is a sum of a few partial sums,
      // and its rounding error grows with their number, not with the number of keys.
      const auto run = [&](auto held) {
        multiply_rows<Cell, kTileVectors>(
            rows, depth, a, panel, [](int64_t, int) { return VecF{}; },
            [=](int64_t row, const auto& sums) {
              for (const auto& vectors_of_row : sums.at) {
                for (int j = 0; j < kTileVectors; ++j) {
                  float* out = at + row * c_stride + j * kLanes;
                  store(out, held(row, out, vectors_of_row[j]));
                }
                ++row;
              }
            });
      };
      if (fresh) {
        run([](int64_t, const float*, VecF sum) { return sum; });
      } else if (scale) {
        run([=](int64_t row, const float* c, VecF sum) { return load(c) * scale[row] + sum; });
      } else {
        run([](int64_t, const float* c, VecF sum) { return load(c) + sum; });
      }
    });
  }
}

// Transposes a square block in four steps; each step doubles the distance of the exchanged pairs.
inline void transpose(VecF* rows) {
#if defined(__AVX512F__)
  __m512 a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    const __m512 first = (__m512)rows[i], second = (__m512)rows[i + 1];
    a[i] = _mm512_maskz_unpacklo_ps(kAllLanes, first, second);
    a[i + 1] = _mm512_maskz_unpackhi_ps(kAllLanes, first, second);
  }
  for (int i = 0; i < 16; i += 4) {
    b[i] = _mm512_maskz_shuffle_ps(kAllLanes, a[i], a[i + 2], 0x44);
    b[i + 1] = _mm512_maskz_shuffle_ps(kAllLanes, a[i], a[i + 2], 0xee);
    b[i + 2] = _mm512_maskz_shuffle_ps(kAllLanes, a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm512_maskz_shuffle_ps(kAllLanes, a[i + 1], a[i + 3], 0xee);
  }
  // b[4 g + c]: in quarter t, column 4 t + c of rows 4 g .. 4 g + 3.
  for (int c = 0; c < 4; ++c) {
    const __m512 low = _mm512_maskz_shuffle_f32x4(kAllLanes, b[c], b[4 + c], 0x88);
    const __m512 low_odd = _mm512_maskz_shuffle_f32x4(kAllLanes, b[c], b[4 + c], 0xdd);
    const __m512 high = _mm512_maskz_shuffle_f32x4(kAllLanes, b[8 + c], b[12 + c], 0x88);
    const __m512 high_odd = _mm512_maskz_shuffle_f32x4(kAllLanes, b[8 + c], b[12 + c], 0xdd);
    rows[c] = (VecF)_mm512_maskz_shuffle_f32x4(kAllLanes, low, high, 0x88);
    rows[4 + c] = (VecF)_mm512_maskz_shuffle_f32x4(kAllLanes, low_odd, high_odd, 0x88);
    rows[8 + c] = (VecF)_mm512_maskz_shuffle_f32x4(kAllLanes, low, high, 0xdd);
    rows[12 + c] = (VecF)_mm512_maskz_shuffle_f32x4(kAllLanes, low_odd, high_odd, 0xdd);
  }
#else
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < i; ++j) {
      const float swapped = rows[i][j];
      rows[i][j] = rows[j][i];
      rows[j][i] = swapped;
    }
  }
#endif
}

// Number of cells of `width` numbers along the reduction, rounded up to whole vectors.
template <class Cell>
inline int64_t cells_up(int64_t width) {
  return round_up(width / Cell::kGroup, kLanes);
}

// Packs one row of A: `width` numbers (even) along the reduction. Writes whole vectors, with zeros
// past the width. Row: const T*, or a type with the same load().
template <class Row>
inline void pack_row(Single, Row source, int64_t width, float* out) {
  for_vectors(width, [&](int64_t d, auto lanes) { store(out + d, load(source + d, lanes)); });
}

// Packs one row of B into row i of the cells of its panels.
template <class Row>
inline void pack_panel_group(Single, Row source, Row, int64_t width, float* panels,
                             int64_t panel_rows, int64_t i) {
  for_vectors(width, [&](int64_t d, auto lanes) {
    store(panels + d / kPanel * kPanel * panel_rows + i * kPanel + d % kPanel,
          load(source + d, lanes));
  });
}

// Cells [cell, cell + kLanes) of a row of numbers along the reduction.
template <class T, class Lanes>
inline VecF load_cells(Single, const T* source, int64_t cell, Lanes lanes) {
  return load(source + cell, lanes);
}

#if defined(__AVX512BF16__)
inline VecU load_bits(const BF16* p, Full = {}) {
  VecU16 x;
  __builtin_memcpy(&x, p, sizeof x);
  return widen_lanes(x);
}
inline VecU load_bits(const BF16* p, Tail tail) {
  return widen_lanes((VecU16)_mm256_maskz_loadu_epi16(lane_mask(tail), p));
}

inline VecF load_cells(Pair, const BF16* source, int64_t cell, Full) {
  VecF x;
  __builtin_memcpy(&x, source + 2 * cell, sizeof x);
  return x;
}
inline VecF load_cells(Pair, const BF16* source, int64_t cell, Tail tail) {
  return (VecF)_mm512_maskz_loadu_ps(lane_mask(tail), source + 2 * cell);
}

inline void pack_row(Pair, const BF16* source, int64_t width, float* out) {
  for_vectors(width / 2,
              [&](int64_t d, auto lanes) { store(out + d, load_cells(Pair{}, source, d, lanes)); });
}

// Packs two rows of B into row i of cells; a null second row counts as zeros.
inline void pack_panel_group(Pair, const BF16* first, const BF16* second, int64_t width,
                             float* panels, int64_t panel_rows, int64_t i) {
  for_vectors(width, [&](int64_t d, auto lanes) {
    VecU cells = load_bits(first + d, lanes);
    if (second) cells |= load_bits(second + d, lanes) << 16;
    store(panels + d / kPanel * kPanel * panel_rows + i * kPanel + d % kPanel,
          as_float((VecI)cells));
  });
}
#endif

}  // namespace
}  // namespace variant::VARIANT_ISA_NAMESPACE
