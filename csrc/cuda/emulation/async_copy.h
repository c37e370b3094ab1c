// cp.async. Issuing a copy poisons the destination; waiting for its group fills it, as late as the
// instruction allows. Reads in between return NaN.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <utility>

#include "scheduler.h"

namespace variant::emulation {

inline void issue_async_copy(void* shared, const void* global, int bytes, int read) {
  {
    const Unwatched unwatched;
    Scheduler& scheduler = Scheduler::get();
    scheduler.require_in_kernel("cp.async");
    const bool aligned = reinterpret_cast<uintptr_t>(shared) % bytes == 0 &&
                         (reinterpret_cast<uintptr_t>(global) % bytes == 0 || read == 0);
    if (!aligned || read < 0 || read > bytes) {
      fault("cp.async: both addresses must be multiples of " + std::to_string(bytes) +
            " and it reads 0 to that many bytes; got " + std::to_string(read));
    }
    scheduler.may_yield();
    scheduler.self().open_copies.push_back({shared, global, bytes, read});
  }
  std::memset(shared, kPoison, bytes);
}

inline void commit_async_copies() {
  const Unwatched unwatched;
  Thread& me = Scheduler::get().self();
  me.groups.push_back(std::move(me.open_copies));
  me.open_copies.clear();
}

// Completes all groups of this thread except the newest `pending`.
inline void wait_for_async_copies(unsigned pending) {
  for (;;) {
    std::vector<AsyncCopy> group;
    {
      const Unwatched unwatched;
      Thread& me = Scheduler::get().self();
      if (me.groups.size() <= pending) break;
      group = std::move(me.groups.front());
      me.groups.pop_front();
    }
    for (const AsyncCopy& copy : group) {
      if (copy.read > 0) std::memcpy(copy.to, copy.from, copy.read);
      std::memset(static_cast<char*>(copy.to) + copy.read, 0, copy.bytes - copy.read);
    }
  }
  Scheduler::get().may_yield();
}

}  // namespace variant::emulation
