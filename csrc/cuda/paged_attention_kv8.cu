// Paged attention over 8-bit pages.
#include "paged_attention_kv8.cuh"

VARIANT_CUDA_API int variant_cuda_paged_attention_kv8_forward(
    const variant::cuda::PagedAttentionKv8Args* args, int64_t args_bytes, int device,
    void* stream) {
  using namespace variant::cuda;
  if (args_bytes != sizeof(*args)) return kInvalidValue;
  const variant::DeviceGuard guard(device);
  return forward(PagedKv8Params(*args), stream);
}
