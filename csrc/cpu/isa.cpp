#include "isa.h"

#include <cstdlib>
#include <new>
#include <stdexcept>

namespace variant {

namespace portable {
extern const KernelTable kTable;
}
#ifdef VARIANT_HAS_avx512
namespace avx512 {
extern const KernelTable kTable;
}
#endif

namespace {

bool always() { return true; }

#ifdef VARIANT_HAS_avx512
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("fma");
}
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
  const char* asked = std::getenv("VARIANT_CPU_ISA");
  const Isa* best = nullptr;
  for (const Isa& isa : built_isas()) {
    if (asked && *asked) {
      if (isa.name != std::string(asked)) continue;
      if (isa.supported()) return isa;
      throw std::invalid_argument("VARIANT_CPU_ISA: this machine lacks \"" + std::string(asked) +
                                  "\"; it supports: " + join_names(true));
    }
    if (isa.supported()) best = &isa;
  }
  if (best) return *best;
  throw std::invalid_argument("VARIANT_CPU_ISA must be one of: " + join_names(false) + "; got \"" +
                              asked + "\"");
}

}  // namespace

const std::vector<Isa>& built_isas() {
  static const std::vector<Isa> isas = {
      {"portable", &portable::kTable, always},
#ifdef VARIANT_HAS_avx512
      {"avx512", &avx512::kTable, has_avx512},
#endif
  };
  return isas;
}

const Isa& active_isa() {
  static const Isa& isa = choose_isa();
  return isa;
}

void* allocate_scratch(int64_t bytes) {
  // aligned_alloc wants a multiple of the alignment.
  void* data = std::aligned_alloc(64, static_cast<size_t>((bytes + 63) / 64 * 64 + 64));
  if (!data) throw std::bad_alloc();
  return data;
}

void release_scratch(void* data) { std::free(data); }

}  // namespace variant
