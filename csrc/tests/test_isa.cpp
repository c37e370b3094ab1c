#include <stdexcept>

#include "check.h"

using namespace variant;

int main() {
  const std::vector<Isa>& isas = built_isas();
  CHECK(!isas.empty() && std::string(isas[0].name) == "portable" && isas[0].supported(),
        "the portable kernels are always built and always run");
  setenv("VARIANT_CPU_ISA", "pdp11", 1);
  std::string message;
  try {
    active_isa();
  } catch (const std::invalid_argument& error) {
    message = error.what();
  }
  CHECK(message.find("pdp11") != std::string::npos && message.find("portable") != std::string::npos,
        "got \"%s\"", message.c_str());
  // A failed choice is not remembered.
  setenv("VARIANT_CPU_ISA", "portable", 1);
  CHECK(std::string(active_isa().name) == "portable", "got %s", active_isa().name);
}
