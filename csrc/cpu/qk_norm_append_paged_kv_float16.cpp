// qk_norm and append of float16 tokens. The norm is that of float32, rounded once.
#include "float16.h"
#include "qk_norm_append_plain.h"

namespace variant::VARIANT_ISA_NAMESPACE {
namespace {

inline Pair load(const FP16* p, Both<InOrder>) { return {load(p), load(p + kLanes)}; }
inline void store(FP16* p, Pair x, Both<InOrder>) {
  store(p, x.a);
  store(p + kLanes, x.b);
}
inline void stream(FP16* p, Pair x, Both<InOrder>) {
#if defined(__AVX512F__)
  _mm256_stream_si256((__m256i*)p, (__m256i)narrow_half(x.a));
  _mm256_stream_si256((__m256i*)(p + kLanes), (__m256i)narrow_half(x.b));
#elif defined(__AVX2__)
  _mm_stream_si128((__m128i*)p, (__m128i)narrow_half(x.a));
  _mm_stream_si128((__m128i*)(p + kLanes), (__m128i)narrow_half(x.b));
#else
  store(p, x, Both<InOrder>{});
#endif
}

}  // namespace

void qk_norm_append_paged_kv_float16(const QkNormAppendPagedKvArgs& a) { fused<FP16>(a); }

}  // namespace variant::VARIANT_ISA_NAMESPACE
