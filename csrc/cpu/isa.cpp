#include "isa.h"

#include <cstdlib>
#include <new>
#include <stdexcept>
#ifdef VARIANT_HAS_avx2
#include <cpuid.h>
#endif

namespace variant {

namespace portable {
extern const KernelTable kTable;
}
#ifdef VARIANT_HAS_avx2
namespace avx2 {
extern const KernelTable kTable;
}
#endif
#ifdef VARIANT_HAS_avx512
namespace avx512 {
extern const KernelTable kTable;
}
#endif
#ifdef VARIANT_HAS_avx512bf16
namespace avx512bf16 {
extern const KernelTable kTable;
}
#endif

namespace {

bool always() { return true; }

#ifdef VARIANT_HAS_avx2
bool has_avx2() {
  // g++ 10 has no name for f16c: bit 29 of leaf 1. The others also ask the system to save the
  // wide registers.
  unsigned eax, ebx, ecx, edx;
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx >> 29 & 1);
}
#endif

#if defined(VARIANT_HAS_avx512) || defined(VARIANT_HAS_avx512bf16)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("fma");
}
#endif

#ifdef VARIANT_HAS_avx512bf16
bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

std::string join_names(bool only_supported) {
  std::string names;
  for (const Isa& isa : built_isas()) {
    if (only_supported && !isa.supported()) continue;
    names += (names.empty() ? "" : ", ") + std::string(isa.name);
  }
  return names;
}

const Isa& choose_isa() {
  const char* name = std::getenv("VARIANT_CPU_ISA");
  const Isa* best = nullptr;
  for (const Isa& isa : built_isas()) {
    if (name && *name) {
      if (isa.name != std::string(name)) continue;
      if (isa.supported()) return isa;
      throw std::invalid_argument("VARIANT_CPU_ISA: this machine lacks \"" + std::string(name) +
                                  "\"; it supports: " + join_names(true));
    }
    if (isa.supported()) best = &isa;
  }
  if (best) return *best;
  throw std::invalid_argument("VARIANT_CPU_ISA must be one of: " + join_names(false) + "; got \"" +
                              name + "\"");
}

}  // namespace

const std::vector<Isa>& built_isas() {
  static const std::vector<Isa> isas = {
      {"portable", &portable::kTable, always},
#ifdef VARIANT_HAS_avx2
      {"avx2", &avx2::kTable, has_avx2},
#endif
#ifdef VARIANT_HAS_avx512
      {"avx512", &avx512::kTable, has_avx512},
#endif
#ifdef VARIANT_HAS_avx512bf16
      {"avx512bf16", &avx512bf16::kTable, has_avx512bf16},
#endif
  };
  return isas;
}

const Isa& active_isa() {
  static const Isa& isa = choose_isa();
  return isa;
}

namespace {

#if defined(__SANITIZE_ADDRESS__)
#define VARIANT_KEEPS_SCRATCH 0
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define VARIANT_KEEPS_SCRATCH 0
#endif
#endif
#ifndef VARIANT_KEEPS_SCRATCH
#define VARIANT_KEEPS_SCRATCH 1
#endif

// A newly mapped block costs a page fault per 4 KiB at every call, so each thread caches the two
// largest blocks that it has released, up to this size. Nothing is cached under AddressSanitizer,
// which checks the end of a block only if every call allocates its own.
constexpr size_t kMaxCachedBytes = VARIANT_KEEPS_SCRATCH ? size_t{16} << 20 : 0;

// Precedes every block, in one alignment unit: the block's size.
struct Header {
  size_t bytes;
};
constexpr size_t kAlignment = 64;
static_assert(sizeof(Header) <= kAlignment, "the header stands in the unit before the block");

struct ScratchCache {
  static constexpr int kBlocks = 2;
  char* blocks[kBlocks] = {};
  ~ScratchCache() {
    for (char*& block : blocks) {
      std::free(block);
      block = nullptr;
    }
  }
};
thread_local ScratchCache cache;

size_t size_of(const char* block) { return reinterpret_cast<const Header*>(block)->bytes; }

}  // namespace

void* allocate_scratch(int64_t bytes) {
  // aligned_alloc needs a multiple of the alignment.
  const size_t size =
      (static_cast<size_t>(bytes) + kAlignment - 1) / kAlignment * kAlignment + 2 * kAlignment;
  char** best = nullptr;
  for (char*& block : cache.blocks) {
    if (block && size_of(block) >= size && (!best || size_of(block) < size_of(*best))) {
      best = &block;
    }
  }
  char* block = best ? *best : nullptr;
  if (best) {
    *best = nullptr;
  } else {
    block = static_cast<char*>(std::aligned_alloc(kAlignment, size));
    if (!block) throw std::bad_alloc();
    reinterpret_cast<Header*>(block)->bytes = size;
  }
  return block + kAlignment;
}

void release_scratch(void* data) {
  char* block = static_cast<char*>(data) - kAlignment;
  // Frees the smallest of the cached blocks and this one.
  if (size_of(block) <= kMaxCachedBytes) {
    for (char*& other : cache.blocks) {
      if (!other || size_of(other) < size_of(block)) {
        char* smaller = other;
        other = block;
        block = smaller;
        if (!block) return;
      }
    }
  }
  std::free(block);
}

}  // namespace variant
