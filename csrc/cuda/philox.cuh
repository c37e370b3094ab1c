// Philox4x32-10 (Salmon et al., SC 2011): the same numbers as the CPU kernels draw.
#pragma once

#include <cstdint>

#include "primitives.h"

namespace variant::cuda {

// In [0, 1): the first 53 bits of the block keyed by (seed, image, position).
__device__ inline double philox_uniform(uint64_t seed, uint64_t image, uint32_t position) {
  uint32_t c0 = position, c1 = 0;
  uint32_t c2 = static_cast<uint32_t>(image), c3 = static_cast<uint32_t>(image >> 32);
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t n0 = __umulhi(0xCD9E8D57u, c2) ^ c1 ^ k0;
    const uint32_t n2 = __umulhi(0xD2511F53u, c0) ^ c3 ^ k1;
    c1 = 0xCD9E8D57u * c2;
    c3 = 0xD2511F53u * c0;
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const uint64_t bits = (static_cast<uint64_t>(c0 >> 5) << 26) + (c1 >> 6);
  return static_cast<double>(bits) * 0x1p-53;
}

}  // namespace variant::cuda
