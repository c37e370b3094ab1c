// ldmatrix and mma by their documented layouts, against element addresses and a plain product.
#include <random>
#include <vector>

#include "../launch.h"
#include "../primitives.h"
#include "check_cuda.h"

using namespace variant;

namespace {

// Four 8x8 matrices of distinct elements; matrix m, row r, column c holds 64m + 8r + c.
constexpr unsigned kPitch = 24;  // elements between rows: rows must not need to be adjacent

template <bool kTranspose, int kCount>
__global__ void load_kernel(uint16_t* out) {
  uint16_t* tile = dynamic_shared<uint16_t>();
  for (unsigned i = threadIdx.x; i < 256; i += 32) tile[i / 8 * kPitch + i % 8] = i;
  __syncwarp();
  const uint16_t* row = tile + threadIdx.x % (8 * kCount) * kPitch;
  uint32_t r[kCount];
  if constexpr (kCount == 1) kTranspose ? ldmatrix_x1_trans(r, row) : ldmatrix_x1(r, row);
  if constexpr (kCount == 2) kTranspose ? ldmatrix_x2_trans(r, row) : ldmatrix_x2(r, row);
  if constexpr (kCount == 4) kTranspose ? ldmatrix_x4_trans(r, row) : ldmatrix_x4(r, row);
  for (int i = 0; i < kCount; ++i) {
    out[(threadIdx.x * kCount + i) * 2] = static_cast<uint16_t>(r[i]);
    out[(threadIdx.x * kCount + i) * 2 + 1] = static_cast<uint16_t>(r[i] >> 16);
  }
}

template <bool kTranspose, int kCount>
void test_ldmatrix_gives_each_lane_its_documented_elements() {
  std::vector<uint16_t> out(32 * kCount * 2);
  launch(load_kernel<kTranspose, kCount>, 1, 32, 32 * kPitch * 2, nullptr, out.data());
  for (int lane = 0; lane < 32; ++lane) {
    for (int m = 0; m < kCount; ++m) {
      for (int j = 0; j < 2; ++j) {
        const int along = lane % 4 * 2 + j, across = lane / 4;
        const int want = 64 * m + (kTranspose ? 8 * along + across : 8 * across + along);
        CHECK(out[(lane * kCount + m) * 2 + j] == want, "x%d lane %d: %d, not %d", kCount, lane,
              out[(lane * kCount + m) * 2 + j], want);
      }
    }
  }
}

// d = a b + c through ldmatrix: a (16, 16) as it lies; b (16, 8) lies with k in rows, so its
// fragments are loaded transposed.
template <class T>
__global__ void product_kernel(const T* a, const T* b, const float* c, float* d) {
  T* a_tile = dynamic_shared<T>();
  T* b_tile = a_tile + 256;
  for (unsigned i = threadIdx.x; i < 256; i += 32) a_tile[i] = a[i];
  for (unsigned i = threadIdx.x; i < 128; i += 32) b_tile[i] = b[i];
  __syncwarp();
  uint32_t a_fragment[4], b_fragment[2];
  ldmatrix_x4(a_fragment, a_tile + threadIdx.x % 16 * 16 + threadIdx.x / 16 * 8);
  ldmatrix_x2_trans(b_fragment, b_tile + threadIdx.x % 16 * 8);
  float sum[4];
  const unsigned g = threadIdx.x / 4, t = threadIdx.x % 4;
  for (unsigned r = 0; r < 4; ++r) sum[r] = c[(g + r / 2 * 8) * 8 + 2 * t + r % 2];
  mma_m16n8k16<T>(sum, a_fragment, b_fragment);
  for (unsigned r = 0; r < 4; ++r) d[(g + r / 2 * 8) * 8 + 2 * t + r % 2] = sum[r];
}

template <class T>
void test_mma_equals_the_plain_product(std::mt19937& engine) {
  std::normal_distribution<float> normal;
  std::vector<T> a(256), b(128);
  std::vector<float> c(128), d(128);
  for (T& x : a) x = normal(engine);
  for (T& x : b) x = normal(engine);
  for (float& x : c) x = normal(engine);
  launch(product_kernel<T>, 1, 32, (256 + 128) * 2, nullptr, a.data(), b.data(), c.data(),
         d.data());
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 8; ++j) {
      double want = c[i * 8 + j];
      for (int k = 0; k < 16; ++k) want += double{float(a[i * 16 + k])} * float(b[k * 8 + j]);
      CHECK(std::fabs(d[i * 8 + j] - want) <= 1e-6 * (1 + std::fabs(want)), "(%d, %d): %g, not %g",
            i, j, d[i * 8 + j], want);
    }
  }
}

}  // namespace

int main() {
  std::mt19937 engine(5);
  test_ldmatrix_gives_each_lane_its_documented_elements<false, 1>();
  test_ldmatrix_gives_each_lane_its_documented_elements<false, 2>();
  test_ldmatrix_gives_each_lane_its_documented_elements<false, 4>();
  test_ldmatrix_gives_each_lane_its_documented_elements<true, 1>();
  test_ldmatrix_gives_each_lane_its_documented_elements<true, 2>();
  test_ldmatrix_gives_each_lane_its_documented_elements<true, 4>();
  test_mma_equals_the_plain_product<__half>(engine);
  test_mma_equals_the_plain_product<__nv_bfloat16>(engine);
}
