// L2 norm of queries and keys: one short row per (token, head).
#include "../include/qk_norm.h"

#include "parallel.h"
#include "qk_norm_row.h"

namespace variant::VARIANT_ISA_NAMESPACE {
namespace {

constexpr int64_t kTokensPerPiece = 16;

template <class T, bool kStream>
void forward_rows(const QkNormForwardArgs& a) {
  const int64_t num_tokens = a.batch * a.tokens, width = a.head_dim;
  const int64_t pieces = (num_tokens + kTokensPerPiece - 1) / kTokensPerPiece;
  Scratch<float> factors(a.heads);
  query_factors(a.scale_mul, a.heads, factors.get());
  const int threads = threads_for(a.num_threads, num_tokens * a.heads * a.head_dim);
  parallel_for(threads, pieces, [&](int64_t piece, int) {
    const int64_t end = min_of(num_tokens, (piece + 1) * kTokensPerPiece);
    for (int64_t r = piece * kTokensPerPiece; r < end; ++r) {
      const int64_t b = r / a.tokens, t = r % a.tokens, out = r * a.heads * width;
      const int64_t next = min_of(r + 1, end - 1), nb = next / a.tokens, nt = next % a.tokens;
      normalise_heads<kStream>(Heads<const T>{row<T>(a.q, b, t, 0), a.q.head_stride},
                               Heads<T>{static_cast<T*>(a.q_out) + out, width},
                               row<T>(a.q, nb, nt, 0), a.heads, width, factors.get());
      normalise_heads<kStream>(Heads<const T>{row<T>(a.k, b, t, 0), a.k.head_stride},
                               Heads<T>{static_cast<T*>(a.k_out) + out, width},
                               row<T>(a.k, nb, nt, 0), a.heads, width, nullptr);
    }
    end_streams();
  });
}

template <class T>
void forward(const QkNormForwardArgs& a) {
  const int64_t num_rows = a.batch * a.tokens * a.heads;
  const int64_t row_bytes = a.head_dim * static_cast<int64_t>(sizeof(T));
  streams(a.q_out, num_rows, row_bytes) && streams(a.k_out, num_rows, row_bytes)
      ? forward_rows<T, true>(a)
      : forward_rows<T, false>(a);
}

// With u = x / |x|:  dx = factor / |x| * (g - u * (g . u)). Where the norm was clamped to eps the
// divisor is a constant:  dx = factor / eps * g. Returns g . (x / divisor). Unlike the forward pass
// this multiplies by the reciprocal in float32 too: a gradient has no length to keep.
template <class T>
inline float backward_row(const T* g, const T* x, T* dx, int64_t width, float factor) {
  using Order = typename OrderOf<T>::Type;
  if (width == 64) {
    // The most frequent width: both rows stay in registers.
    constexpr int kPairs = 64 / (2 * kLanes);
    Pair unit[kPairs], grad[kPairs], squares = {}, products = {};
    for (int i = 0; i < kPairs; ++i) {
      unit[i] = load(x + i * 2 * kLanes, Both<Order>{});
      squares = squares + unit[i] * unit[i];
    }
    const float norm = __builtin_sqrtf(total(squares)), inverse = 1.0f / divisor_of(norm);
    for (int i = 0; i < kPairs; ++i) {
      unit[i] = unit[i] * inverse;
      grad[i] = load(g + i * 2 * kLanes, Both<Order>{});
      products = products + grad[i] * unit[i];
    }
    const float dot = total(products), along = norm < kQkNormEps ? 0.0f : dot;
    for (int i = 0; i < kPairs; ++i) {
      store(dx + i * 2 * kLanes, (grad[i] - unit[i] * along) * (factor * inverse), Both<Order>{});
    }
    return dot;
  }
  const float norm = norm_of(x, width), inverse = 1.0f / divisor_of(norm);
  Pair products = {};
  for_pairs<Order>(width, [&](int64_t d, auto lanes) {
    accumulate(products, load(g + d, lanes) * (load(x + d, lanes) * inverse));
  });
  const float dot = total(products), along = norm < kQkNormEps ? 0.0f : dot;
  for_pairs<Order>(width, [&](int64_t d, auto lanes) {
    const auto unit = load(x + d, lanes) * inverse;
    store(dx + d, (load(g + d, lanes) - unit * along) * (factor * inverse), lanes);
  });
  return dot;
}

template <class T>
void backward(const QkNormBackwardArgs& a) {
  const int64_t num_tokens = a.batch * a.tokens;
  const int64_t pieces = (num_tokens + kTokensPerPiece - 1) / kTokensPerPiece;
  // The gradient of scale_mul is summed over the rows of a piece, then over pieces in order.
  Scratch<float> factors(a.heads);
  Scratch<float> partial(pieces * a.heads);
  query_factors(a.scale_mul, a.heads, factors.get());
  const int threads = threads_for(a.num_threads, num_tokens * a.heads * a.head_dim);
  parallel_for(threads, pieces, [&](int64_t piece, int) {
    const int64_t end = min_of(num_tokens, (piece + 1) * kTokensPerPiece);
    float* sums = partial.get() + piece * a.heads;
    for (int64_t h = 0; h < a.heads; ++h) sums[h] = 0.0f;
    for (int64_t r = piece * kTokensPerPiece; r < end; ++r) {
      const int64_t b = r / a.tokens, t = r % a.tokens;
      for (int64_t h = 0; h < a.heads; ++h) {
        const int64_t out = (r * a.heads + h) * a.head_dim;
        sums[h] += backward_row(row<T>(a.grad_q, b, t, h), row<T>(a.q, b, t, h),
                                static_cast<T*>(a.dq) + out, a.head_dim, factors.get()[h]);
        backward_row(row<T>(a.grad_k, b, t, h), row<T>(a.k, b, t, h), static_cast<T*>(a.dk) + out,
                     a.head_dim, 1.0f);
      }
    }
  });
  const float limit = static_cast<float>(kMaxLogScale);
  for (int64_t h = 0; h < a.heads; ++h) {
    double sum = 0;
    for (int64_t piece = 0; piece < pieces; ++piece) sum += partial.get()[piece * a.heads + h];
    // Past the limit the factor is constant.
    a.dscale_mul[h] = a.scale_mul[h] <= limit ? static_cast<float>(sum * factors.get()[h]) : 0.0f;
  }
}

}  // namespace

void qk_norm_forward(const QkNormForwardArgs& a) {
  a.dtype == DType::kFloat32 ? forward<float>(a) : forward<BF16>(a);
}
void qk_norm_backward(const QkNormBackwardArgs& a) {
  a.dtype == DType::kFloat32 ? backward<float>(a) : backward<BF16>(a);
}

}  // namespace variant::VARIANT_ISA_NAMESPACE
