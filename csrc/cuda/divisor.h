// Division by a number that is known when the kernel is launched: a multiplication and a shift
// (Granlund and Montgomery, "Division by Invariant Integers using Multiplication", 1994).
#pragma once

#include "primitives.h"

namespace variant::cuda {

struct Divisor {
  uint32_t factor;
  int shift;

  // dividend / divisor, for dividends from 0 to 2^31 - 1.
  __device__ uint32_t quotient(int dividend) const {
    return __umulhi(2 * static_cast<uint32_t>(dividend), factor) >> shift;
  }
};

// With 2^(shift - 1) < divisor <= 2^shift the factor is 2^(31 + shift) / divisor, rounded down,
// plus 1: at most 2^32 - 1, and so near that no dividend below 2^31 gets another quotient.
inline Divisor divide_by(int divisor) {
  int shift = 0;
  while (int64_t{1} << shift < divisor) ++shift;
  const uint64_t power = uint64_t{1} << (31 + shift);
  return {static_cast<uint32_t>(power / static_cast<uint64_t>(divisor) + 1), shift};
}

}  // namespace variant::cuda
