// What the library says of itself.
#include <cstdint>

#include "launch.h"

// The architectures as CMake was given them, such as "80;90a".
VARIANT_CUDA_API const char* variant_cuda_architectures() { return VARIANT_CUDA_ARCHITECTURES; }

// 1000 * major + 10 * minor of the runtime that is linked in.
VARIANT_CUDA_API int variant_cuda_runtime_version() { return CUDART_VERSION; }

// What a launcher's return value means.
VARIANT_CUDA_API const char* variant_cuda_error_text(int status) {
  return cudaGetErrorString(static_cast<cudaError_t>(status));
}
