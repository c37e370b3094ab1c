// Paged attention over pages of the queries' dtype.
#include "paged_attention.cuh"

VARIANT_CUDA_API int variant_cuda_paged_attention_forward(
    const variant::cuda::PagedAttentionArgs* args, int64_t args_bytes, int device, void* stream) {
  using namespace variant::cuda;
  if (args_bytes != sizeof(*args)) return kInvalidValue;
  const variant::DeviceGuard guard(device);
  PagedParams p = {};
  p.a = *args;
  return forward(p, stream);
}
