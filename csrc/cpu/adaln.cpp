// Adaptive layer norm: rows of C elements, read once from memory and kept in cache between passes.
#include "../include/adaln.h"

#include "parallel.h"
#include "simd.h"

namespace variant::VARIANT_ISA_NAMESPACE {
namespace {

constexpr int64_t kRowsPerPiece = 16;
// Sums over tokens (the gradients of scale, shift and gate) are taken over tiles of this many
// tokens, then over the tiles in order.
constexpr int64_t kTokensPerTile = 64;

struct Statistics {
  float mean, rstd;
};

// Two passes: the one-pass form E[x^2] - E[x]^2 cancels when the mean is large.
template <class TX>
inline Statistics row_statistics(const TX* x, int64_t width, float eps) {
  VecF sum = {};
  for_vectors(width, [&](int64_t c, auto lanes) { sum += load(x + c, lanes); });
  const float mean = sum_lanes(sum) / static_cast<float>(width);
  VecF squares = {};
  for_vectors(width, [&](int64_t c, auto lanes) {
    const VecF centred = zero_beyond(load(x + c, lanes) - mean, lanes);
    squares += centred * centred;
  });
  const float variance = sum_lanes(squares) / static_cast<float>(width);
  return {mean, 1.0f / __builtin_sqrtf(variance + eps)};
}

template <class TX, class T>
inline void modulate_row(const TX* x, const T* scale, const T* shift, T* y, int64_t width,
                         Statistics stats) {
  for_vectors(width, [&](int64_t c, auto lanes) {
    const VecF xhat = (load(x + c, lanes) - stats.mean) * stats.rstd;
    store(y + c, xhat * (1.0f + load(scale + c, lanes)) + load(shift + c, lanes), lanes);
  });
}

template <class TX, class T>
void forward(const AdaLNForwardArgs& a) {
  const int64_t rows = a.batch * a.tokens;
  const int64_t pieces = (rows + kRowsPerPiece - 1) / kRowsPerPiece;
  parallel_for(threads_for(a.num_threads, rows * a.width), pieces, [&](int64_t piece, int) {
    const int64_t end = min_of(rows, (piece + 1) * kRowsPerPiece);
    for (int64_t r = piece * kRowsPerPiece; r < end; ++r) {
      const int64_t b = r / a.tokens, t = r % a.tokens;
      const TX* x = row<TX>(a.x, b, t);
      const Statistics stats = row_statistics(x, a.width, a.eps);
      modulate_row(x, row<T>(a.scale, b), row<T>(a.shift, b), static_cast<T*>(a.y) + r * a.width,
                   a.width, stats);
      a.mean[r] = stats.mean;
      a.rstd[r] = stats.rstd;
    }
  });
}

template <class TX, class T>
void gated_forward(const GatedAdaLNForwardArgs& a) {
  const int64_t rows = a.batch * a.tokens;
  const int64_t pieces = (rows + kRowsPerPiece - 1) / kRowsPerPiece;
  parallel_for(threads_for(a.num_threads, rows * a.width), pieces, [&](int64_t piece, int) {
    const int64_t end = min_of(rows, (piece + 1) * kRowsPerPiece);
    for (int64_t r = piece * kRowsPerPiece; r < end; ++r) {
      const int64_t b = r / a.tokens, t = r % a.tokens;
      const TX* x = row<TX>(a.x, b, t);
      const T* y = row<T>(a.y, b, t);
      const T* gate = row<T>(a.gate, b);
      TX* x_out = static_cast<TX*>(a.x_out) + r * a.width;
      for_vectors(a.width, [&](int64_t c, auto lanes) {
        store(x_out + c, load(x + c, lanes) + load(gate + c, lanes) * load(y + c, lanes), lanes);
      });
      const Statistics stats = row_statistics(x_out, a.width, a.eps);
      modulate_row(x_out, row<T>(a.scale, b), row<T>(a.shift, b),
                   static_cast<T*>(a.h) + r * a.width, a.width, stats);
      a.mean[r] = stats.mean;
      a.rstd[r] = stats.rstd;
    }
  });
}

// The gradient with respect to the normalised row's input:
//   g = grad_y * (1 + scale),  grad_x = rstd * (g - mean(g) - xhat * mean(g * xhat))
struct RowMeans {
  float g, g_xhat;
};

template <class TX, class T>
inline RowMeans row_means(const T* grad_y, const TX* x, const T* scale, int64_t width,
                          Statistics stats) {
  VecF sum_g = {}, sum_g_xhat = {};
  for_vectors(width, [&](int64_t c, auto lanes) {
    const VecF g = load(grad_y + c, lanes) * (1.0f + load(scale + c, lanes));
    sum_g += g;  // zero past the end, since grad_y loads as zero there
    sum_g_xhat += g * ((load(x + c, lanes) - stats.mean) * stats.rstd);
  });
  const float n = static_cast<float>(width);
  return {sum_lanes(sum_g) / n, sum_lanes(sum_g_xhat) / n};
}

// out[b, c] = sum over tiles of partial[b, tile, which, c]
template <class T>
void sum_tiles(const float* partial, int64_t batch, int64_t tiles, int kinds, int which,
               int64_t width, void* out) {
  for (int64_t b = 0; b < batch; ++b) {
    T* out_row = static_cast<T*>(out) + b * width;
    for_vectors(width, [&](int64_t c, auto lanes) {
      VecF sum = {};
      for (int64_t tile = 0; tile < tiles; ++tile) {
        sum += load(partial + ((b * tiles + tile) * kinds + which) * width + c, lanes);
      }
      store(out_row + c, sum, lanes);
    });
  }
}

template <class TX, class T>
void backward(const AdaLNBackwardArgs& a) {
  const int64_t tiles = (a.tokens + kTokensPerTile - 1) / kTokensPerTile;
  const int64_t width = a.width;
  Scratch<float> partial(a.batch * tiles * 2 * width);
  const int threads = threads_for(a.num_threads, a.batch * a.tokens * width);
  parallel_for(threads, a.batch * tiles, [&](int64_t piece, int) {
    const int64_t b = piece / tiles, tile = piece % tiles;
    const T* scale = row<T>(a.scale, b);
    float* sum_scale = partial.get() + piece * 2 * width;
    float* sum_shift = sum_scale + width;
    __builtin_memset(sum_scale, 0, sizeof(float) * 2 * width);
    const int64_t end = min_of(a.tokens, (tile + 1) * kTokensPerTile);
    for (int64_t t = tile * kTokensPerTile; t < end; ++t) {
      const int64_t r = b * a.tokens + t;
      const T* grad_y = row<T>(a.grad_y, b, t);
      const TX* x = row<TX>(a.x, b, t);
      TX* grad_x = static_cast<TX*>(a.grad_x) + r * width;
      const Statistics stats = {a.mean[r], a.rstd[r]};
      const RowMeans means = row_means(grad_y, x, scale, width, stats);
      for_vectors(width, [&](int64_t c, auto lanes) {
        const VecF gy = load(grad_y + c, lanes);
        const VecF xhat = (load(x + c, lanes) - stats.mean) * stats.rstd;
        const VecF g = gy * (1.0f + load(scale + c, lanes));
        store(grad_x + c, (g - means.g - xhat * means.g_xhat) * stats.rstd, lanes);
        store(sum_scale + c, load(sum_scale + c, lanes) + gy * xhat, lanes);
        store(sum_shift + c, load(sum_shift + c, lanes) + gy, lanes);
      });
    }
  });
  sum_tiles<T>(partial.get(), a.batch, tiles, 2, 0, width, a.grad_scale);
  sum_tiles<T>(partial.get(), a.batch, tiles, 2, 1, width, a.grad_shift);
}

// With total = grad_x_out + the gradient through the norm:
//   grad_x = total,  grad_y = gate * total,  grad_gate = sum over tokens of total * y
template <class TX, class T>
void gated_backward(const GatedAdaLNBackwardArgs& a) {
  const int64_t tiles = (a.tokens + kTokensPerTile - 1) / kTokensPerTile;
  const int64_t width = a.width;
  Scratch<float> partial(a.batch * tiles * 3 * width);
  const int threads = threads_for(a.num_threads, a.batch * a.tokens * width);
  parallel_for(threads, a.batch * tiles, [&](int64_t piece, int) {
    const int64_t b = piece / tiles, tile = piece % tiles;
    const T* scale = row<T>(a.scale, b);
    const T* gate = row<T>(a.gate, b);
    float* sum_scale = partial.get() + piece * 3 * width;
    float* sum_shift = sum_scale + width;
    float* sum_gate = sum_shift + width;
    __builtin_memset(sum_scale, 0, sizeof(float) * 3 * width);
    const int64_t end = min_of(a.tokens, (tile + 1) * kTokensPerTile);
    for (int64_t t = tile * kTokensPerTile; t < end; ++t) {
      const int64_t r = b * a.tokens + t;
      const T* grad_h = row<T>(a.grad_h, b, t);
      const TX* grad_x_out = row<TX>(a.grad_x_out, b, t);
      const TX* x_out = row<TX>(a.x_out, b, t);
      const T* y = row<T>(a.y, b, t);
      TX* grad_x = static_cast<TX*>(a.grad_x) + r * width;
      T* grad_y = static_cast<T*>(a.grad_y) + r * width;
      const Statistics stats = {a.mean[r], a.rstd[r]};
      const RowMeans means = row_means(grad_h, x_out, scale, width, stats);
      for_vectors(width, [&](int64_t c, auto lanes) {
        const VecF gh = load(grad_h + c, lanes);
        const VecF xhat = (load(x_out + c, lanes) - stats.mean) * stats.rstd;
        const VecF g = gh * (1.0f + load(scale + c, lanes));
        const VecF total =
            load(grad_x_out + c, lanes) + (g - means.g - xhat * means.g_xhat) * stats.rstd;
        store(grad_x + c, total, lanes);
        store(grad_y + c, load(gate + c, lanes) * total, lanes);
        store(sum_scale + c, load(sum_scale + c, lanes) + gh * xhat, lanes);
        store(sum_shift + c, load(sum_shift + c, lanes) + gh, lanes);
        store(sum_gate + c, load(sum_gate + c, lanes) + total * load(y + c, lanes), lanes);
      });
    }
  });
  sum_tiles<T>(partial.get(), a.batch, tiles, 3, 0, width, a.grad_scale);
  sum_tiles<T>(partial.get(), a.batch, tiles, 3, 1, width, a.grad_shift);
  sum_tiles<T>(partial.get(), a.batch, tiles, 3, 2, width, a.grad_gate);
}

// x is float32 or of the values' dtype, so three pairs of types are enough.
#define VARIANT_DISPATCH_PAIR(function, a)                       \
  (a).value_dtype == DType::kFloat32 ? function<float, float>(a) \
  : (a).x_dtype == DType::kFloat32   ? function<float, BF16>(a)  \
                                     : function<BF16, BF16>(a)

}  // namespace

void adaln_forward(const AdaLNForwardArgs& a) { VARIANT_DISPATCH_PAIR(forward, a); }
void adaln_backward(const AdaLNBackwardArgs& a) { VARIANT_DISPATCH_PAIR(backward, a); }
void gated_adaln_forward(const GatedAdaLNForwardArgs& a) {
  VARIANT_DISPATCH_PAIR(gated_forward, a);
}
void gated_adaln_backward(const GatedAdaLNBackwardArgs& a) {
  VARIANT_DISPATCH_PAIR(gated_backward, a);
}

}  // namespace variant::VARIANT_ISA_NAMESPACE
