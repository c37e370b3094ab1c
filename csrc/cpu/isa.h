// Which instruction sets were built, which this machine has, and which one is used.
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

// The one named by VARIANT_CPU_ISA, else the last that this machine supports. The choice is made
// once. Throws std::invalid_argument when the name is unknown or the machine lacks it.
const Isa& active_isa();

}  // namespace variant
