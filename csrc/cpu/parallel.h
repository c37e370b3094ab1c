// Threads and memory for one call. No result may depend on the number of threads: work is split
// into pieces of a size that does not depend on it, and every reduction lies within one piece.
#pragma once

#include <cstdint>

#ifdef VARIANT_STD_THREADS
#include <atomic>
#include <thread>
#include <vector>
#elif defined(_OPENMP)
#include <omp.h>
#endif

#include "kernels.h"

namespace variant::VARIANT_ISA_NAMESPACE {
namespace {

// f(piece, thread) for every piece; f must not throw. Threads take `chunk` pieces at a time; use
// more than one if a piece takes little longer than its scheduling.
//
// VARIANT_STD_THREADS: for ThreadSanitizer, which does not see the barriers of OpenMP's runtime.
// The pieces are the same, and the counter orders no memory access of theirs.
template <class F>
inline void parallel_for(int num_threads, int64_t pieces, const F& f, int64_t chunk = 1) {
#ifdef VARIANT_STD_THREADS
  const int threads = static_cast<int>(num_threads < pieces ? num_threads : pieces);
  if (threads > 1) {
    std::atomic<int64_t> next{0};
    const auto take_pieces = [&](int thread) {
      for (;;) {
        const int64_t begin = next.fetch_add(chunk, std::memory_order_relaxed);
        if (begin >= pieces) return;
        const int64_t end = begin + chunk < pieces ? begin + chunk : pieces;
        for (int64_t piece = begin; piece < end; ++piece) f(piece, thread);
      }
    };
    std::vector<std::thread> others;
    for (int thread = 1; thread < threads; ++thread) others.emplace_back(take_pieces, thread);
    take_pieces(0);
    for (std::thread& other : others) other.join();
    return;
  }
#elif defined(_OPENMP)
  const int threads = static_cast<int>(num_threads < pieces ? num_threads : pieces);
  if (threads > 1) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, chunk)
    for (int64_t piece = 0; piece < pieces; ++piece) f(piece, omp_get_thread_num());
    return;
  }
#endif
  for (int64_t piece = 0; piece < pieces; ++piece) f(piece, 0);
}

// Below this many elements a second thread costs more than it saves.
constexpr int64_t kMinParallelElements = 32768;

inline int threads_for(int num_threads, int64_t elements) {
  return elements < kMinParallelElements || num_threads < 1 ? 1 : num_threads;
}

template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(static_cast<T*>(allocate_scratch(count * static_cast<int64_t>(sizeof(T))))) {}
  ~Scratch() { release_scratch(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return data_; }

 private:
  T* data_;
};

inline int64_t round_up(int64_t x, int64_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}
inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
inline float max_of(float a, float b) { return a > b ? a : b; }

// Rows of the views.
template <class T>
inline const T* row(const RowView& view, int64_t b) {
  return static_cast<const T*>(view.data) + b * view.batch_stride;
}
template <class T>
inline const T* row(const TokenView& view, int64_t b, int64_t t) {
  return static_cast<const T*>(view.data) + b * view.batch_stride + t * view.token_stride;
}
template <class T>
inline const T* row(const HeadView& view, int64_t b, int64_t t, int64_t h) {
  return static_cast<const T*>(view.data) + b * view.batch_stride + t * view.token_stride +
         h * view.head_stride;
}

}  // namespace
}  // namespace variant::VARIANT_ISA_NAMESPACE
