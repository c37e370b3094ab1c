// Runs a grid: blocks one after another, the threads of a block as fibers, in an order chosen by a
// seed. Implements barriers and the operations that synchronise lanes of a warp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "fault.h"
#include "fiber.h"
#include "language.h"
#include "ready_threads.h"

namespace variant::emulation {

constexpr unsigned kWarp = 32;
constexpr size_t kMaxSharedBytes = 163 * 1024;  // limit of a block on sm_80
constexpr unsigned char kPoison = 0xff;         // NaN in every float format, -1 in integers

struct AsyncCopy {
  void* to;
  const void* from;
  int bytes, read;  // the rest is filled with zeros
};

enum class State : uint8_t { kReady, kAtBarrier, kMeeting, kReturned };

// Computes the results of a warp operation: payloads[lane] for each lane of the mask.
using Complete = void (*)(void* const* payloads, uint32_t mask);

struct Thread {
  explicit Thread(void (*body)()) : fiber(body) {}
  Fiber fiber;
  unsigned index = 0;  // within the block
  uint3 position{};
  State state = State::kReady;
  const char* operation = "";  // the operation that it waits in
  Site site{"?", 0};
  uint32_t mask = 0;
  void* payload = nullptr;
  Complete complete = nullptr;
  uint32_t warp_phases[4] = {};  // of __syncwarp, by mask
  std::vector<AsyncCopy> open_copies;
  std::deque<std::vector<AsyncCopy>> groups;
};

// What the lanes of one warp do, a bit for each lane.
struct Warp {
  uint32_t meeting = 0, returned = 0;
};

// The body of every thread of the grid. (std::function would add four frames to each report.)
struct Body {
  void (*call)(const void* arguments);
  const void* arguments;
};

class Scheduler {
 public:
  static Scheduler& get() {
    static Scheduler* scheduler = new Scheduler;  // never destroyed: its fibers do not return
    return *scheduler;
  }

  // 0: the lowest thread that can run continues until it must wait. 1: the highest. Other seeds: a
  // random thread, and every primitive may switch to another one. The environment variable
  // VARIANT_EMULATION_SEED sets the initial seed.
  void set_seed(uint64_t seed) {
    order_ = seed == 0 ? Order::kForward : seed == 1 ? Order::kBackward : Order::kRandom;
    random_ = seed;
  }

  void run(const void* kernel, Site site, dim3 grid, dim3 block, size_t shared_bytes,
           const Body& body) {
    const Unwatched unwatched;
    if (position.kernel) fault("a kernel cannot launch another");
    position = {kernel, site, false};
    check_shape(grid, block, shared_bytes);
    body_ = &body;
    gridDim = grid;
    blockDim = block;
    count_ = block.x * block.y * block.z;
    while (threads_.size() < count_) threads_.push_back(std::make_unique<Thread>(&thread_body));
    ready_.set_order(order_);
    const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
    std::vector<uint64_t> order(blocks);
    for (uint64_t i = 0; i < blocks; ++i)
      order[i] = order_ == Order::kBackward ? blocks - 1 - i : i;
    if (order_ == Order::kRandom) {
      for (uint64_t i = blocks; i > 1; --i) std::swap(order[i - 1], order[below(i)]);
    }
    for (const uint64_t i : order) {
      blockIdx = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                  static_cast<unsigned>(i / grid.x / grid.y)};
      run_block(shared_bytes);
    }
    position = {};
  }

  Thread& self() { return *current_; }
  void* shared() { return shared_; }
  size_t shared_bytes() const { return shared_bytes_; }
  void* fence() { return &fence_; }

  // A point at which the scheduler may run another thread first.
  void may_yield() {
    const Unwatched unwatched;
    if (order_ == Order::kRandom && current_ && below(4) == 0) leave(State::kReady);
  }

  // Waits for every thread of the block. Memory is ordered by the caller's phase of the barrier.
  void barrier(const char* operation, Site site, void* payload = nullptr,
               Complete complete = nullptr) {
    const Unwatched unwatched;
    require_in_kernel(operation);
    // Two objects alternate, so that a thread that is already at the next barrier does not order
    // memory for a thread that is still leaving this one.
    uint64_t* object = &barriers_[barrier_phase_ & 1];
    release_memory(object);
    Thread& me = self();
    me.operation = operation;
    me.site = site;
    me.mask = 0;
    me.payload = payload;
    me.complete = complete;
    for (unsigned i = 0; i < count_ && returned_ > 0; ++i) {
      if (threads_[i]->state != State::kReturned) continue;
      fault("waits at " + at(me) + ", but thread " + text_of(threads_[i]->position) +
            " has returned and will never come");
    }
    if (waiting_ > 0 && !same_operation(*last_waiting_, me)) {
      fault("divergent barrier: waits at " + at(me) + " while thread " +
            text_of(last_waiting_->position) + " waits at " + at(*last_waiting_));
    }
    last_waiting_ = &me;
    if (++waiting_ < count_) {
      leave(State::kAtBarrier);
    } else {
      waiting_ = 0;
      ++barrier_phase_;
      if (complete) {
        std::vector<void*> payloads(count_);
        for (unsigned i = 0; i < count_; ++i) payloads[i] = threads_[i]->payload;
        complete(payloads.data(), count_);
      }
      for (unsigned i = 0; i < count_; ++i) wake(*threads_[i]);
      leave(State::kReady);
    }
    acquire_memory(object);
  }

  // Waits for the lanes of the mask; the last one computes the results of all. Orders no memory.
  void meet(const char* operation, Site site, uint32_t mask, void* payload, Complete complete) {
    const Unwatched unwatched;
    require_in_kernel(operation);
    Thread& me = self();
    me.operation = operation;
    me.site = site;
    me.mask = mask;
    me.payload = payload;
    me.complete = complete;
    const unsigned first = me.index / kWarp * kWarp, lane = me.index % kWarp;
    if (!(mask >> lane & 1))
      fault(at(me) + ": the mask lacks the calling lane " + std::to_string(lane));
    Warp& warp = warps_[me.index / kWarp];
    const unsigned lanes = count_ - first < kWarp ? count_ - first : kWarp;
    if (const uint32_t absent = mask & ~(0xffffffffu >> (kWarp - lanes))) {
      fault(at(me) + ": the mask names lane " + std::to_string(lowest_bit(absent)) +
            ", which the block lacks");
    }
    if (const uint32_t gone = mask & warp.returned) {
      fault(at(me) + ": the mask names lane " + std::to_string(lowest_bit(gone)) +
            ", which has returned");
    }
    // Lanes that wait with this mask agreed when they came: to compare with one of them is enough.
    const uint32_t others = mask & ~(1u << lane);
    for (uint32_t left = warp.meeting & others; left; left &= left - 1) {
      const Thread& other = *threads_[first + lowest_bit(left)];
      if (other.mask != mask) continue;
      if (other.complete != complete || !same_text(other.operation, operation)) {
        fault("lanes disagree: at " + at(me) + " while thread " + text_of(other.position) +
              " is at " + at(other));
      }
      break;
    }
    bool all_here = (warp.meeting & others) == others;
    for (uint32_t left = others; all_here && left; left &= left - 1)
      all_here = threads_[first + lowest_bit(left)]->mask == mask;
    if (!all_here) {
      warp.meeting |= 1u << lane;
      leave(State::kMeeting);
      return;
    }
    warp.meeting &= ~others;
    void* payloads[kWarp] = {};
    for (unsigned i = 0; i < kWarp; ++i) {
      if (mask >> i & 1) payloads[i] = threads_[first + i]->payload;
    }
    if (complete) complete(payloads, mask);
    for (unsigned i = 0; i < kWarp; ++i) {
      if (mask >> i & 1 && i != lane) wake(*threads_[first + i]);
    }
    if (order_ == Order::kRandom) leave(State::kReady);
  }

  // __syncwarp: waits for the lanes of the mask and orders their memory.
  void sync_warp(uint32_t mask, Site site) {
    const Unwatched unwatched;
    require_in_kernel("__syncwarp");
    const unsigned warp = self().index / kWarp;
    const unsigned kind = mask == 0xffffffffu ? 0 : 1 + mask % 3;
    uint64_t* object = &warp_objects_[warp][kind][self().warp_phases[kind]++ & 1];
    release_memory(object);
    meet("__syncwarp", site, mask, nullptr, nullptr);
    acquire_memory(object);
  }

  void require_in_kernel(const char* operation) {
    if (!current_) fault(std::string(operation) + " outside a kernel");
  }

  uint64_t below(uint64_t limit) {  // splitmix64
    uint64_t z = random_ += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return (z ^ z >> 31) % limit;
  }

 private:
  Scheduler() {
    const char* seed = std::getenv("VARIANT_EMULATION_SEED");
    set_seed(seed ? std::strtoull(seed, nullptr, 10) : 0);
    name_place_in_reports();
  }

  static std::string at(const Thread& thread) {
    std::string text = std::string(thread.operation) + " (" + thread.site.text();
    if (thread.mask) {
      char mask[24];
      std::snprintf(mask, sizeof(mask), ", mask 0x%08x", thread.mask);
      text += mask;
    }
    return text + ")";
  }

  static bool same_operation(const Thread& a, const Thread& b) {
    return same_text(a.operation, b.operation) && a.site.line == b.site.line &&
           same_text(a.site.file, b.site.file);
  }

  // Nearly always both are the same literal.
  static bool same_text(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }

  static void check_shape(dim3 grid, dim3 block, size_t shared_bytes) {
    const uint64_t threads = uint64_t{block.x} * block.y * block.z;
    if (threads == 0 || threads > kMaxThreads || block.z > 64) {
      fault("a block has 1 to 1024 threads, at most 64 in z; got " +
            text_of({block.x, block.y, block.z}));
    }
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 ||
        grid.z > 65535) {
      fault("a grid has at least 1 block and at most (2147483647, 65535, 65535); got " +
            text_of({grid.x, grid.y, grid.z}));
    }
    if (shared_bytes > kMaxSharedBytes) {
      fault("sm_80 has " + std::to_string(kMaxSharedBytes) +
            " bytes of shared memory a block; got " + std::to_string(shared_bytes));
    }
  }

  void run_block(size_t shared_bytes) {
    // Exactly as large as asked for, so that AddressSanitizer guards its end.
    if (posix_memalign(&shared_, 128, shared_bytes) != 0) fault("no memory for shared memory");
    std::memset(shared_, kPoison, shared_bytes);
    shared_bytes_ = shared_bytes;
    waiting_ = returned_ = 0;
    ready_.clear();
    for (Warp& warp : warps_) warp = {};
    for (unsigned i = 0; i < count_; ++i) {
      Thread& thread = *threads_[i];
      thread.index = i;
      thread.position = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
      std::memset(thread.warp_phases, 0, sizeof(thread.warp_phases));
      wake(thread);
    }
    release_memory(&block_start_);
    while (returned_ < count_) {
      if (ready_.empty()) report_deadlock();
      current_ = threads_[ready_.take([this](uint64_t limit) { return below(limit); })].get();
      threadIdx = current_->position;
      position.in_thread = true;
      main_.switch_to(current_->fiber);
      position.in_thread = false;
      current_ = nullptr;
    }
    acquire_memory(&block_end_);
    std::free(shared_);
    shared_ = nullptr;
  }

  void wake(Thread& thread) {
    thread.state = State::kReady;
    if (&thread != current_) ready_.add(thread.index);
  }

  // Back to the loop in run_block; returns when it resumes this thread.
  void leave(State state) {
    Thread& me = self();
    me.state = state;
    if (state == State::kReady) ready_.add(me.index);
    me.fiber.switch_to(main_);
  }

  static void thread_body() {
    Scheduler& scheduler = get();
    for (;;) {
      acquire_memory(&scheduler.block_start_);
      scheduler.body_->call(scheduler.body_->arguments);
      release_memory(&scheduler.block_end_);
      const Unwatched unwatched;
      scheduler.returned();
      scheduler.leave(State::kReturned);
    }
  }

  void returned() {
    Thread& me = self();
    const size_t copies = me.open_copies.size() + me.groups.size();
    if (copies) fault("returned while cp.async copies are under way; wait for them first");
    for (unsigned i = 0; i < count_; ++i) {
      const Thread& other = *threads_[i];
      const bool named = other.state == State::kMeeting &&
                         other.index / kWarp == me.index / kWarp &&
                         (other.mask >> (me.index % kWarp) & 1);
      if (other.state == State::kAtBarrier || named) {
        fault("returned while thread " + text_of(other.position) + " waits for it at " + at(other));
      }
    }
    ++returned_;
    warps_[me.index / kWarp].returned |= 1u << me.index % kWarp;
  }

  [[noreturn]] void report_deadlock() {
    std::string text = "deadlock: no thread can run";
    unsigned listed = 0;
    for (unsigned i = 0; i < count_; ++i) {
      const Thread& thread = *threads_[i];
      if (thread.state == State::kReturned) continue;
      if (++listed > 8) continue;
      text += "\n  block " + text_of(blockIdx) + ", thread " + text_of(thread.position) +
              " waits at " + at(thread);
    }
    if (listed > 8) text += "\n  and " + std::to_string(listed - 8) + " more";
    fault(text);
  }

  Fiber main_;
  std::vector<std::unique_ptr<Thread>> threads_;
  ReadyThreads ready_;
  Warp warps_[kMaxThreads / kWarp];
  Thread* current_ = nullptr;
  Thread* last_waiting_ = nullptr;
  const Body* body_ = nullptr;
  unsigned count_ = 0, waiting_ = 0, returned_ = 0, barrier_phase_ = 0;
  void* shared_ = nullptr;
  size_t shared_bytes_ = 0;
  Order order_ = Order::kForward;
  uint64_t random_ = 0;
  // Only their addresses are used: each identifies an operation that orders memory.
  uint64_t barriers_[2] = {}, block_start_ = 0, block_end_ = 0, fence_ = 0;
  uint64_t warp_objects_[32][4][2] = {};
};

inline void set_seed(uint64_t seed) { Scheduler::get().set_seed(seed); }

}  // namespace variant::emulation
