// CMake compiles and runs this program (VARIANT_CPU_ISAS=local). It prints the name of the best
// instruction set of this machine, by the same functions that choose the kernels at run time.
#include <cstdio>

#include "isa.cpp"

// The choice needs the names of the tables, not their kernels.
namespace variant {
namespace portable {
const KernelTable kTable{};
}
#ifdef VARIANT_HAS_avx2
namespace avx2 {
const KernelTable kTable{};
}
#endif
#ifdef VARIANT_HAS_avx512
namespace avx512 {
const KernelTable kTable{};
}
#endif
#ifdef VARIANT_HAS_avx512bf16
namespace avx512bf16 {
const KernelTable kTable{};
}
#endif
}  // namespace variant

int main() {
  // Not active_isa(): the environment variable VARIANT_CPU_ISA says what to run, not what to build.
  const char* best = "";
  for (const variant::Isa& isa : variant::built_isas()) {
    if (isa.supported()) best = isa.name;
  }
  std::puts(best);
}
