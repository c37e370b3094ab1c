// The table of CPU kernels: one copy of every kernel per instruction set, chosen at run time.
//
// A file of kernels is compiled once per instruction set with VARIANT_ISA_NAMESPACE set to its
// name. Hazard: an inline function or template from elsewhere (the standard library's too) has one
// symbol for all copies, and the linker may keep the one that uses AVX-512; between two files of
// one instruction set, the one that fuses products into sums. Kernel files therefore use builtins
// and headers whose contents have internal linkage; a test reads their symbols.
//
// To add an instruction set: a line in CMakeLists.txt and a line in isa.cpp.
#pragma once

#include "../include/adaln.h"
#include "../include/append_paged_kv.h"
#include "../include/block_causal_attention.h"
#include "../include/gelu.h"
#include "../include/kv8.h"
#include "../include/paged_attention.h"
#include "../include/qk_norm.h"
#include "../include/qk_norm_append_paged_kv.h"
#include "../include/sample_tokens.h"

#define VARIANT_CPU_KERNELS(X)                                \
  X(adaln_forward, AdaLNForwardArgs)                          \
  X(adaln_backward, AdaLNBackwardArgs)                        \
  X(gated_adaln_forward, GatedAdaLNForwardArgs)               \
  X(gated_adaln_backward, GatedAdaLNBackwardArgs)             \
  X(qk_norm_forward, QkNormForwardArgs)                       \
  X(qk_norm_backward, QkNormBackwardArgs)                     \
  X(gelu_forward, GeluForwardArgs)                            \
  X(gelu_backward, GeluBackwardArgs)                          \
  X(append_paged_kv, AppendPagedKvArgs)                       \
  X(qk_norm_append_paged_kv, QkNormAppendPagedKvArgs)         \
  X(qk_norm_append_paged_kv8, QkNormAppendPagedKv8Args)       \
  X(paged_attention_forward, PagedAttentionForwardArgs)       \
  X(paged_attention_kv8_forward, PagedAttentionKv8Args)       \
  X(block_causal_attention_forward, BlockCausalForwardArgs)   \
  X(block_causal_attention_backward, BlockCausalBackwardArgs) \
  X(sample_tokens, SampleTokensArgs)

namespace variant {

struct KernelTable {
#define VARIANT_KERNEL_POINTER(name, Args) void (*name)(const Args&);
  VARIANT_CPU_KERNELS(VARIANT_KERNEL_POINTER)
#undef VARIANT_KERNEL_POINTER
};

#ifdef VARIANT_ISA_NAMESPACE
namespace VARIANT_ISA_NAMESPACE {
#define VARIANT_KERNEL_DECLARATION(name, Args) void name(const Args& args);
VARIANT_CPU_KERNELS(VARIANT_KERNEL_DECLARATION)
#undef VARIANT_KERNEL_DECLARATION
}  // namespace VARIANT_ISA_NAMESPACE
#endif

// Memory for one call. Allocated before threads start: nothing may throw inside a parallel region.
// Throws std::bad_alloc. 64-byte aligned.
void* allocate_scratch(int64_t bytes);
void release_scratch(void* data);

}  // namespace variant
