// Tools for tests: CHECK, tensors allocated with their exact size, and seeded random numbers.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "../cpu/isa.h"

#define CHECK(condition, ...)                                              \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::fprintf(stderr, __VA_ARGS__);                                   \
      std::fprintf(stderr, "\n");                                          \
      std::exit(1);                                                        \
    }                                                                      \
  } while (0)

namespace variant::test {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

inline float bf16_to_float(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

inline uint16_t float_to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (std::isnan(value)) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline double fp16_to_double(uint16_t bits) {
  const int exponent = bits >> 10 & 0x1f, fraction = bits & 0x3ff;
  double value =
      exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(fraction + 1024, exponent - 25);
  if (exponent == 31) value = fraction ? kNaN : std::numeric_limits<double>::infinity();
  return bits >> 15 ? -value : value;
}

// Rounds to nearest, ties to even.
inline uint16_t double_to_fp16(double value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isnan(value)) return sign | 0x7e00;
  const double magnitude = std::fabs(value);
  if (magnitude >= 65520) return sign | 0x7c00;
  const int exponent = std::max(-14, magnitude > 0 ? std::ilogb(magnitude) : -14);
  // Units of the last place; 1024 and more carry into the exponent's field.
  const int units = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  return static_cast<uint16_t>(sign | (((exponent + 14) << 10) + units));
}

// A flat tensor of any dtype; elements read as double.
class Values {
 public:
  Values(DType dtype, int64_t count, double fill = kNaN) : dtype_(dtype) {
    if (dtype == DType::kFloat32) {
      wide_.resize(count);
    } else {
      narrow_.resize(count);
    }
    for (int64_t i = 0; i < count; ++i) set(i, fill);
  }
  static Values random(DType dtype, int64_t count, std::mt19937& engine, double spread = 1.0) {
    Values values(dtype, count);
    std::normal_distribution<double> normal(0.0, spread);
    for (int64_t i = 0; i < count; ++i) values.set(i, normal(engine));
    return values;
  }
  double operator[](int64_t i) const {
    if (dtype_ == DType::kFloat32) return wide_[i];
    return dtype_ == DType::kFloat16 ? fp16_to_double(narrow_[i]) : bf16_to_float(narrow_[i]);
  }
  void set(int64_t i, double value) {
    if (dtype_ == DType::kFloat32) {
      wide_[i] = static_cast<float>(value);
    } else if (dtype_ == DType::kFloat16) {
      narrow_[i] = double_to_fp16(value);
    } else {
      narrow_[i] = float_to_bf16(static_cast<float>(value));
    }
  }
  void* data() {
    return dtype_ == DType::kFloat32 ? static_cast<void*>(wide_.data())
                                     : static_cast<void*>(narrow_.data());
  }
  int64_t size() const { return static_cast<int64_t>(wide_.size() + narrow_.size()); }
  DType dtype() const { return dtype_; }
  const char* name() const {
    if (dtype_ == DType::kFloat32) return "float32";
    return dtype_ == DType::kFloat16 ? "float16" : "bfloat16";
  }

 private:
  DType dtype_;
  std::vector<float> wide_;
  std::vector<uint16_t> narrow_;
};

// The rounding of the dtype, with a margin for the order of sums.
inline double tolerance(DType dtype) {
  if (dtype == DType::kFloat32) return 2e-5;
  return dtype == DType::kFloat16 ? 1e-3 : 1.2e-2;
}

// Largest difference relative to the largest expected value (at least `scale`).
inline void check_close(const char* isa, const char* what, const Values& got,
                        const std::vector<double>& expected, double scale = 1e-2) {
  CHECK(got.size() == static_cast<int64_t>(expected.size()), "%s: sizes differ", what);
  double largest = scale;
  for (double value : expected) largest = std::max(largest, std::fabs(value));
  for (size_t i = 0; i < expected.size(); ++i) {
    const double difference = std::fabs(got[static_cast<int64_t>(i)] - expected[i]);
    CHECK(difference <= tolerance(got.dtype()) * largest, "%s %s %s[%zu]: got %g, expected %g", isa,
          got.name(), what, i, got[static_cast<int64_t>(i)], expected[i]);
  }
}

template <class F>
void for_each_isa(F f) {
  int tested = 0;
  for (const Isa& isa : built_isas()) {
    if (!isa.supported()) {
      std::printf("skipped %s: this machine lacks it\n", isa.name);
      continue;
    }
    f(isa.name, *isa.table);
    ++tested;
  }
  CHECK(tested > 0, "no instruction set was tested");
}

}  // namespace variant::test
