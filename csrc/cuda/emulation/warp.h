// Barriers, fences and warp operations. As in CUDA, __syncthreads and __syncwarp order memory;
// shuffles and votes do not.
#pragma once

#include <cstdint>
#include <string>

#include "language.h"
#include "scheduler.h"

namespace variant::emulation {

inline unsigned lane_of_caller() { return Scheduler::get().self().index % kWarp; }

struct Vote {
  int64_t value;
  uint64_t result;
};

// Computes one result for all lanes from their values in order.
template <class Fold>
uint64_t vote(const char* operation, Site site, uint32_t mask, int64_t value) {
  Vote mine{value, 0};
  Scheduler::get().meet(operation, site, mask, &mine, [](void* const* payloads, uint32_t lanes) {
    const uint64_t result = Fold::fold(payloads, lanes);
    for (unsigned i = 0; i < kWarp; ++i) {
      if (lanes >> i & 1) static_cast<Vote*>(payloads[i])->result = result;
    }
  });
  return mine.result;
}

struct Ballot {
  static uint64_t fold(void* const* payloads, uint32_t lanes) {
    uint64_t result = 0;
    for (unsigned i = 0; i < kWarp; ++i) {
      if ((lanes >> i & 1) && static_cast<Vote*>(payloads[i])->value) result |= uint64_t{1} << i;
    }
    return result;
  }
};

template <class Operation>
struct Reduce {
  static uint64_t fold(void* const* payloads, uint32_t lanes) {
    bool first = true;
    int64_t result = 0;
    for (unsigned i = 0; i < kWarp; ++i) {
      if (!(lanes >> i & 1)) continue;
      const int64_t value = static_cast<Vote*>(payloads[i])->value;
      result = first ? value : Operation::of(result, value);
      first = false;
    }
    return static_cast<uint64_t>(result);
  }
};
struct Sum {
  static int64_t of(int64_t a, int64_t b) { return a + b; }
};
struct Least {
  static int64_t of(int64_t a, int64_t b) { return a < b ? a : b; }
};
struct Greatest {
  static int64_t of(int64_t a, int64_t b) { return a > b ? a : b; }
};
struct BitAnd {
  static int64_t of(int64_t a, int64_t b) { return a & b; }
};
struct BitOr {
  static int64_t of(int64_t a, int64_t b) { return a | b; }
};
struct BitXor {
  static int64_t of(int64_t a, int64_t b) { return a ^ b; }
};

template <class T>
struct Shuffle {
  T value;
  unsigned source;  // the lane to read
  T result;
};

template <class T>
T shuffle(const char* operation, Site site, uint32_t mask, T value, unsigned source) {
  Shuffle<T> mine{value, source, value};
  Scheduler::get().meet(operation, site, mask, &mine, [](void* const* payloads, uint32_t lanes) {
    for (unsigned i = 0; i < kWarp; ++i) {
      if (!(lanes >> i & 1)) continue;
      Shuffle<T>& to = *static_cast<Shuffle<T>*>(payloads[i]);
      if (!(lanes >> to.source & 1)) {
        fault("shuffle: lane " + std::to_string(i) + " reads lane " + std::to_string(to.source) +
              ", which the mask lacks");
      }
      to.result = static_cast<Shuffle<T>*>(payloads[to.source])->value;
    }
  });
  return mine.result;
}

inline void check_width(const char* operation, int width) {
  if (width < 1 || width > 32 || (width & (width - 1))) {
    fault(std::string(operation) + ": width must be a power of two up to 32; got " +
          std::to_string(width));
  }
}

struct BlockVote {
  int value, result;
};

}  // namespace variant::emulation

using variant::emulation::Site;

inline void __syncthreads(Site site = Site::here()) {
  variant::emulation::Scheduler::get().barrier("__syncthreads", site);
}

#define VARIANT_BLOCK_VOTE(name, start, step)                                    \
  inline int name(int predicate, Site site = Site::here()) {                     \
    using variant::emulation::BlockVote;                                         \
    BlockVote mine{predicate, 0};                                                \
    variant::emulation::Scheduler::get().barrier(                                \
        #name, site, &mine, [](void* const* payloads, uint32_t count) {          \
          int result = start;                                                    \
          for (uint32_t i = 0; i < count; ++i) {                                 \
            const bool value = static_cast<BlockVote*>(payloads[i])->value != 0; \
            result = step;                                                       \
          }                                                                      \
          for (uint32_t i = 0; i < count; ++i)                                   \
            static_cast<BlockVote*>(payloads[i])->result = result;               \
        });                                                                      \
    return mine.result;                                                          \
  }
VARIANT_BLOCK_VOTE(__syncthreads_count, 0, result + value)
VARIANT_BLOCK_VOTE(__syncthreads_or, 0, result | value)
VARIANT_BLOCK_VOTE(__syncthreads_and, 1, result& value)
#undef VARIANT_BLOCK_VOTE

inline void __syncwarp(unsigned mask = 0xffffffffu, Site site = Site::here()) {
  variant::emulation::Scheduler::get().sync_warp(mask, site);
}

// A fence orders this thread's accesses with every thread that passes a fence later. A GPU orders
// less, so a race between two fences can go unreported; there are no false reports.
inline void __threadfence() {
  auto& scheduler = variant::emulation::Scheduler::get();
  scheduler.may_yield();
  variant::emulation::acquire_memory(scheduler.fence());
  variant::emulation::release_memory(scheduler.fence());
}
inline void __threadfence_block() { __threadfence(); }

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, Site site = Site::here()) {
  variant::emulation::check_width("__shfl_sync", width);
  const unsigned lane = variant::emulation::lane_of_caller(), inside = width - 1;
  return variant::emulation::shuffle("__shfl_sync", site, mask, value,
                                     (lane & ~inside) | (static_cast<unsigned>(source) & inside));
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, Site site = Site::here()) {
  variant::emulation::check_width("__shfl_up_sync", width);
  const unsigned lane = variant::emulation::lane_of_caller(), index = lane & (width - 1);
  return variant::emulation::shuffle("__shfl_up_sync", site, mask, value,
                                     delta <= index ? lane - delta : lane);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   Site site = Site::here()) {
  variant::emulation::check_width("__shfl_down_sync", width);
  const unsigned lane = variant::emulation::lane_of_caller(), index = lane & (width - 1);
  return variant::emulation::shuffle("__shfl_down_sync", site, mask, value,
                                     delta < width - index ? lane + delta : lane);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, Site site = Site::here()) {
  variant::emulation::check_width("__shfl_xor_sync", width);
  const unsigned lane = variant::emulation::lane_of_caller();
  const unsigned source = lane ^ static_cast<unsigned>(lane_mask);
  const unsigned end = (lane & ~(width - 1u)) + width;
  return variant::emulation::shuffle("__shfl_xor_sync", site, mask, value,
                                     source < end ? source : lane);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, Site site = Site::here()) {
  using namespace variant::emulation;
  return static_cast<unsigned>(vote<Ballot>("__ballot_sync", site, mask, predicate != 0));
}
inline int __any_sync(unsigned mask, int predicate, Site site = Site::here()) {
  using namespace variant::emulation;
  return vote<Ballot>("__any_sync", site, mask, predicate != 0) != 0;
}
inline int __all_sync(unsigned mask, int predicate, Site site = Site::here()) {
  using namespace variant::emulation;
  return vote<Ballot>("__all_sync", site, mask, predicate != 0) == mask;
}

#define VARIANT_REDUCE(name, T, Operation)                                             \
  inline T name(unsigned mask, T value, Site site = Site::here()) {                    \
    using namespace variant::emulation;                                                \
    return static_cast<T>(vote<Reduce<Operation>>(#name, site, mask, int64_t{value})); \
  }
VARIANT_REDUCE(__reduce_add_sync, unsigned, Sum)
VARIANT_REDUCE(__reduce_add_sync, int, Sum)
VARIANT_REDUCE(__reduce_min_sync, unsigned, Least)
VARIANT_REDUCE(__reduce_min_sync, int, Least)
VARIANT_REDUCE(__reduce_max_sync, unsigned, Greatest)
VARIANT_REDUCE(__reduce_max_sync, int, Greatest)
VARIANT_REDUCE(__reduce_and_sync, unsigned, BitAnd)
VARIANT_REDUCE(__reduce_or_sync, unsigned, BitOr)
VARIANT_REDUCE(__reduce_xor_sync, unsigned, BitXor)
#undef VARIANT_REDUCE
