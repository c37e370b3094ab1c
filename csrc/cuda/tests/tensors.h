// Tensors of the kernels' tests: allocated with their exact size, so that the sanitizers detect
// stray accesses, and filled with NaN before kernels write them.
#pragma once

#include <sys/mman.h>

#include <random>
#include <vector>

#include "../elements.cuh"
#include "check_cuda.h"

namespace variant::test {

using cuda::BF16;
using cuda::Half;
using cuda::narrow;
using cuda::widen;

template <class T>
const char* name_of();
template <>
inline const char* name_of<float>() {
  return "float32";
}
template <>
inline const char* name_of<BF16>() {
  return "bfloat16";
}
template <>
inline const char* name_of<Half>() {
  return "float16";
}

template <class T>
constexpr DType dtype_of() {
  if constexpr (sizeof(T) == 4) return DType::kFloat32;
  if constexpr (std::is_same_v<T, BF16>) return DType::kBFloat16;
  return DType::kFloat16;
}

// Half a unit in the last place of a number near 1, with a margin for the order of sums
// and for rounded intermediate results such as probabilities.
template <class T>
constexpr double tolerance_of() {
  if constexpr (sizeof(T) == 4) return 1e-5;
  if constexpr (std::is_same_v<T, BF16>) return 8e-3;
  return 1.5e-3;
}

template <class T>
std::vector<T> nans(int64_t count) {
  return std::vector<T>(count, narrow<T>(static_cast<float>(kNaN)));
}

template <class T>
std::vector<T> random_tensor(int64_t count, std::mt19937& engine, double spread = 1.0) {
  std::normal_distribution<float> normal(0.0f, static_cast<float>(spread));
  std::vector<T> values(count);
  for (T& x : values) x = narrow<T>(normal(engine));
  return values;
}

// A random tensor that starts `shift` elements after a 16-byte boundary.
template <class T>
struct Shifted {
  std::vector<T> memory;
  int64_t shift;

  Shifted(int64_t count, int64_t shift, std::mt19937& engine)
      : memory(random_tensor<T>(count + shift, engine)), shift(shift) {}
  const T* data() const { return memory.data() + shift; }
  double operator[](int64_t i) const { return widen(memory[shift + i]); }
};

// A tensor of zeros of which only the touched pages take memory, for rows that lie 4 GiB apart.
template <class T>
class SparseTensor {
 public:
  explicit SparseTensor(int64_t count) : bytes_(count * sizeof(T)) {
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    data_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, flags, -1, 0);
    CHECK(data_ != MAP_FAILED, "mmap of %zu bytes", bytes_);
  }
  ~SparseTensor() { munmap(data_, bytes_); }
  SparseTensor(const SparseTensor&) = delete;
  SparseTensor& operator=(const SparseTensor&) = delete;
  T* data() { return static_cast<T*>(data_); }

 private:
  size_t bytes_;
  void* data_;
};

// Elements of 16 bits between rows that a step of 32 bits cannot reach: it would reach 8 elements.
constexpr int64_t kFarStride = (int64_t{1} << 31) + 8;

// Largest difference relative to the largest expected value (at least `least`).
template <class T>
void compare(const char* what, const std::vector<T>& got, const std::vector<double>& expected,
             double times = 1.0, double least = 1e-2) {
  CHECK(got.size() == expected.size(), "%s: sizes differ", what);
  double largest = least;
  for (double value : expected) largest = std::max(largest, std::fabs(value));
  for (size_t i = 0; i < expected.size(); ++i) {
    const double difference = std::fabs(widen(got[i]) - expected[i]);
    CHECK(difference <= times * tolerance_of<T>() * largest, "%s %s[%zu]: got %g, expected %g",
          name_of<T>(), what, i, static_cast<double>(widen(got[i])), expected[i]);
  }
}

}  // namespace variant::test
