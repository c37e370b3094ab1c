// Adaptive layer norm: rows of C elements, read once from memory and kept in cache between passes.
#include "../include/adaln.h"

#include "parallel.h"
#include "row_pass.h"
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

// Mean and variance of a row in one pass: get(column, lanes) is called once for every vector.
// Blocks of eight vectors stay in registers for their own two passes; blocks, then lanes, then the
// rest of the row are combined as Chan, Golub and LeVeque do (Stanford STAN-CS-79-773). The form
// E[x^2] - E[x]^2 would cancel where the mean is large.
template <class Order, class Get>
inline Statistics row_statistics(int64_t width, float eps, const Get& get) {
  constexpr int64_t kBlock = 8 * kLanes;
  const int64_t blocks = width / kBlock, whole = blocks * kBlock;
  Pair mean = {}, squares = {};  // of every lane; the squares around its mean
  for (int64_t i = 0; i < blocks; ++i) {
    Pair x[4];
    for (int j = 0; j < 4; ++j) x[j] = get(i * kBlock + j * 2 * kLanes, Both<Order>{});
    const Pair block_mean = ((x[0] + x[1]) + (x[2] + x[3])) * 0.25f;
    for (int j = 0; j < 4; ++j) {
      const Pair centred = x[j] - block_mean;
      squares = squares + centred * centred;
    }
    const Pair delta = block_mean - mean;
    const float share = 1.0f / static_cast<float>(i + 1);
    mean = mean + delta * share;
    squares = squares + delta * delta * (4.0f * static_cast<float>(i) * share);
  }
  float row_mean = total(mean) / (2 * kLanes);
  const Pair apart = mean - row_mean;
  float row_squares = total(squares) + 4.0f * static_cast<float>(blocks) * total(apart * apart);
  if (whole < width) {
    float rest[kBlock];
    for_pairs<Order>(width - whole,
                     [&](int64_t c, auto lanes) { store(rest + c, get(whole + c, lanes), lanes); });
    Pair sum = {}, rest_squares = {};
    for_pairs<InOrder>(width - whole,
                       [&](int64_t c, auto lanes) { accumulate(sum, load(rest + c, lanes)); });
    const float count = static_cast<float>(width - whole), n = static_cast<float>(width);
    const float rest_mean = total(sum) / count;
    for_pairs<InOrder>(width - whole, [&](int64_t c, auto lanes) {
      const auto centred = zero_beyond(load(rest + c, lanes) - rest_mean, lanes);
      accumulate(rest_squares, centred * centred);
    });
    const float delta = rest_mean - row_mean;
    row_mean += delta * (count / n);
    row_squares += total(rest_squares) + delta * delta * (count / n) * static_cast<float>(whole);
  }
  return {row_mean, 1.0f / __builtin_sqrtf(row_squares / static_cast<float>(width) + eps)};
}

// One thread's memory: a row between its passes, and the current image's modulation rows as
// float32.
struct RowScratch {
  void* row;
  float *gain, *shift;

  static int64_t count(int64_t width) { return 3 * round_up(width, 16); }
  RowScratch(float* at, int64_t width) {
    const int64_t n = round_up(width, 16);
    row = at;
    gain = at + n;
    shift = at + 2 * n;
  }
};

// gain = 1 + scale, and shift, as float32 in the order of the passes.
template <class Order, class T>
inline void widen_modulation(const T* scale, const T* shift, int64_t width, const RowScratch& s) {
  for_pairs<Order>(width, [&](int64_t c, auto lanes) {
    store(s.gain + c, 1.0f + load(scale + c, lanes), lanes);
    store(s.shift + c, load(shift + c, lanes), lanes);
  });
}

// y = xhat * gain + shift. fetch(column) prefetches the next row.
template <class Order, bool kStream, class TX, class T, class Fetch>
inline void modulate_row(const TX* x, Statistics stats, const RowScratch& s, int64_t width, T* y,
                         const Fetch& fetch) {
  for_pairs<Order>(width, [&](int64_t c, auto lanes) {
    fetch(c);
    const auto xhat = (load(x + c, lanes) - stats.mean) * stats.rstd;
    put<kStream>(y + c, xhat * load(s.gain + c, lanes) + load(s.shift + c, lanes), lanes);
  });
}

// Calls f(row, b, t, next row of this piece (the row itself if there is none), the thread's
// scratch).
template <class Order, class T, class Args, class F>
void for_rows(const Args& a, const F& f) {
  const int64_t num_rows = a.batch * a.tokens, per_thread = RowScratch::count(a.width);
  const int64_t pieces = (num_rows + kRowsPerPiece - 1) / kRowsPerPiece;
  const int64_t threads = min_of(pieces, threads_for(a.num_threads, num_rows * a.width));
  Scratch<float> scratch(threads * per_thread);
  parallel_for(static_cast<int>(threads), pieces, [&](int64_t piece, int thread) {
    const RowScratch memory(scratch.get() + thread * per_thread, a.width);
    const int64_t begin = piece * kRowsPerPiece, end = min_of(num_rows, begin + kRowsPerPiece);
    for (int64_t r = begin; r < end; ++r) {
      const int64_t b = r / a.tokens, t = r % a.tokens;
      if (r == begin || t == 0) {
        widen_modulation<Order>(row<T>(a.scale, b), row<T>(a.shift, b), a.width, memory);
      }
      f(r, b, t, min_of(r + 1, end - 1), memory);
    }
    end_streams();
  });
}

template <class TX, class T, bool kStream>
void forward_rows(const AdaLNForwardArgs& a) {
  using Order = typename OrderOf<TX>::Type;
  for_rows<Order, T>(a, [&](int64_t r, int64_t b, int64_t t, int64_t next, const RowScratch& s) {
    const TX* x = row<TX>(a.x, b, t);
    const TX* x_next = row<TX>(a.x, next / a.tokens, next % a.tokens);
    const Statistics stats = row_statistics<Order>(
        a.width, a.eps, [&](int64_t c, auto lanes) { return load(x + c, lanes); });
    modulate_row<Order, kStream>(x, stats, s, a.width, static_cast<T*>(a.y) + r * a.width,
                                 [&](int64_t c) { prefetch_pair(x_next + c); });
    a.mean[r] = stats.mean;
    a.rstd[r] = stats.rstd;
  });
}

template <class TX, class T>
void forward(const AdaLNForwardArgs& a) {
  streams(a.y, a.batch * a.tokens, a.width * static_cast<int64_t>(sizeof(T)))
      ? forward_rows<TX, T, true>(a)
      : forward_rows<TX, T, false>(a);
}

template <class TX, class T, bool kStream>
void gated_forward_rows(const GatedAdaLNForwardArgs& a) {
  using Order = typename OrderOf<TX>::Type;
  for_rows<Order, T>(a, [&](int64_t r, int64_t b, int64_t t, int64_t next, const RowScratch& s) {
    const TX* x = row<TX>(a.x, b, t);
    const T* y = row<T>(a.y, b, t);
    const T* gate = row<T>(a.gate, b);
    TX* x_out = static_cast<TX*>(a.x_out) + r * a.width;
    // A streamed row cannot be read back from cache.
    TX* x_sum = kStream ? static_cast<TX*>(s.row) : x_out;
    const Statistics stats = row_statistics<Order>(a.width, a.eps, [&](int64_t c, auto lanes) {
      const auto moved = load(x + c, lanes) + load(gate + c, lanes) * load(y + c, lanes);
      if constexpr (kStream) stream(x_out + c, moved, lanes);
      store(x_sum + c, moved, lanes);
      return rounded(x_out, moved, lanes);
    });
    const TX* x_next = row<TX>(a.x, next / a.tokens, next % a.tokens);
    const T* y_next = row<T>(a.y, next / a.tokens, next % a.tokens);
    modulate_row<Order, kStream>(x_sum, stats, s, a.width, static_cast<T*>(a.h) + r * a.width,
                                 [&](int64_t c) {
                                   prefetch_pair(x_next + c);
                                   prefetch_pair(y_next + c);
                                 });
    a.mean[r] = stats.mean;
    a.rstd[r] = stats.rstd;
  });
}

template <class TX, class T>
void gated_forward(const GatedAdaLNForwardArgs& a) {
  const int64_t num_rows = a.batch * a.tokens;
  const int64_t x_bytes = a.width * static_cast<int64_t>(sizeof(TX));
  const int64_t h_bytes = a.width * static_cast<int64_t>(sizeof(T));
  streams(a.x_out, num_rows, x_bytes) && streams(a.h, num_rows, h_bytes)
      ? gated_forward_rows<TX, T, true>(a)
      : gated_forward_rows<TX, T, false>(a);
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
