// ldmatrix and mma.sync by the fragment layouts of the PTX manual. With g = lane / 4, t = lane % 4:
// an 8x8 matrix gives lane (row g, columns 2t, 2t+1), transposed (rows 2t, 2t+1, column g).
#pragma once

#include <cstdint>
#include <cstring>
#include <string>

#include "half.h"
#include "scheduler.h"

namespace variant::emulation {

constexpr uint32_t kFullWarp = 0xffffffffu;

struct RowAddresses {
  const void* mine;
  const void* all[kWarp];
};

// Lane 8i + r passes the address of row r of matrix i. Every lane reads its own elements, so a
// barrier must order all lanes after the threads that wrote the rows.
template <int kCount, bool kTranspose>
void load_matrices(uint32_t (&fragment)[kCount], const void* row, Site site) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4);
  RowAddresses addresses{row, {}};
  const char* operation = kTranspose ? "ldmatrix.trans" : "ldmatrix";
  Scheduler::get().meet(
      operation, site, kFullWarp, &addresses, [](void* const* payloads, uint32_t) {
        const void* all[kWarp];
        for (unsigned i = 0; i < kWarp; ++i) all[i] = static_cast<RowAddresses*>(payloads[i])->mine;
        for (unsigned i = 0; i < kWarp; ++i) {
          std::memcpy(static_cast<RowAddresses*>(payloads[i])->all, all, sizeof(all));
        }
      });
  const unsigned lane = Scheduler::get().self().index % kWarp, g = lane / 4, t = lane % 4;
  for (int i = 0; i < kCount; ++i) {
    uint16_t pair[2];
    for (unsigned j = 0; j < 2; ++j) {
      const unsigned matrix_row = kTranspose ? 2 * t + j : g, column = kTranspose ? g : 2 * t + j;
      const void* address = addresses.all[8 * i + matrix_row];
      if (reinterpret_cast<uintptr_t>(address) % 16 != 0) {
        fault(std::string(operation) + ": row " + std::to_string(matrix_row) + " of matrix " +
              std::to_string(i) + " is not 16-byte aligned");
      }
      pair[j] = static_cast<const uint16_t*>(address)[column];
    }
    fragment[i] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
  }
}

template <class T>
float narrow_value(uint32_t packed, unsigned half_index);
template <>
inline float narrow_value<__half>(uint32_t packed, unsigned half_index) {
  return half_value(static_cast<uint16_t>(packed >> 16 * half_index));
}
template <>
inline float narrow_value<__nv_bfloat16>(uint32_t packed, unsigned half_index) {
  return bfloat16_value(static_cast<uint16_t>(packed >> 16 * half_index));
}

struct Fragments {
  const uint32_t* a;
  const uint32_t* b;
  float* d;
};

// d += a * b with a 16x16 (row major), b 16x8 (column major), d 16x8. Products are exact and summed
// in double, then rounded once: a GPU truncates products when it aligns them, so its error may be
// larger.
template <class T>
void multiply_accumulate(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site) {
  Fragments mine{a, b, d};
  Scheduler::get().meet(
      "mma.m16n8k16", site, kFullWarp, &mine, [](void* const* payloads, uint32_t) {
        float a[16][16], b[16][8];
        for (unsigned lane = 0; lane < kWarp; ++lane) {
          const Fragments& from = *static_cast<Fragments*>(payloads[lane]);
          const unsigned g = lane / 4, t = lane % 4;
          for (unsigned j = 0; j < 2; ++j) {
            for (unsigned r = 0; r < 4; ++r) {
              a[g + r % 2 * 8][2 * t + j + r / 2 * 8] = narrow_value<T>(from.a[r], j);
            }
            for (unsigned r = 0; r < 2; ++r)
              b[2 * t + j + 8 * r][g] = narrow_value<T>(from.b[r], j);
          }
        }
        for (unsigned lane = 0; lane < kWarp; ++lane) {
          float* to = static_cast<Fragments*>(payloads[lane])->d;
          for (unsigned r = 0; r < 4; ++r) {
            const unsigned row = lane / 4 + r / 2 * 8, column = lane % 4 * 2 + r % 2;
            double sum = 0;
            for (unsigned k = 0; k < 16; ++k) sum += double{a[row][k]} * b[k][column];
            to[r] = static_cast<float>(sum + to[r]);
          }
        }
      });
}

}  // namespace variant::emulation
