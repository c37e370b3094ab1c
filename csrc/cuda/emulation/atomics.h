// Atomics: relaxed, as CUDA's are. The scheduler may run another thread just before each.
#pragma once

#include <cstdint>
#include <type_traits>

#include "scheduler.h"

namespace variant::emulation {

template <class T>
struct Same {
  using type = T;
};
template <class T>
using As = typename Same<T>::type;

// Replaces *at by change(*at) atomically and returns the previous value.
template <class T, class F>
T update(T* at, F change) {
  Scheduler::get().may_yield();
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  Bits* cell = reinterpret_cast<Bits*>(at);
  Bits old = __atomic_load_n(cell, __ATOMIC_RELAXED);
  for (;;) {
    T value;
    __builtin_memcpy(&value, &old, sizeof(T));
    const T changed = change(value);
    Bits next;
    __builtin_memcpy(&next, &changed, sizeof(T));
    if (__atomic_compare_exchange_n(cell, &old, next, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
      return value;
    }
  }
}

// Integers wrap around.
template <class T>
T wrapping_sum(T a, T b) {
  if constexpr (std::is_integral_v<T>) {
    return static_cast<T>(static_cast<std::make_unsigned_t<T>>(a) +
                          static_cast<std::make_unsigned_t<T>>(b));
  } else {
    return a + b;
  }
}

}  // namespace variant::emulation

#define VARIANT_ATOMIC(name, expression)                                           \
  template <class T>                                                               \
  T name(T* at, variant::emulation::As<T> value) {                                 \
    return variant::emulation::update(at, [=](T old) -> T { return expression; }); \
  }
VARIANT_ATOMIC(atomicAdd, variant::emulation::wrapping_sum(old, value))
VARIANT_ATOMIC(atomicMax, value > old ? value : old)
VARIANT_ATOMIC(atomicMin, value < old ? value : old)
VARIANT_ATOMIC(atomicExch, ((void)old, value))
VARIANT_ATOMIC(atomicAnd, old& value)
VARIANT_ATOMIC(atomicOr, old | value)
VARIANT_ATOMIC(atomicXor, old ^ value)
VARIANT_ATOMIC(atomicInc, old >= value ? 0 : old + 1)
#undef VARIANT_ATOMIC
inline int atomicSub(int* at, int value) {
  return atomicAdd(at, static_cast<int>(0u - static_cast<unsigned>(value)));
}
inline unsigned atomicSub(unsigned* at, unsigned value) { return atomicAdd(at, 0u - value); }
template <class T>
T atomicCAS(T* at, variant::emulation::As<T> expected, variant::emulation::As<T> desired) {
  return variant::emulation::update(at,
                                    [=](T old) -> T { return old == expected ? desired : old; });
}
