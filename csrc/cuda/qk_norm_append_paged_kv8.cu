// qk_norm_append_paged_kv into 8-bit pages; without a norm it is append_paged_kv. A few lanes for
// each (token, head) reduce its largest magnitude and use one scale.
#include "kv8.cuh"
#include "launch.h"
#include "qk_norm_append_paged_kv.h"
#include "qk_norm_row.cuh"

namespace variant::cuda {
namespace {

struct LargestBits {
  __device__ uint32_t operator()(uint32_t a, uint32_t b) const { return a > b ? a : b; }
};

// Addresses of a lane's eight codes and of the row's scale. kLanes lanes call together.
template <int kLanes, bool kAligned>
__device__ inline void store_row(const float (&x)[kEight], bool stored, uint8_t* codes,
                                 uint8_t* scale_to) {
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kEight; ++i) {
    largest = LargestBits()(largest, __float_as_uint(x[i]) & kMagnitude32);
  }
  largest = reduce_lanes<kLanes>(largest, LargestBits());
  if (!stored) return;
  const uint32_t scale = scale_of(largest);
  const float reciprocal = reciprocal_of_scale(scale);
  uint32_t words[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < kEight; ++i) words[i / 4] |= e4m3_of(x[i] * reciprocal) << (i % 4 * 8);
  if constexpr (kAligned) {
    *reinterpret_cast<uint2*>(codes) = make_uint2(words[0], words[1]);
  } else {
#pragma unroll
    for (int i = 0; i < kEight; ++i) codes[i] = static_cast<uint8_t>(words[i / 4] >> i % 4 * 8);
  }
  if (threadIdx.x % kLanes == 0) store_scale(scale_to, scale);
}

template <class T, int kLanes, bool kAligned>
__global__ void __launch_bounds__(kRowThreads)
    qk_norm_append_paged_kv8_kernel(QkNormAppendPagedKv8Args args) {
  const QkNormAppendPagedKvArgs& a = args.all.op;
  const int64_t column = threadIdx.x % kLanes * kEight;
  const RowIndex index = index_of_row<kLanes>(a);
  const int64_t r = index.r, b = index.b, t = index.t, h = index.h;
  // Lanes without work also call the reductions.
  const bool works = index.inside && column < a.head_dim;
  const int64_t slot = works ? a.slots[b * a.tokens + t] : -1;
  const bool stored = slot >= 0 && slot < args.all.num_pages * a.page_size;
  float q[kEight] = {}, k[kEight] = {}, v[kEight] = {};
  if (stored) {
    load_eight<kAligned>(row<T>(a.k, b, t, h) + column, k);
    load_eight<kAligned>(row<T>(a.v, b, t, h) + column, v);
  }
  if (a.scale_mul != nullptr) {
    float factor = 0.0f;
    if (works) {
      load_eight<kAligned>(row<T>(a.q, b, t, h) + column, q);
      factor = query_factor(a.scale_mul, h);
    }
    normalise<T, kLanes>(q, factor);
    normalise<T, kLanes>(k, 1.0f);
    if (works) store_eight<true>(static_cast<T*>(a.q_out) + r * a.head_dim + column, q);
    // The value that qk_norm returns.
#pragma unroll
    for (int i = 0; i < kEight; ++i) k[i] = widen(narrow<T>(k[i]));
  }
  const int64_t page = stored ? slot / a.page_size : 0, offset = stored ? slot % a.page_size : 0;
  store_row<kLanes, kAligned>(
      k, stored,
      static_cast<uint8_t*>(a.k_pages) + page * a.k_page_stride + offset * a.k_slot_stride +
          h * a.k_head_stride + column,
      args.k_scales + page * args.k_scale_page_stride + offset * args.k_scale_slot_stride + h);
  store_row<kLanes, kAligned>(
      v, stored,
      static_cast<uint8_t*>(a.v_pages) + page * a.v_page_stride + offset * a.v_slot_stride +
          h * a.v_head_stride + column,
      args.v_scales + page * args.v_scale_page_stride + offset * args.v_scale_slot_stride + h);
}

template <class T, int kLanes, bool kAligned>
int launch_rows(const QkNormAppendPagedKv8Args& args, void* stream) {
  const QkNormAppendPagedKvArgs& a = args.all.op;
  const int64_t rows = a.batch * a.tokens * a.heads;
  if (rows > kMostRows) return kInvalidValue;
  return launch(qk_norm_append_paged_kv8_kernel<T, kLanes, kAligned>,
                dim3(static_cast<unsigned>(ceil_div(rows, kRowThreads / kLanes))),
                dim3(kRowThreads), 0, stream, args);
}

int append_rows(const QkNormAppendPagedKv8Args& args, void* stream) {
  const QkNormAppendPagedKvArgs& a = args.all.op;
  const int64_t bytes = bytes_of(a.dtype);
  const HeadView k_pages = {a.k_pages, a.k_page_stride, a.k_slot_stride, a.k_head_stride};
  const HeadView v_pages = {a.v_pages, a.v_page_stride, a.v_slot_stride, a.v_head_stride};
  const bool q_aligned = a.scale_mul == nullptr || is_aligned(a.q, bytes);
  const bool aligned = q_aligned && is_aligned(a.k, bytes) && is_aligned(a.v, bytes) &&
                       starts_at_eights(k_pages) && starts_at_eights(v_pages);
  return with_type(a.dtype, [&](auto element) {
    using T = decltype(element);
    return with_lanes(a.head_dim, [&](auto lanes) {
      constexpr int kLanes = decltype(lanes)::value;
      return aligned ? launch_rows<T, kLanes, true>(args, stream)
                     : launch_rows<T, kLanes, false>(args, stream);
    });
  });
}

}  // namespace
}  // namespace variant::cuda

VARIANT_CUDA_API int variant_cuda_qk_norm_append_paged_kv8(
    const variant::cuda::QkNormAppendPagedKv8Args* args, int64_t args_bytes, int device,
    void* stream) {
  if (args_bytes != sizeof(*args)) return variant::cuda::kInvalidValue;
  const variant::DeviceGuard guard(device);
  return variant::cuda::append_rows(*args, stream);
}
