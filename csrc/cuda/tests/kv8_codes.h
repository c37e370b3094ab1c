// A reference of the 8-bit format by its definition: every number, and the nearest code of a
// number.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "check_cuda.h"

namespace variant::test {

// Values of the codes 0 to 0x7e, ascending; 0x7f is NaN.
inline const std::vector<double>& e4m3_magnitudes() {
  static const std::vector<double> all = [] {
    std::vector<double> numbers;
    for (int code = 0; code < 0x7f; ++code) {
      const int exponent = code >> 3, mantissa = code & 7;
      numbers.push_back(exponent ? std::ldexp(8 + mantissa, exponent - 10)
                                 : std::ldexp(mantissa, -9));
    }
    return numbers;
  }();
  return all;
}

inline double exact_value(uint8_t code) {
  if ((code & 0x7f) == 0x7f) return NAN;
  const double magnitude = e4m3_magnitudes()[code & 0x7f];
  return code & 0x80 ? -magnitude : magnitude;
}
inline double exact_scale(uint8_t scale) { return std::ldexp(1.0, scale - 127); }

// Ties go to the even code.
inline uint8_t exact_code(double x) {
  const std::vector<double>& all = e4m3_magnitudes();
  int best = 0;
  for (int i = 1; i < static_cast<int>(all.size()); ++i) {
    const double now = std::fabs(std::fabs(x) - all[i]),
                 before = std::fabs(std::fabs(x) - all[best]);
    if (now < before || (now == before && i % 2 == 0)) best = i;
  }
  return static_cast<uint8_t>(best | (std::signbit(x) ? 0x80 : 0));
}

// Scale of a row with this largest magnitude.
inline uint8_t exact_row_scale(double largest) {
  int scale = 1;
  while (largest > 448 * exact_scale(static_cast<uint8_t>(scale))) ++scale;
  return static_cast<uint8_t>(scale);
}

}  // namespace variant::test
