// A few lanes for each (token, head) write its query to the output, its key and value to their
// slot.
#include "qk_norm_append_paged_kv.h"

#include <type_traits>

#include "launch.h"
#include "qk_norm_row.cuh"

namespace variant::cuda {
namespace {

template <class T, int kLanes, bool kAligned, bool kNormalise>
__global__ void __launch_bounds__(kRowThreads)
    qk_norm_append_paged_kv_kernel(QkNormAppendPagedKvCudaArgs all) {
  const QkNormAppendPagedKvArgs& a = all.op;
  const int64_t column = threadIdx.x % kLanes * kEight;
  const RowIndex index = index_of_row<kLanes>(a);
  const int64_t r = index.r, b = index.b, t = index.t, h = index.h;
  // Lanes without work also call the reductions.
  const bool works = index.inside && column < a.head_dim;
  const int64_t slot = works ? a.slots[b * a.tokens + t] : -1;
  const bool stored = slot >= 0 && slot < all.num_pages * a.page_size;
  // All loads are issued first, so that their latencies overlap.
  float q[kEight] = {}, k[kEight] = {}, v[kEight] = {};
  if (stored) {
    load_eight<kAligned>(row<T>(a.k, b, t, h) + column, k);
    load_eight<kAligned>(row<T>(a.v, b, t, h) + column, v);
  }
  if constexpr (kNormalise) {
    float factor = 0.0f;
    if (works) {
      load_eight<kAligned>(row<T>(a.q, b, t, h) + column, q);
      factor = query_factor(a.scale_mul, h);
    }
    normalise<T, kLanes>(q, factor);
    normalise<T, kLanes>(k, 1.0f);
    if (works) store_eight<true>(static_cast<T*>(a.q_out) + r * a.head_dim + column, q);
  }
  if (!stored) return;
  const int64_t page = slot / a.page_size, offset = slot % a.page_size;
  store_eight<kAligned>(static_cast<T*>(a.k_pages) + page * a.k_page_stride +
                            offset * a.k_slot_stride + h * a.k_head_stride + column,
                        k);
  store_eight<kAligned>(static_cast<T*>(a.v_pages) + page * a.v_page_stride +
                            offset * a.v_slot_stride + h * a.v_head_stride + column,
                        v);
}

template <class T, int kLanes, bool kAligned>
int launch_rows(const QkNormAppendPagedKvCudaArgs& all, void* stream) {
  const QkNormAppendPagedKvArgs& a = all.op;
  const int64_t rows = a.batch * a.tokens * a.heads;
  if (rows > kMostRows) return kInvalidValue;
  return launch(a.scale_mul != nullptr ? qk_norm_append_paged_kv_kernel<T, kLanes, kAligned, true>
                                       : qk_norm_append_paged_kv_kernel<T, kLanes, kAligned, false>,
                dim3(static_cast<unsigned>(ceil_div(rows, kRowThreads / kLanes))),
                dim3(kRowThreads), 0, stream, all);
}

int fused(const QkNormAppendPagedKvCudaArgs& all, void* stream) {
  const QkNormAppendPagedKvArgs& a = all.op;
  const int64_t bytes = bytes_of(a.dtype);
  const HeadView k_pages = {a.k_pages, a.k_page_stride, a.k_slot_stride, a.k_head_stride};
  const HeadView v_pages = {a.v_pages, a.v_page_stride, a.v_slot_stride, a.v_head_stride};
  const bool aligned = is_aligned(a.q, bytes) && is_aligned(a.k, bytes) && is_aligned(a.v, bytes) &&
                       is_aligned(k_pages, bytes) && is_aligned(v_pages, bytes);
  return with_type(a.dtype, [&](auto element) {
    using T = decltype(element);
    return with_lanes(a.head_dim, [&](auto lanes) {
      constexpr int kLanes = decltype(lanes)::value;
      return aligned ? launch_rows<T, kLanes, true>(all, stream)
                     : launch_rows<T, kLanes, false>(all, stream);
    });
  });
}

}  // namespace
}  // namespace variant::cuda

VARIANT_CUDA_API int variant_cuda_qk_norm_append_paged_kv(
    const variant::cuda::QkNormAppendPagedKvCudaArgs* args, int64_t args_bytes, int device,
    void* stream) {
  if (args_bytes != sizeof(*args)) return variant::cuda::kInvalidValue;
  const variant::DeviceGuard guard(device);
  return variant::cuda::fused(*args, stream);
}
