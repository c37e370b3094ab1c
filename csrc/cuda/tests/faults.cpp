// One planted fault per function, chosen on the command line; CMakeLists.txt lists the report that
// each must produce. Faults that only compute a wrong value print "wrong result".
#include <cmath>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "../launch.h"
#include "../primitives.h"

using namespace variant;

namespace {

constexpr unsigned kFull = 0xffffffffu;

void expect(const std::vector<float>& got, float (*want)(int)) {
  for (size_t i = 0; i < got.size(); ++i) {
    if (got[i] != want(static_cast<int>(i))) {
      std::printf("wrong result: %s\n", std::isnan(got[i]) ? "nan" : "differs");
      std::exit(0);
    }
  }
}

// The kernel without the fault must be right; otherwise a wrong result would prove nothing.
void require(const std::vector<float>& got, float (*want)(int)) {
  for (size_t i = 0; i < got.size(); ++i) {
    if (got[i] != want(static_cast<int>(i))) {
      std::printf("the kernel is wrong even without the fault\n");
      std::exit(3);
    }
  }
}

// Tries several orders of threads, because not every order shows the fault.
void expect_in_every_order(int count, void (*run)(float*), float (*want)(int)) {
  for (uint64_t seed = 0; seed < 8; ++seed) {
    emulation::set_seed(seed);
    std::vector<float> x(count, -1.0f);
    run(x.data());
    expect(x, want);
  }
}

__global__ void divergent_barrier() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void early_return() {
  if (threadIdx.x == 7) return;
  __syncthreads();
}

__global__ void mask_lacks_caller() {
  if (threadIdx.x == 3) __any_sync(0xf7u, 1);
}

// Two lanes wait for each other with different masks.
__global__ void masks_differ() {
  if (threadIdx.x == 0) __any_sync(0x3u, 1);
  if (threadIdx.x == 1) __any_sync(0x7u, 1);
  if (threadIdx.x == 2) __any_sync(0x7u, 1);
  __syncwarp();
}

__global__ void operations_differ() {
  if (threadIdx.x % 2 == 0) {
    __any_sync(kFull, 1);
  } else {
    __all_sync(kFull, 1);
  }
}

__global__ void lane_has_returned() {
  if (threadIdx.x == 5) return;
  __shfl_sync(kFull, 1, 0);
}

__global__ void lane_beyond_the_block() { __ballot_sync(kFull, 1); }

__global__ void shuffle_from_outside() {
  if (threadIdx.x < 16) __shfl_sync(0xffffu, 1, 20);
}

__global__ void copies_under_way(const float* x) {
  cp_async_16(dynamic_shared<float>() + 4 * threadIdx.x, x + 4 * threadIdx.x);
  cp_async_commit();
}

__global__ void misaligned_copy(const float* x) {
  cp_async_16(dynamic_shared<float>(), x + 1);
  cp_async_wait<0>();
}

__global__ void nothing() {}

template <bool kWait>
__global__ void copy_through_shared_memory(const float* x, float* y) {
  float* shared = dynamic_shared<float>();
  cp_async_16(shared + 4 * threadIdx.x, x + 4 * threadIdx.x);
  cp_async_commit();
  if (kWait) cp_async_wait<0>();
  for (int i = 0; i < 4; ++i) y[4 * threadIdx.x + i] = shared[4 * threadIdx.x + i];
  cp_async_wait<0>();
}

// A product; the fault exchanges the two middle registers of the left fragment.
template <bool kRight>
__global__ void product(float* y) {
  const unsigned g = threadIdx.x / 4, t = threadIdx.x % 4;
  uint32_t a[4], b[2];
  for (unsigned r = 0; r < 4; ++r) {
    const unsigned part = kRight || r % 3 == 0 ? r : 3 - r;
    const unsigned row = g + part % 2 * 8, k = 2 * t + part / 2 * 8;
    a[r] = pack2<__half>(static_cast<float>(3 * row + k), static_cast<float>(3 * row + k + 1));
  }
  for (unsigned r = 0; r < 2; ++r) {
    const unsigned k = 2 * t + 8 * r;
    b[r] = pack2<__half>(static_cast<float>(k), static_cast<float>(k + 1));
  }
  float d[4] = {};
  mma_m16n8k16<__half>(d, a, b);
  for (unsigned r = 0; r < 4; ++r) y[(g + r / 2 * 8) * 8 + 2 * t + r % 2] = d[r];
}

__global__ void poisoned_shared_memory(float* y) {
  float* sum = dynamic_shared<float>();  // the fault: not set to zero
  atomicAdd(sum, 1.0f);
  __syncthreads();
  y[threadIdx.x] = *sum;
}

__global__ void trap() { __trap(); }

template <bool kBarrier>
__global__ void reverse(float* y) {
  float* shared = dynamic_shared<float>();
  shared[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (kBarrier) __syncthreads();
  y[threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
}

template <bool kBarrier>
__global__ void reverse_in_a_warp(float* y) {
  float* shared = dynamic_shared<float>();
  shared[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (kBarrier) __syncwarp();
  y[threadIdx.x] = shared[31 - threadIdx.x];
}

__global__ void shuffle_is_no_barrier(float* y) {
  float* shared = dynamic_shared<float>();
  shared[threadIdx.x] = static_cast<float>(threadIdx.x);
  __shfl_sync(kFull, 0, 0);
  y[threadIdx.x] = shared[31 - threadIdx.x];
}

// A tile is overwritten while others may still read it.
template <bool kBarrier>
__global__ void rotate_twice(float* y) {
  float* shared = dynamic_shared<float>();
  float value = static_cast<float>(threadIdx.x);
  for (int i = 0; i < 2; ++i) {
    shared[threadIdx.x] = value;
    __syncthreads();
    value = shared[(threadIdx.x + 1) % blockDim.x];
    if (kBarrier) __syncthreads();
  }
  y[threadIdx.x] = value;
}

__global__ void race_on_global_memory(float* y) { y[threadIdx.x / 2] += 1.0f; }

__global__ void off_by_one_page(const float* pages, const int* table, float* y) {
  const int page_size = 4;
  y[threadIdx.x] =
      pages[(table[threadIdx.x / page_size] + 1) * page_size + threadIdx.x % page_size];
}

__global__ void past_dynamic_shared_memory() {
  dynamic_shared<float>()[threadIdx.x + 1] = 1.0f;
  __syncthreads();
}

__global__ void past_static_shared_memory(int shift) {
  __shared__ float values[32];
  values[threadIdx.x + shift] = 1.0f;
  __syncthreads();
  if (values[0] != 1.0f) __trap();
}

__global__ void misaligned_vector(const float* x, float* y) {
  y[0] = reinterpret_cast<const float4*>(x + 1)->x;
}

float index_of(int i) { return static_cast<float>(i); }
float one(int) { return 1.0f; }
float thirty_two(int) { return 32.0f; }
float reversed_64(int i) { return static_cast<float>(63 - i); }
float reversed_32(int i) { return static_cast<float>(31 - i); }
float product_of(int i) {
  float sum = 0;
  for (int k = 0; k < 16; ++k) sum += static_cast<float>((i / 8 * 3 + k) * k);
  return sum;
}
float rotated_64(int i) { return static_cast<float>((i + 2) % 64); }

const std::map<std::string, void (*)()> kFaults = {
    {"divergent_barrier", [] { launch(divergent_barrier, 1, 64, 0, nullptr); }},
    {"early_return", [] { launch(early_return, 1, 64, 0, nullptr); }},
    {"mask_lacks_caller", [] { launch(mask_lacks_caller, 1, 32, 0, nullptr); }},
    {"masks_differ", [] { launch(masks_differ, 1, 32, 0, nullptr); }},
    {"operations_differ", [] { launch(operations_differ, 1, 32, 0, nullptr); }},
    {"lane_has_returned", [] { launch(lane_has_returned, 1, 32, 0, nullptr); }},
    {"lane_beyond_the_block", [] { launch(lane_beyond_the_block, 1, 16, 0, nullptr); }},
    {"shuffle_from_outside", [] { launch(shuffle_from_outside, 1, 32, 0, nullptr); }},
    {"copies_under_way",
     [] {
       std::vector<float4> x(32);
       launch(copies_under_way, 1, 32, 512, nullptr, &x[0].x);
     }},
    {"misaligned_copy",
     [] {
       std::vector<float4> x(2);
       launch(misaligned_copy, 1, 1, 16, nullptr, &x[0].x);
     }},
    {"too_many_threads", [] { launch(nothing, 1, 1056, 0, nullptr); }},
    {"empty_grid", [] { launch(nothing, 0u, 32, 0, nullptr); }},
    {"too_much_shared_memory", [] { launch(nothing, 1, 32, 200 * 1024, nullptr); }},
    {"unwaited_copy",
     [] {
       std::vector<float4> x(32);
       for (int i = 0; i < 128; ++i) (&x[i / 4].x)[i % 4] = index_of(i);
       std::vector<float> y(128);
       launch(copy_through_shared_memory<true>, 1, 32, 512, nullptr, &x[0].x, y.data());
       require(y, index_of);
       launch(copy_through_shared_memory<false>, 1, 32, 512, nullptr, &x[0].x, y.data());
       expect(y, index_of);
     }},
    {"wrong_fragment_index",
     [] {
       std::vector<float> y(128);
       launch(product<true>, 1, 32, 0, nullptr, y.data());
       require(y, product_of);
       launch(product<false>, 1, 32, 0, nullptr, y.data());
       expect(y, product_of);
     }},
    {"poisoned_shared_memory",
     [] {
       std::vector<float> y(32);
       launch(poisoned_shared_memory, 1, 32, 4, nullptr, y.data());
       expect(y, thirty_two);
     }},
    {"trap", [] { launch(trap, 1, 1, 0, nullptr); }},
    {"removed_barrier",
     [] {
       std::vector<float> y(64);
       launch(reverse<true>, 1, 64, 256, nullptr, y.data());
       require(y, reversed_64);
       expect_in_every_order(
           64, [](float* y) { launch(reverse<false>, 1, 64, 256, nullptr, y); }, reversed_64);
     }},
    {"removed_warp_barrier",
     [] {
       std::vector<float> y(32);
       launch(reverse_in_a_warp<true>, 1, 32, 128, nullptr, y.data());
       require(y, reversed_32);
       expect_in_every_order(
           32, [](float* y) { launch(reverse_in_a_warp<false>, 1, 32, 128, nullptr, y); },
           reversed_32);
     }},
    {"shuffle_is_no_barrier",
     [] {
       std::vector<float> y(32);
       launch(shuffle_is_no_barrier, 1, 32, 128, nullptr, y.data());
     }},
    {"barrier_before_reuse_removed",
     [] {
       std::vector<float> y(64);
       launch(rotate_twice<true>, 1, 64, 256, nullptr, y.data());
       require(y, rotated_64);
       expect_in_every_order(
           64, [](float* y) { launch(rotate_twice<false>, 1, 64, 256, nullptr, y); }, rotated_64);
     }},
    {"race_on_global_memory",
     [] {
       std::vector<float> y(32);
       launch(race_on_global_memory, 1, 64, 0, nullptr, y.data());
     }},
    {"off_by_one_page",
     [] {
       const std::vector<float> pages(3 * 4, 1.0f);
       const std::vector<int> table = {1, 2};
       std::vector<float> y(8);
       launch(off_by_one_page, 1, 8, 0, nullptr, pages.data(), table.data(), y.data());
       expect(y, one);
     }},
    {"past_dynamic_shared_memory", [] { launch(past_dynamic_shared_memory, 1, 32, 128, nullptr); }},
    {"past_static_shared_memory", [] { launch(past_static_shared_memory, 1, 32, 0, nullptr, 1); }},
    {"misaligned_vector",
     [] {
       std::vector<float4> x(3);
       std::vector<float> y(1);
       launch(misaligned_vector, 1, 1, 0, nullptr, &x[0].x, y.data());
     }},
};

}  // namespace

int main(int count, char** arguments) {
  const auto entry = count == 2 ? kFaults.find(arguments[1]) : kFaults.end();
  if (entry == kFaults.end()) {
    std::fprintf(stderr, "usage: cuda_faults NAME\n");
    return 2;
  }
  entry->second();
  std::printf("%s: nothing was noticed\n", arguments[1]);
}
