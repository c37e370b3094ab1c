// The Python module. Its functions take addresses, sizes and strides, and write through the
// addresses. The launchers in variant_kernels/cpu_ops have checked them.
//
// A view of a tensor is a tuple (address, stride, stride, ...); strides are in elements.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>

#include "cpu/isa.h"
#include "include/values.h"

namespace py = pybind11;

namespace variant {
namespace {

using RowTuple = std::tuple<uintptr_t, int64_t>;
using TokenTuple = std::tuple<uintptr_t, int64_t, int64_t>;
using HeadTuple = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}
RowView view(const RowTuple& t) { return {pointer<void>(std::get<0>(t)), std::get<1>(t)}; }
TokenView view(const TokenTuple& t) {
  return {pointer<void>(std::get<0>(t)), std::get<1>(t), std::get<2>(t)};
}
HeadView view(const HeadTuple& t) {
  return {pointer<void>(std::get<0>(t)), std::get<1>(t), std::get<2>(t), std::get<3>(t)};
}
ScaleView scale_view(const TokenTuple& t) {
  return {pointer<uint8_t>(std::get<0>(t)), std::get<1>(t), std::get<2>(t)};
}

template <class Args>
void run(void (*KernelTable::*kernel)(const Args&), const Args& args) {
  const KernelTable& table = *active_isa().table;
  py::gil_scoped_release released;
  (table.*kernel)(args);
}

void adaln_forward_binding(std::tuple<int64_t, int64_t, int64_t> shape_BTC, TokenTuple x,
                           RowTuple scale, RowTuple shift, uintptr_t y, uintptr_t mean,
                           uintptr_t rstd, float eps, int x_dtype, int value_dtype, int threads) {
  const auto [batch, tokens, width] = shape_BTC;
  run(&KernelTable::adaln_forward,
      AdaLNForwardArgs{batch, tokens, width, view(x), view(scale), view(shift), pointer<void>(y),
                       pointer<float>(mean), pointer<float>(rstd), eps, DType(x_dtype),
                       DType(value_dtype), threads});
}

void adaln_backward_binding(std::tuple<int64_t, int64_t, int64_t> shape_BTC, TokenTuple grad_y,
                            TokenTuple x, RowTuple scale, uintptr_t mean, uintptr_t rstd,
                            uintptr_t grad_x, uintptr_t grad_scale, uintptr_t grad_shift,
                            int x_dtype, int value_dtype, int threads) {
  const auto [batch, tokens, width] = shape_BTC;
  run(&KernelTable::adaln_backward,
      AdaLNBackwardArgs{batch, tokens, width, view(grad_y), view(x), view(scale),
                        pointer<float>(mean), pointer<float>(rstd), pointer<void>(grad_x),
                        pointer<void>(grad_scale), pointer<void>(grad_shift), DType(x_dtype),
                        DType(value_dtype), threads});
}

void gated_adaln_forward_binding(std::tuple<int64_t, int64_t, int64_t> shape_BTC, TokenTuple x,
                                 TokenTuple y, RowTuple gate, RowTuple scale, RowTuple shift,
                                 uintptr_t x_out, uintptr_t h, uintptr_t mean, uintptr_t rstd,
                                 float eps, int x_dtype, int value_dtype, int threads) {
  const auto [batch, tokens, width] = shape_BTC;
  run(&KernelTable::gated_adaln_forward,
      GatedAdaLNForwardArgs{batch, tokens, width, view(x), view(y), view(gate), view(scale),
                            view(shift), pointer<void>(x_out), pointer<void>(h),
                            pointer<float>(mean), pointer<float>(rstd), eps, DType(x_dtype),
                            DType(value_dtype), threads});
}

void gated_adaln_backward_binding(std::tuple<int64_t, int64_t, int64_t> shape_BTC,
                                  TokenTuple grad_x_out, TokenTuple grad_h, TokenTuple x_out,
                                  TokenTuple y, RowTuple gate, RowTuple scale, uintptr_t mean,
                                  uintptr_t rstd, uintptr_t grad_x, uintptr_t grad_y,
                                  uintptr_t grad_gate, uintptr_t grad_scale, uintptr_t grad_shift,
                                  int x_dtype, int value_dtype, int threads) {
  const auto [batch, tokens, width] = shape_BTC;
  run(&KernelTable::gated_adaln_backward,
      GatedAdaLNBackwardArgs{
          batch, tokens, width, view(grad_x_out), view(grad_h), view(x_out), view(y), view(gate),
          view(scale), pointer<float>(mean), pointer<float>(rstd), pointer<void>(grad_x),
          pointer<void>(grad_y), pointer<void>(grad_gate), pointer<void>(grad_scale),
          pointer<void>(grad_shift), DType(x_dtype), DType(value_dtype), threads});
}

using HeadShape = std::tuple<int64_t, int64_t, int64_t, int64_t>;

void qk_norm_forward_binding(HeadShape shape_BTHD, HeadTuple q, HeadTuple k, uintptr_t scale_mul,
                             uintptr_t q_out, uintptr_t k_out, int dtype, int threads) {
  const auto [batch, tokens, heads, head_dim] = shape_BTHD;
  run(&KernelTable::qk_norm_forward,
      QkNormForwardArgs{batch, tokens, heads, head_dim, view(q), view(k), pointer<float>(scale_mul),
                        pointer<void>(q_out), pointer<void>(k_out), DType(dtype), threads});
}

void qk_norm_backward_binding(HeadShape shape_BTHD, HeadTuple grad_q, HeadTuple grad_k, HeadTuple q,
                              HeadTuple k, uintptr_t scale_mul, uintptr_t dq, uintptr_t dk,
                              uintptr_t dscale_mul, int dtype, int threads) {
  const auto [batch, tokens, heads, head_dim] = shape_BTHD;
  run(&KernelTable::qk_norm_backward,
      QkNormBackwardArgs{batch, tokens, heads, head_dim, view(grad_q), view(grad_k), view(q),
                         view(k), pointer<float>(scale_mul), pointer<void>(dq), pointer<void>(dk),
                         pointer<float>(dscale_mul), DType(dtype), threads});
}

void gelu_forward_binding(int64_t count, uintptr_t x, uintptr_t y, int dtype, int threads) {
  run(&KernelTable::gelu_forward,
      GeluForwardArgs{count, pointer<void>(x), pointer<void>(y), DType(dtype), threads});
}

void gelu_backward_binding(int64_t count, uintptr_t grad_y, uintptr_t x, uintptr_t grad_x,
                           int dtype, int threads) {
  run(&KernelTable::gelu_backward, GeluBackwardArgs{count, pointer<void>(grad_y), pointer<void>(x),
                                                    pointer<void>(grad_x), DType(dtype), threads});
}

void append_paged_kv_binding(HeadShape shape_BTHD, int64_t page_size, HeadTuple k, HeadTuple v,
                             HeadTuple k_pages, HeadTuple v_pages, uintptr_t slots,
                             int element_bytes, int threads) {
  const auto [batch, tokens, heads, head_dim] = shape_BTHD;
  const auto [k_data, k_page, k_slot, k_head] = k_pages;
  const auto [v_data, v_page, v_slot, v_head] = v_pages;
  run(&KernelTable::append_paged_kv,
      AppendPagedKvArgs{batch, tokens, heads, head_dim, page_size, view(k), view(v),
                        pointer<void>(k_data), pointer<void>(v_data), k_page, k_slot, k_head,
                        v_page, v_slot, v_head, pointer<int64_t>(slots), element_bytes, threads});
}

QkNormAppendPagedKvArgs qk_norm_append_arguments(HeadShape shape_BTHD, int64_t page_size,
                                                 HeadTuple q, HeadTuple k, HeadTuple v,
                                                 uintptr_t scale_mul, uintptr_t q_out,
                                                 HeadTuple k_pages, HeadTuple v_pages,
                                                 uintptr_t slots, int dtype, int threads) {
  const auto [batch, tokens, heads, head_dim] = shape_BTHD;
  const auto [k_data, k_page, k_slot, k_head] = k_pages;
  const auto [v_data, v_page, v_slot, v_head] = v_pages;
  return {batch,
          tokens,
          heads,
          head_dim,
          page_size,
          view(q),
          view(k),
          view(v),
          pointer<float>(scale_mul),
          pointer<void>(q_out),
          pointer<void>(k_data),
          pointer<void>(v_data),
          k_page,
          k_slot,
          k_head,
          v_page,
          v_slot,
          v_head,
          pointer<int64_t>(slots),
          DType(dtype),
          threads};
}

void qk_norm_append_paged_kv_binding(HeadShape shape_BTHD, int64_t page_size, HeadTuple q,
                                     HeadTuple k, HeadTuple v, uintptr_t scale_mul, uintptr_t q_out,
                                     HeadTuple k_pages, HeadTuple v_pages, uintptr_t slots,
                                     int dtype, int threads) {
  run(&KernelTable::qk_norm_append_paged_kv,
      qk_norm_append_arguments(shape_BTHD, page_size, q, k, v, scale_mul, q_out, k_pages, v_pages,
                               slots, dtype, threads));
}

void qk_norm_append_paged_kv8_binding(HeadShape shape_BTHD, int64_t page_size, HeadTuple q,
                                      HeadTuple k, HeadTuple v, uintptr_t scale_mul,
                                      uintptr_t q_out, HeadTuple k_pages, HeadTuple v_pages,
                                      TokenTuple k_scales, TokenTuple v_scales, uintptr_t slots,
                                      int dtype, int threads) {
  run(&KernelTable::qk_norm_append_paged_kv8,
      QkNormAppendPagedKv8Args{
          qk_norm_append_arguments(shape_BTHD, page_size, q, k, v, scale_mul, q_out, k_pages,
                                   v_pages, slots, dtype, threads),
          scale_view(k_scales), scale_view(v_scales)});
}

PagedAttentionForwardArgs paged_attention_arguments(HeadShape shape_BTHD, int64_t page_size,
                                                    HeadTuple q, HeadTuple k_pages,
                                                    HeadTuple v_pages, RowTuple page_table,
                                                    uintptr_t kv_lens, uintptr_t out,
                                                    float softmax_scale, int dtype, int threads) {
  const auto [batch, tokens, heads, head_dim] = shape_BTHD;
  return {batch,
          tokens,
          heads,
          head_dim,
          page_size,
          view(q),
          view(k_pages),
          view(v_pages),
          pointer<int32_t>(std::get<0>(page_table)),
          std::get<1>(page_table),
          pointer<int32_t>(kv_lens),
          pointer<void>(out),
          softmax_scale,
          DType(dtype),
          threads};
}

void paged_attention_forward_binding(HeadShape shape_BTHD, int64_t page_size, HeadTuple q,
                                     HeadTuple k_pages, HeadTuple v_pages, RowTuple page_table,
                                     uintptr_t kv_lens, uintptr_t out, float softmax_scale,
                                     int dtype, int threads) {
  run(&KernelTable::paged_attention_forward,
      paged_attention_arguments(shape_BTHD, page_size, q, k_pages, v_pages, page_table, kv_lens,
                                out, softmax_scale, dtype, threads));
}

void paged_attention_kv8_forward_binding(HeadShape shape_BTHD, int64_t page_size, HeadTuple q,
                                         HeadTuple k_pages, HeadTuple v_pages, TokenTuple k_scales,
                                         TokenTuple v_scales, RowTuple page_table,
                                         uintptr_t kv_lens, uintptr_t out, float softmax_scale,
                                         int dtype, int threads) {
  run(&KernelTable::paged_attention_kv8_forward,
      PagedAttentionKv8Args{
          paged_attention_arguments(shape_BTHD, page_size, q, k_pages, v_pages, page_table, kv_lens,
                                    out, softmax_scale, dtype, threads),
          scale_view(k_scales), scale_view(v_scales)});
}

void block_causal_attention_forward_binding(HeadShape shape_BLHD, HeadTuple q, HeadTuple k,
                                            HeadTuple v, const std::vector<int64_t>& scale_lengths,
                                            uintptr_t out, uintptr_t lse, float softmax_scale,
                                            int dtype, int threads) {
  const auto [batch, length, heads, head_dim] = shape_BLHD;
  run(&KernelTable::block_causal_attention_forward,
      BlockCausalForwardArgs{batch, length, heads, head_dim, view(q), view(k), view(v),
                             scale_lengths.data(), static_cast<int64_t>(scale_lengths.size()),
                             pointer<void>(out), pointer<float>(lse), softmax_scale, DType(dtype),
                             threads});
}

void block_causal_attention_backward_binding(HeadShape shape_BLHD, HeadTuple grad_out, HeadTuple q,
                                             HeadTuple k, HeadTuple v, HeadTuple out, uintptr_t lse,
                                             const std::vector<int64_t>& scale_lengths,
                                             uintptr_t dq, uintptr_t dk, uintptr_t dv,
                                             float softmax_scale, int dtype, int threads) {
  const auto [batch, length, heads, head_dim] = shape_BLHD;
  run(&KernelTable::block_causal_attention_backward,
      BlockCausalBackwardArgs{batch, length, heads, head_dim, view(grad_out), view(q), view(k),
                              view(v), view(out), pointer<float>(lse), scale_lengths.data(),
                              static_cast<int64_t>(scale_lengths.size()), pointer<void>(dq),
                              pointer<void>(dk), pointer<void>(dv), softmax_scale, DType(dtype),
                              threads});
}

// Returns (status, row) of the first row that cannot be sampled; status 0 if every row can.
std::tuple<int, int64_t> sample_tokens_binding(std::tuple<int64_t, int64_t, int64_t> shape_BTV,
                                               TokenTuple logits, double guidance, int64_t top_k,
                                               double top_p, uint64_t seed, uintptr_t image_ids,
                                               int64_t position, uintptr_t exponential,
                                               uintptr_t out, int dtype, int threads) {
  const auto [batch, tokens, vocab] = shape_BTV;
  SampleError error{SampleStatus::kOk, 0};
  run(&KernelTable::sample_tokens,
      SampleTokensArgs{batch, tokens, vocab, view(logits), guidance, top_k, top_p, seed,
                       pointer<int64_t>(image_ids), position, pointer<float>(exponential),
                       pointer<int64_t>(out), &error, DType(dtype), threads});
  return {static_cast<int>(error.status), error.row};
}

bool fits_page_table_binding(std::tuple<int64_t, int64_t> shape_BM, TokenTuple page_table,
                             RowTuple kv_lens, int64_t num_pages, int64_t page_size) {
  const auto [batch, entries] = shape_BM;
  const auto [table, row_stride, column_stride] = page_table;
  const auto [lens, stride] = kv_lens;
  return fits_page_table(batch, entries, {pointer<int32_t>(table), row_stride, column_stride},
                         {pointer<int32_t>(lens), stride}, num_pages, page_size);
}

bool fits_slots_binding(std::tuple<int64_t, int64_t> shape_BT, TokenTuple slots,
                        int64_t num_slots) {
  const auto [batch, tokens] = shape_BT;
  const auto [data, row_stride, column_stride] = slots;
  return fits_slots(batch, tokens, {pointer<int64_t>(data), row_stride, column_stride}, num_slots);
}

py::dict build_info() {
  py::dict info;
  py::list built, supported;
  for (const Isa& isa : built_isas()) {
    built.append(isa.name);
    if (isa.supported()) supported.append(isa.name);
  }
  info["version"] = VARIANT_VERSION;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  info["isas_built"] = built;
  info["isas_supported"] = supported;
  info["isa"] = active_isa().name;
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels; call them through variant_kernels.cpu_ops.";
  m.def("build_info", &build_info);
  m.def("adaln_forward", &adaln_forward_binding);
  m.def("adaln_backward", &adaln_backward_binding);
  m.def("gated_adaln_forward", &gated_adaln_forward_binding);
  m.def("gated_adaln_backward", &gated_adaln_backward_binding);
  m.def("qk_norm_forward", &qk_norm_forward_binding);
  m.def("qk_norm_backward", &qk_norm_backward_binding);
  m.def("gelu_forward", &gelu_forward_binding);
  m.def("gelu_backward", &gelu_backward_binding);
  m.def("append_paged_kv", &append_paged_kv_binding);
  m.def("qk_norm_append_paged_kv", &qk_norm_append_paged_kv_binding);
  m.def("qk_norm_append_paged_kv8", &qk_norm_append_paged_kv8_binding);
  m.def("paged_attention_forward", &paged_attention_forward_binding);
  m.def("paged_attention_kv8_forward", &paged_attention_kv8_forward_binding);
  m.def("block_causal_attention_forward", &block_causal_attention_forward_binding);
  m.def("block_causal_attention_backward", &block_causal_attention_backward_binding);
  m.def("sample_tokens", &sample_tokens_binding);
  m.def("fits_page_table", &fits_page_table_binding);
  m.def("fits_slots", &fits_slots_binding);
}

}  // namespace variant
