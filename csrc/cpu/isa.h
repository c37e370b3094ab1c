// Instruction sets: those built, those that this machine supports, and the one in use.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace variant {

struct Isa {
  const char* name;
  const KernelTable* table;
  bool (*supported)();
};

// Slowest first; the first runs on every machine that the library was built for.
const std::vector<Isa>& built_isas();

// The instruction set named by VARIANT_CPU_ISA, else the last one that this machine supports.
// Chosen once. Throws std::invalid_argument if the name is unknown or not supported here.
const Isa& active_isa();

}  // namespace variant
