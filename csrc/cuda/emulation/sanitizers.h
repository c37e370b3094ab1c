// Annotations for the sanitizers: stack switches, operations that order memory, and accesses of the
// harness.
#pragma once

#if defined(__SANITIZE_ADDRESS__)
#define VARIANT_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define VARIANT_ASAN 1
#endif
#endif
#if defined(__SANITIZE_THREAD__)
#define VARIANT_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define VARIANT_TSAN 1
#endif
#endif

#ifdef VARIANT_ASAN
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef VARIANT_TSAN
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

namespace variant::emulation {

// ThreadSanitizer sees every CUDA thread as a thread of its own; switching between them orders
// nothing. These two functions annotate the operations that order memory in CUDA.
inline void release_memory([[maybe_unused]] void* object) {
#ifdef VARIANT_TSAN
  __tsan_release(object);
#endif
}
inline void acquire_memory([[maybe_unused]] void* object) {
#ifdef VARIANT_TSAN
  __tsan_acquire(object);
#endif
}

// During an object's lifetime ThreadSanitizer ignores the current thread's accesses: they belong to
// the harness, not to the kernel.
class Unwatched {
 public:
  Unwatched() {
#ifdef VARIANT_TSAN
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
#endif
  }
  ~Unwatched() {
#ifdef VARIANT_TSAN
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
#endif
  }
  Unwatched(const Unwatched&) = delete;
  Unwatched& operator=(const Unwatched&) = delete;
};

}  // namespace variant::emulation
