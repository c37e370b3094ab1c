// Indices, barriers, warps, atomics and asynchronous copies against CUDA's documentation.
#include <set>
#include <vector>

#include "../launch.h"
#include "../primitives.h"
#include "check_cuda.h"

using namespace variant;

namespace {

constexpr unsigned kFull = 0xffffffffu;

__global__ void indices_kernel(int* seen) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  seen[block * blockDim.x * blockDim.y * blockDim.z + thread] += 1;
}

void test_every_index_runs_once() {
  std::vector<int> seen(2 * 3 * 4 * 5 * 6 * 2);
  CHECK(launch(indices_kernel, dim3(2, 3, 4), dim3(5, 6, 2), 0, nullptr, seen.data()) == 0,
        "launch");
  for (const int count : seen) CHECK(count == 1, "%d times", count);
}

// Sums by halves; wrong unless each step waits for the one before.
__global__ void block_sum_kernel(const int* x, int* sums) {
  int* shared = dynamic_shared<int>();
  shared[threadIdx.x] = x[blockIdx.x * blockDim.x + threadIdx.x];
  __syncthreads();
  for (unsigned step = blockDim.x / 2; step > 0; step /= 2) {
    if (threadIdx.x < step) shared[threadIdx.x] += shared[threadIdx.x + step];
    __syncthreads();
  }
  if (threadIdx.x == 0) sums[blockIdx.x] = shared[0];
}

void test_barriers_separate_the_steps_of_a_sum() {
  std::vector<int> x(3 * 128), sums(3);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<int>(i * i);
  launch(block_sum_kernel, 3, 128, 512, nullptr, x.data(), sums.data());
  for (int b = 0; b < 3; ++b) {
    int want = 0;
    for (int i = 0; i < 128; ++i) want += x[b * 128 + i];
    CHECK(sums[b] == want, "block %d: %d, not %d", b, sums[b], want);
  }
}

__global__ void block_vote_kernel(int* out) {
  const int count = __syncthreads_count(threadIdx.x % 3 == 0);
  const int any = __syncthreads_or(threadIdx.x == 40), all = __syncthreads_and(threadIdx.x < 64);
  const int none = __syncthreads_or(0), not_all = __syncthreads_and(threadIdx.x != 5);
  out[threadIdx.x] =
      count * 10000 + (any != 0) * 1000 + (all != 0) * 100 + (none != 0) * 10 + (not_all != 0);
}

void test_block_votes() {
  std::vector<int> out(64);
  launch(block_vote_kernel, 1, 64, 0, nullptr, out.data());
  for (const int x : out) CHECK(x == 22 * 10000 + 1100, "%d", x);
}

struct WarpResults {
  float shfl, up, down, xored, narrow_down;
  double wide;
  unsigned ballot, half_ballot;
  int any, all, add, least, greatest;
  unsigned bits_or, bits_and, bits_xor;
};

__global__ void warp_kernel(WarpResults* out) {
  const int lane = threadIdx.x % 32;
  WarpResults r;
  const float x = static_cast<float>(100 + lane);
  r.shfl = __shfl_sync(kFull, x, lane + 5);  // modulo the width
  r.up = __shfl_up_sync(kFull, x, 3);
  r.down = __shfl_down_sync(kFull, x, 3);
  r.xored = __shfl_xor_sync(kFull, x, 9);
  r.narrow_down = __shfl_down_sync(kFull, x, 2, 8);
  r.wide = __shfl_sync(kFull, 1e300 + lane * 1e299, 7);
  r.ballot = __ballot_sync(kFull, lane % 3 == 0);
  // The halves of a warp vote separately, each with its own mask.
  r.half_ballot = lane < 16 ? __ballot_sync(0x0000ffffu, lane % 2) : __ballot_sync(0xffff0000u, 1);
  r.any = __any_sync(kFull, lane == 31) != 0;
  r.all = __all_sync(kFull, lane != 31) != 0;
  r.add = __reduce_add_sync(kFull, lane - 20);
  r.least = __reduce_min_sync(kFull, lane - 20);
  r.greatest = __reduce_max_sync(kFull, lane - 20);
  r.bits_or = __reduce_or_sync(kFull, 1u << lane % 4);
  r.bits_and = __reduce_and_sync(kFull, 0xf0u | lane);
  r.bits_xor = __reduce_xor_sync(kFull, static_cast<unsigned>(lane));
  out[threadIdx.x] = r;
}

void test_warps() {
  std::vector<WarpResults> out(64);
  launch(warp_kernel, 1, 64, 0, nullptr, out.data());
  for (int i = 0; i < 64; ++i) {
    const int lane = i % 32;
    const WarpResults& r = out[i];
    CHECK(r.shfl == 100 + (lane + 5) % 32, "lane %d", lane);
    CHECK(r.up == 100 + (lane < 3 ? lane : lane - 3), "lane %d", lane);
    CHECK(r.down == 100 + (lane > 28 ? lane : lane + 3), "lane %d", lane);
    CHECK(r.xored == 100 + (lane ^ 9), "lane %d", lane);
    CHECK(r.narrow_down == 100 + (lane % 8 > 5 ? lane : lane + 2), "lane %d", lane);
    CHECK(r.wide == 1e300 + 7 * 1e299, "lane %d", lane);
    CHECK(r.ballot == 0x49249249u, "%08x", r.ballot);
    CHECK(r.half_ballot == (lane < 16 ? 0xaaaau : 0xffff0000u), "%08x", r.half_ballot);
    CHECK(r.any == 1 && r.all == 0, "lane %d", lane);
    CHECK(r.add == 31 * 16 - 640 && r.least == -20 && r.greatest == 11, "lane %d", lane);
    CHECK(r.bits_or == 15u && r.bits_and == 0xf0u && r.bits_xor == 0u, "lane %d", lane);
  }
}

__global__ void warp_memory_kernel(int* out) {
  int* shared = dynamic_shared<int>();
  for (int round = 0; round < 3; ++round) {
    shared[threadIdx.x] = static_cast<int>(threadIdx.x) + 100 * round;
    __syncwarp();
    out[round * 64 + threadIdx.x] = shared[threadIdx.x ^ 31];
    __syncwarp();
    // Reductions over pairs of lanes.
    const unsigned pair = 3u << (threadIdx.x % 32 / 2 * 2);
    shared[threadIdx.x] += 1;
    __syncwarp(pair);
    out[round * 64 + threadIdx.x] += 1000 * shared[threadIdx.x ^ 1];
    __syncwarp(pair);
  }
}

void test_syncwarp_orders_memory_within_a_warp() {
  std::vector<int> out(3 * 64);
  launch(warp_memory_kernel, 1, 64, 256, nullptr, out.data());
  for (int i = 0; i < 3 * 64; ++i) {
    const int thread = i % 64, round = i / 64;
    const int want = ((thread ^ 31) + 100 * round) + 1000 * ((thread ^ 1) + 100 * round + 1);
    CHECK(out[i] == want, "%d: %d, not %d", i, out[i], want);
  }
}

struct Atomics {
  int sum, greatest, exchanged_sum;
  unsigned least, bits_or, bits_and, bits_xor, wrapped, swaps;
  float floats;
  double doubles;
  unsigned long long wide;
};

__global__ void atomics_kernel(Atomics* a, int* last) {
  __shared__ int local;
  if (threadIdx.x == 0) local = 0;
  __syncthreads();
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  atomicAdd(&local, 1);
  atomicAdd(&a->sum, -i);
  atomicMax(&a->greatest, i);
  atomicMin(&a->least, static_cast<unsigned>(i));
  atomicOr(&a->bits_or, 1u << i % 32);
  atomicAnd(&a->bits_and, ~(1u << i % 4));
  atomicXor(&a->bits_xor, 1u << i % 3);
  atomicInc(&a->wrapped, 9u);
  atomicAdd(&a->floats, 0.5f);
  atomicAdd(&a->doubles, 0.25);
  atomicAdd(&a->wide, 1ull << 40);
  atomicAdd(&a->exchanged_sum, atomicExch(last, i));
  for (unsigned old = 0;;) {  // a counter made of compare-and-swap
    const unsigned previous = atomicCAS(&a->swaps, old, old + 1);
    if (previous == old) break;
    old = previous;
  }
  __syncthreads();
  if (local != 64) __trap();
}

void test_atomics() {
  Atomics a{};
  a.least = 1000;
  a.bits_and = 0xffu;
  int last = 0;
  launch(atomics_kernel, 2, 64, 0, nullptr, &a, &last);
  const int total = 127 * 64;
  CHECK(a.sum == -total && a.greatest == 127 && a.least == 0u, "sum, max, min");
  CHECK(a.bits_or == kFull && a.bits_and == 0xf0u, "or, and");
  CHECK(a.bits_xor == (43 % 2 | 43 % 2 * 2 | 42 % 2 * 4), "xor: %u", a.bits_xor);
  CHECK(a.wrapped == 128 % 10, "inc wraps after 9: %u", a.wrapped);
  CHECK(a.floats == 64.0f && a.doubles == 32.0 && a.wide == 128ull << 40, "wide sums");
  CHECK(a.exchanged_sum + last == total, "each value is handed on once");
  CHECK(a.swaps == 128u, "compare and swap: %u", a.swaps);
}

// The last block to arrive sums what the others wrote: a counter between two fences.
__global__ void last_block_kernel(int* parts, unsigned* arrived, int* sum) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    parts[blockIdx.x] = static_cast<int>(blockIdx.x) + 1;
    __threadfence();
    last = atomicAdd(arrived, 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (last && threadIdx.x == 1) {
    for (unsigned i = 0; i < gridDim.x; ++i) *sum += parts[i];
  }
}

void test_the_last_block_sees_what_the_others_wrote() {
  std::vector<int> parts(9);
  unsigned arrived = 0;
  int sum = 0;
  launch(last_block_kernel, 9, 32, 0, nullptr, parts.data(), &arrived, &sum);
  CHECK(sum == 45, "%d", sum);
}

// Copies tiles of 128 floats; the next tile is copied while other threads read this one.
__global__ void pipeline_kernel(const float* x, float* y, int tiles) {
  float* shared = dynamic_shared<float>();
  cp_async_16(shared + 4 * threadIdx.x, x + 4 * threadIdx.x);
  cp_async_commit();
  for (int i = 0; i < tiles; ++i) {
    if (i + 1 < tiles) {
      cp_async_16(shared + (i + 1) % 2 * 128 + 4 * threadIdx.x,
                  x + (i + 1) * 128 + 4 * threadIdx.x);
    }
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();
    for (int j = 0; j < 4; ++j) {
      y[i * 128 + 32 * j + threadIdx.x] = shared[i % 2 * 128 + 127 - (32 * j + threadIdx.x)];
    }
    __syncthreads();
  }
  cp_async_wait<0>();
}

void test_double_buffered_copies_arrive_when_waited_for() {
  const int tiles = 5;
  std::vector<float4> x(tiles * 32);
  std::vector<float> y(tiles * 128);
  float* values = &x[0].x;
  for (int i = 0; i < tiles * 128; ++i) values[i] = static_cast<float>(i);
  launch(pipeline_kernel, 1, 32, 1024, nullptr, &x[0].x, y.data(), tiles);
  for (int i = 0; i < tiles * 128; ++i) {
    CHECK(y[i] == static_cast<float>(i / 128 * 128 + 127 - i % 128), "%d: %g", i, y[i]);
  }
}

// Groups complete in order: a newer one may still be in flight when the older one is used.
__global__ void partial_copies_kernel(const int* x, int* y) {
  int* shared = dynamic_shared<int>();
  cp_async_16(shared, x, 4);  // one int; the other three become zero
  cp_async_commit();
  cp_async_8(shared + 4, x);
  cp_async_4(shared + 6, x + 1);
  cp_async_16(shared + 8, nullptr, 0);
  cp_async_commit();
  cp_async_wait<1>();
  for (int i = 0; i < 4; ++i) y[i] = shared[i];
  y[12] = shared[4];  // not yet copied
  cp_async_wait<0>();
  for (int i = 4; i < 12; ++i) y[i] = shared[i];
}

void test_copies_fill_with_zeros_and_land_by_group() {
  std::vector<int4> x = {{1, 2, 3, 4}};
  std::vector<int> y(13);
  launch(partial_copies_kernel, 1, 1, 48, nullptr, &x[0].x, y.data());
  const std::vector<int> want = {1, 0, 0, 0, 1, 2, 2, -1, 0, 0, 0, 0, -1};
  CHECK(y == want, "copies");
}

__global__ void order_kernel(int* order, int* next) { order[atomicAdd(next, 1)] = threadIdx.x; }

// Seeds must produce different interleavings; otherwise the tests above prove little.
void test_seeds_choose_the_order_of_threads() {
  std::set<std::vector<int>> orders;
  for (uint64_t seed = 0; seed < 10; ++seed) {
    emulation::set_seed(seed);
    std::vector<int> order(64), again(64);
    int next = 0;
    launch(order_kernel, 1, 64, 0, nullptr, order.data(), &next);
    emulation::set_seed(seed);
    next = 0;
    launch(order_kernel, 1, 64, 0, nullptr, again.data(), &next);
    CHECK(order == again, "seed %d does not repeat", static_cast<int>(seed));
    if (seed == 0) CHECK(order[0] == 0 && order[63] == 63, "seed 0 goes forwards");
    if (seed == 1) CHECK(order[0] == 63 && order[63] == 0, "seed 1 goes backwards");
    orders.insert(order);
  }
  CHECK(orders.size() == 10, "%zu orders out of 10 seeds", orders.size());
}

}  // namespace

int main() {
  test_every_index_runs_once();
  test_barriers_separate_the_steps_of_a_sum();
  test_block_votes();
  test_warps();
  test_syncwarp_orders_memory_within_a_warp();
  test_atomics();
  test_the_last_block_sees_what_the_others_wrote();
  test_double_buffered_copies_arrive_when_waited_for();
  test_copies_fill_with_zeros_and_land_by_group();
  test_seeds_choose_the_order_of_threads();
}
