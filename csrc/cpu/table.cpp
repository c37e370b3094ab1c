// The table of one instruction set.
#include "kernels.h"

namespace variant::VARIANT_ISA_NAMESPACE {

extern const KernelTable kTable;
const KernelTable kTable = {
#define VARIANT_KERNEL_ENTRY(name, Args) &name,
    VARIANT_CPU_KERNELS(VARIANT_KERNEL_ENTRY)
#undef VARIANT_KERNEL_ENTRY
};

}  // namespace variant::VARIANT_ISA_NAMESPACE
