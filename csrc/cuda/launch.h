// Launching kernels from host code, on a GPU or in the emulation. Launchers are extern "C", take
// raw pointers, sizes, strides in elements, a device index and a stream, and return 0 or a
// cudaError_t; variant_cuda_error_text returns its text.
#pragma once

#include <cstddef>
#include <utility>

#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
#include "emulation.h"
#endif

#define VARIANT_CUDA_API extern "C" __attribute__((visibility("default")))

namespace variant {

template <class T>
struct Identity {
  using type = T;
};

#ifdef __CUDACC__

constexpr size_t kSharedBytesWithoutAsking = 48 * 1024;

// kernel<<<grid, block, shared_bytes, stream>>>(arguments...); no dimension of grid may be 0.
template <class... P>
int launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
           typename Identity<P>::type... arguments) {
  if (shared_bytes > kSharedBytesWithoutAsking) {
    const cudaError_t status = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                    cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                    static_cast<int>(shared_bytes));
    if (status != cudaSuccess) return status;
  }
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  return cudaGetLastError();
}

// Makes the device current during this object's lifetime.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    cudaGetDevice(&before_);
    if (before_ != device) cudaSetDevice(device);
    changed_ = before_ != device;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

inline int multiprocessors(int device) {
  int count = 0;
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

inline int l2_bytes(int device) {
  int bytes = 0;
  cudaDeviceGetAttribute(&bytes, cudaDevAttrL2CacheSize, device);
  return bytes;
}

#else

// Source location of a launch: the conversion from dim3 takes place there.
struct Grid {
  Grid(dim3 size, Site site = Site::here()) : size(size), site(site) {}
  Grid(unsigned x, Site site = Site::here()) : size(x), site(site) {}
  dim3 size;
  Site site;
};

template <class... P>
int launch(void (*kernel)(P...), Grid grid, dim3 block, size_t shared_bytes, void* stream,
           typename Identity<P>::type... arguments) {
  (void)stream;
  const auto thread = [&] { kernel(arguments...); };
  const emulation::Body body{
      [](const void* self) { (*static_cast<const decltype(thread)*>(self))(); }, &thread};
  emulation::Scheduler::get().run(reinterpret_cast<const void*>(kernel), grid.site, grid.size,
                                  block, shared_bytes, body);
  return 0;
}

class DeviceGuard {
 public:
  explicit DeviceGuard(int) {}
  ~DeviceGuard() {}
};

// Small numbers, so that small tests reach the paths that share work between blocks and those of
// several groups of heads.
inline int multiprocessors(int) { return 4; }
inline int l2_bytes(int) { return 12 * 1024; }

#endif

}  // namespace variant
