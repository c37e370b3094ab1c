// fp8 e4m3: 4 exponent bits (bias 7), 3 mantissa bits, no infinity, NaN 0x7f, largest 448.
#pragma once

#include "half.h"

namespace variant::emulation {

// To nearest even; what lies beyond 448 becomes 448 (the conversion's `satfinite` mode).
inline uint8_t e4m3_bits(float value) {
  if (std::isnan(value)) return 0x7f;
  const double magnitude = std::fabs(static_cast<double>(value));
  uint32_t bits = 0x7e;
  if (magnitude < 448) {
    bits = round_magnitude<3, -6, 8>(magnitude);
    if (bits > 0x7e) bits = 0x7e;
  }
  return static_cast<uint8_t>((std::signbit(value) ? 0x80 : 0) | bits);
}

inline float e4m3_value(uint8_t bits) {
  const int exponent = bits >> 3 & 15, mantissa = bits & 7;
  float magnitude;
  if (exponent == 15 && mantissa == 7) {
    magnitude = NAN;
  } else if (exponent == 0) {
    magnitude = std::ldexp(static_cast<float>(mantissa), -9);
  } else {
    magnitude = std::ldexp(static_cast<float>(mantissa + 8), exponent - 10);
  }
  return bits & 0x80 ? -magnitude : magnitude;
}

}  // namespace variant::emulation
