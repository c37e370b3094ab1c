// Information about the library.
#include <cstdint>

#include "launch.h"

// CMake's list of architectures, such as "80;90a".
VARIANT_CUDA_API const char* variant_cuda_architectures() { return VARIANT_CUDA_ARCHITECTURES; }

// Version of the linked runtime: 1000 * major + 10 * minor.
VARIANT_CUDA_API int variant_cuda_runtime_version() { return CUDART_VERSION; }

// Text of a launcher's return value.
VARIANT_CUDA_API const char* variant_cuda_error_text(int status) {
  return cudaGetErrorString(static_cast<cudaError_t>(status));
}
