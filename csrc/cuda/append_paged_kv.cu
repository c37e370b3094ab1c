// Copies the keys and values of new tokens into their slots: one row of threads per token, each
// thread moving the widest vector (16 bytes in practice) that every address allows.
#include "../include/append_paged_kv.h"

#include "launch.h"
#include "primitives.h"

namespace variant {
namespace {

constexpr unsigned kThreads = 256;

// All sizes are in units of one vector, so the kernel needs neither dtype nor head_dim.
struct AppendVectors {
  int64_t rows, tokens, slots, page_size;
  int heads, head_vectors;
  HeadView k, v;  // strides in vectors
  void *k_pages, *v_pages;
  int64_t k_page_stride, k_slot_stride, k_head_stride;
  int64_t v_page_stride, v_slot_stride, v_head_stride;
  const int64_t* slot_of_row;
};

template <class Vector>
__global__ void __launch_bounds__(kThreads) append_paged_kv_kernel(const AppendVectors a) {
  const int vectors = a.heads * a.head_vectors;
  for (int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y; row < a.rows;
       row += int64_t{gridDim.x} * blockDim.y) {
    const int64_t slot = a.slot_of_row[row];
    // A slot past the last page is an error of the caller; it must not write outside the pool.
    if (slot < 0 || slot >= a.slots) continue;
    const int64_t b = row / a.tokens, t = row % a.tokens;
    const int64_t page = slot / a.page_size, offset = slot % a.page_size;
    const Vector* k_from =
        static_cast<const Vector*>(a.k.data) + b * a.k.batch_stride + t * a.k.token_stride;
    const Vector* v_from =
        static_cast<const Vector*>(a.v.data) + b * a.v.batch_stride + t * a.v.token_stride;
    Vector* k_to =
        static_cast<Vector*>(a.k_pages) + page * a.k_page_stride + offset * a.k_slot_stride;
    Vector* v_to =
        static_cast<Vector*>(a.v_pages) + page * a.v_page_stride + offset * a.v_slot_stride;
    for (int i = threadIdx.x; i < vectors; i += blockDim.x) {
      const int head = i / a.head_vectors, part = i % a.head_vectors;
      const Vector k = k_from[head * a.k.head_stride + part];
      const Vector v = v_from[head * a.v.head_stride + part];
      k_to[head * a.k_head_stride + part] = k;
      v_to[head * a.v_head_stride + part] = v;
    }
  }
}

// The largest power of two up to 16 that divides every address and every distance in bytes.
int vector_bytes(const AppendPagedKvArgs& a) {
  const int64_t strides = a.k.batch_stride | a.k.token_stride | a.k.head_stride | a.v.batch_stride |
                          a.v.token_stride | a.v.head_stride | a.k_page_stride | a.k_slot_stride |
                          a.k_head_stride | a.v_page_stride | a.v_slot_stride | a.v_head_stride |
                          a.head_dim;
  const uint64_t all =
      static_cast<uint64_t>(strides * a.element_bytes) | reinterpret_cast<uintptr_t>(a.k.data) |
      reinterpret_cast<uintptr_t>(a.v.data) | reinterpret_cast<uintptr_t>(a.k_pages) |
      reinterpret_cast<uintptr_t>(a.v_pages);
  int bytes = 16;
  while (all % bytes) bytes /= 2;
  return bytes;
}

template <class Vector>
int launch_vectors(const AppendPagedKvArgs& a, int64_t pages, void* stream) {
  const auto units = [&](int64_t elements) {
    return elements * a.element_bytes / static_cast<int64_t>(sizeof(Vector));
  };
  const auto view = [&](const HeadView& x) {
    return HeadView{x.data, units(x.batch_stride), units(x.token_stride), units(x.head_stride)};
  };
  const int64_t head_vectors = units(a.head_dim), vectors = a.heads * head_vectors;
  const int64_t rows = a.batch * a.tokens;
  if (rows == 0 || vectors == 0) return 0;
  const unsigned across =
      vectors < kThreads ? static_cast<unsigned>((vectors + 31) / 32 * 32) : kThreads;
  const dim3 block(across, kThreads / across);
  const int64_t blocks = (rows + block.y - 1) / block.y, max_blocks = 0x7fffffff;
  const dim3 grid(static_cast<unsigned>(blocks < max_blocks ? blocks : max_blocks));
  const AppendVectors arguments{rows,
                                a.tokens,
                                pages * a.page_size,
                                a.page_size,
                                static_cast<int>(a.heads),
                                static_cast<int>(head_vectors),
                                view(a.k),
                                view(a.v),
                                a.k_pages,
                                a.v_pages,
                                units(a.k_page_stride),
                                units(a.k_slot_stride),
                                units(a.k_head_stride),
                                units(a.v_page_stride),
                                units(a.v_slot_stride),
                                units(a.v_head_stride),
                                a.slots};
  return launch(append_paged_kv_kernel<Vector>, grid, block, 0, stream, arguments);
}

}  // namespace
}  // namespace variant

// args->num_threads is not read. element_bytes: 1, 2 or 4. pages: number of pages in the storage;
// slots beyond them are skipped.
VARIANT_CUDA_API int variant_cuda_append_paged_kv(const variant::AppendPagedKvArgs* args,
                                                  int64_t pages, int device, void* stream) {
  using namespace variant;
  const DeviceGuard guard(device);
  switch (vector_bytes(*args)) {
    case 16:
      return launch_vectors<uint4>(*args, pages, stream);
    case 8:
      return launch_vectors<uint2>(*args, pages, stream);
    case 4:
      return launch_vectors<uint32_t>(*args, pages, stream);
    case 2:
      return launch_vectors<uint16_t>(*args, pages, stream);
    default:
      return launch_vectors<uint8_t>(*args, pages, stream);
  }
}
