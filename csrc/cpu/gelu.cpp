// GELU with one exponential and one division an element.
#include "../include/gelu.h"

#include "parallel.h"
#include "row_pass.h"
#include "simd.h"

namespace variant::VARIANT_ISA_NAMESPACE {
namespace {

constexpr int64_t kElementsPerPiece = 8192;
// 2 sqrt(2 / pi), and that times 0.044715.
constexpr float kLinear = 1.5957691216057308f, kCubic = 0.0713548162726009f;
// Beyond this y is x or, below zero, less than 1e-36; powers of larger numbers overflow.
constexpr float kLargest = 32.0f;

// exp(-2 u)
inline VecF falling(VecF x) { return exp_approx(x * (x * x * -kCubic - kLinear)); }

// NaN stays NaN.
inline VecF within_reach(VecF x) {
  return x < -kLargest ? splat(-kLargest) : (x > kLargest ? splat(kLargest) : x);
}

inline VecF gelu(VecF x) {
  const VecF at = within_reach(x);
  return maximum(x, at) / (falling(at) + 1.0f);  // far below zero: not x, which has no bound
}

// With s = 1 / (1 + e), e = exp(-2 u):  dy/dx = s + x s (1 - s) 2 u',  1 - s = e s.
inline VecF gelu_grad(VecF grad, VecF x) {
  const VecF at = within_reach(x), e = falling(at), s = 1.0f / (e + 1.0f);
  return grad * s * (at * (e * s) * (at * at * (3 * kCubic) + kLinear) + 1.0f);
}

inline Pair gelu(Pair x) { return {gelu(x.a), gelu(x.b)}; }
inline Pair gelu_grad(Pair grad, Pair x) {
  return {gelu_grad(grad.a, x.a), gelu_grad(grad.b, x.b)};
}

// f(first element, number of elements) for every piece.
template <class F>
inline void for_pieces(int64_t count, int num_threads, const F& f) {
  const int64_t pieces = (count + kElementsPerPiece - 1) / kElementsPerPiece;
  parallel_for(threads_for(num_threads, count), pieces, [&](int64_t piece, int) {
    const int64_t begin = piece * kElementsPerPiece;
    f(begin, min_of(kElementsPerPiece, count - begin));
  });
}

template <class T>
void forward(const GeluForwardArgs& a) {
  for_pieces(a.count, a.num_threads, [&](int64_t begin, int64_t count) {
    const T* x = static_cast<const T*>(a.x) + begin;
    T* y = static_cast<T*>(a.y) + begin;
    for_pairs<typename OrderOf<T>::Type>(
        count, [&](int64_t i, auto lanes) { store(y + i, gelu(load(x + i, lanes)), lanes); });
  });
}

template <class T>
void backward(const GeluBackwardArgs& a) {
  for_pieces(a.count, a.num_threads, [&](int64_t begin, int64_t count) {
    const T* grad_y = static_cast<const T*>(a.grad_y) + begin;
    const T* x = static_cast<const T*>(a.x) + begin;
    T* grad_x = static_cast<T*>(a.grad_x) + begin;
    for_pairs<typename OrderOf<T>::Type>(count, [&](int64_t i, auto lanes) {
      store(grad_x + i, gelu_grad(load(grad_y + i, lanes), load(x + i, lanes)), lanes);
    });
  });
}

}  // namespace

void gelu_forward(const GeluForwardArgs& a) {
  a.dtype == DType::kFloat32 ? forward<float>(a) : forward<BF16>(a);
}
void gelu_backward(const GeluBackwardArgs& a) {
  a.dtype == DType::kFloat32 ? backward<float>(a) : backward<BF16>(a);
}

}  // namespace variant::VARIANT_ISA_NAMESPACE
