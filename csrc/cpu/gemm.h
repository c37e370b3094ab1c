// The register-tiled product under both attentions, and the packing that feeds it.
//
//   C[i, j] (+)= sum over k of A[i, k] * B[k, j]
//
// B is a panel: `depth` rows of kPanel float32, contiguous, so one panel stays in the first-level
// cache. A may be walked in either order (its two strides are free), so transposed products need no
// transposed copy: kRows scalars of A are broadcast against kVectors vectors of B.
// Every element of C is one chain of fused multiply-adds over k in order, whatever the tile it
// falls in: cutting rows differently never changes a bit.
#pragma once

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

struct Operand {
  const float* data;
  int64_t row_stride, depth_stride;
};

template <int kTileRows, int kTileVectors, bool kAccumulate>
inline void multiply_tile(int64_t depth, const float* a, int64_t row_stride, int64_t depth_stride,
                          const float* b, float* c, int64_t c_stride) {
  VecF sums[kTileRows][kTileVectors];
  for (int i = 0; i < kTileRows; ++i) {
    for (int j = 0; j < kTileVectors; ++j) {
      sums[i][j] = kAccumulate ? load(c + i * c_stride + j * kLanes) : VecF{};
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    VecF columns[kTileVectors];
    for (int j = 0; j < kTileVectors; ++j) columns[j] = load(b + k * kPanel + j * kLanes);
    for (int i = 0; i < kTileRows; ++i) {
      const VecF scalar = splat(a[i * row_stride + k * depth_stride]);
      for (int j = 0; j < kTileVectors; ++j) sums[i][j] += scalar * columns[j];
    }
  }
  for (int i = 0; i < kTileRows; ++i) {
    for (int j = 0; j < kTileVectors; ++j) store(c + i * c_stride + j * kLanes, sums[i][j]);
  }
}

template <int kTileVectors, bool kAccumulate>
inline void multiply_rows(int64_t rows, int64_t depth, Operand a, const float* b, float* c,
                          int64_t c_stride) {
  int64_t i = 0;
  const auto tile = [&](auto tile_rows) {
    multiply_tile<decltype(tile_rows)::value, kTileVectors, kAccumulate>(
        depth, a.data + i * a.row_stride, a.row_stride, a.depth_stride, b, c + i * c_stride,
        c_stride);
    i += decltype(tile_rows)::value;
  };
  while (rows - i >= kRows) tile(Count<kRows>{});
  switch (rows - i) {
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

// C has `rows` rows of `vectors` vectors (1..kVectors); B is one panel.
template <bool kAccumulate>
inline void multiply(int64_t rows, int vectors, int64_t depth, Operand a, const float* b, float* c,
                     int64_t c_stride) {
  switch (vectors) {
    case 1:
      return multiply_rows<1, kAccumulate>(rows, depth, a, b, c, c_stride);
    case 2:
      return multiply_rows<2, kAccumulate>(rows, depth, a, b, c, c_stride);
#if defined(__AVX512F__)
    case 3:
      return multiply_rows<3, kAccumulate>(rows, depth, a, b, c, c_stride);
    case 4:
      return multiply_rows<4, kAccumulate>(rows, depth, a, b, c, c_stride);
#endif
  }
}

// As multiply, for a B of several panels side by side (`width` columns in all, panel after panel,
// each of `panel_rows` rows).
template <bool kAccumulate>
inline void multiply_panels(int64_t rows, int64_t width, int64_t depth, Operand a, const float* b,
                            int64_t panel_rows, float* c, int64_t c_stride) {
  for (int64_t column = 0; column < width; column += kPanel) {
    const int64_t left = (width - column + kLanes - 1) / kLanes;
    multiply<kAccumulate>(rows, static_cast<int>(left < kVectors ? left : kVectors), depth, a,
                          b + column * panel_rows, c + column, c_stride);
  }
}

// Row i of the source, as float32 times factor, into out + i * out_stride; `width` rounded up to
// whole vectors is written, zero past the width.
template <class T>
inline void pack_row(const T* source, int64_t width, float factor, float* out) {
  for_vectors(width,
              [&](int64_t d, auto lanes) { store(out + d, load(source + d, lanes) * factor); });
}

// The same row into panels of kPanel columns: column d goes to panel d / kPanel, row i.
template <class T>
inline void pack_panel_row(const T* source, int64_t width, float factor, float* panels,
                           int64_t panel_rows, int64_t i) {
  for_vectors(width, [&](int64_t d, auto lanes) {
    store(panels + d / kPanel * kPanel * panel_rows + i * kPanel + d % kPanel,
          load(source + d, lanes) * factor);
  });
}

// The same row as a column: element d goes to out[d * kPanel].
template <class T>
inline void pack_column(const T* source, int64_t width, float factor, float* out) {
  for (int64_t d = 0; d < width; ++d) out[d * kPanel] = to_float(source[d]) * factor;
}

}  // namespace
}  // namespace variant::VARIANT_ISA_NAMESPACE
