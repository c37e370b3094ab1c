// 16-bit floats, exhaustively where that is possible, and the intrinsics on integers.
#include <random>

#include "../primitives.h"
#include "check_cuda.h"

using namespace variant;

namespace {

template <class T>
void test_every_16_bit_value_survives_a_round_trip() {
  for (int bits = 0; bits < 65536; ++bits) {
    T x;
    x.bits = static_cast<uint16_t>(bits);
    const T back = float(x);
    if (std::isnan(float(x))) {
      CHECK(std::isnan(float(back)), "%04x", bits);
    } else {
      CHECK(back.bits == bits, "%04x became %04x", bits, back.bits);
    }
  }
}

void test_half_rounds_to_nearest_even() {
  for (int bits = 0; bits < 0x7c00; ++bits) {
    const double low = emulation::half_value(static_cast<uint16_t>(bits));
    const double high = bits == 0x7bff ? 65536.0 : emulation::half_value(bits + 1);
    const double middle = (low + high) / 2;
    const int even = bits % 2 ? bits + 1 : bits;
    CHECK(emulation::half_bits(middle) == even, "%04x", bits);
    CHECK(emulation::half_bits(middle - middle * 1e-9) == bits, "%04x", bits);
    CHECK(emulation::half_bits(middle + middle * 1e-9) == bits + 1, "%04x", bits);
  }
  CHECK(__float2half(-0.0f).bits == 0x8000, "minus zero");
  CHECK(__float2half(1e9f).bits == 0x7c00, "overflow is infinity");
}

void test_bfloat16_rounds_to_nearest_even(std::mt19937& engine) {
  for (int i = 0; i < 100000; ++i) {
    const float x = emulation::bits_as<float>(static_cast<uint32_t>(engine()));
    if (std::isnan(x)) continue;
    const uint16_t fast = emulation::bfloat16_bits(x);
    CHECK(fast == emulation::bfloat16_bits(double{x}), "%g", x);
  }
  CHECK(__nv_bfloat16(1.00390625f).bits == 0x3f80, "a tie goes to the even neighbour below");
  CHECK(__nv_bfloat16(1.01171875f).bits == 0x3f82, "a tie goes to the even neighbour above");
}

// Each operation against exact arithmetic (long double holds these sums and products) rounded once.
template <class T>
void test_arithmetic_rounds_once(std::mt19937& engine, int spread) {
  std::uniform_int_distribution<int> exponent(-spread, spread);
  std::normal_distribution<float> normal;
  const auto random = [&] { return T(std::ldexp(normal(engine), exponent(engine))); };
  const auto rounded = [](long double exact) {
    double x = static_cast<double>(exact);  // to odd, so that rounding again is harmless
    const long double lost = exact - x;
    uint64_t bits = emulation::bits_as<uint64_t>(x);
    if (lost != 0 && bits % 2 == 0) bits += (lost > 0) == (x > 0) ? 1 : -1;
    return T(emulation::bits_as<double>(bits));
  };
  for (int i = 0; i < 100000; ++i) {
    const T a = random(), b = random(), c = random();
    const long double x = float(a), y = float(b), z = float(c);
    CHECK((a + b).bits == rounded(x + y).bits, "%g + %g", float(a), float(b));
    CHECK(__hsub(a, b).bits == rounded(x - y).bits, "%g - %g", float(a), float(b));
    CHECK((a * b).bits == rounded(x * y).bits, "%g * %g", float(a), float(b));
    CHECK(__hfma(a, b, c).bits == rounded(x * y + z).bits, "fma(%g, %g, %g)", float(a), float(b),
          float(c));
  }
}

void test_pairs_keep_the_first_in_the_low_half() {
  CHECK(pack2<__half>(1.0f, 2.0f) == 0x40003c00u, "half");
  CHECK(pack2<__nv_bfloat16>(1.0f, 2.0f) == 0x40003f80u, "bfloat16");
  const float2 back = unpack2<__nv_bfloat16>(0x40003f80u);
  CHECK(back.x == 1.0f && back.y == 2.0f, "unpack");
  const uint32_t pair = pack2<__half>(1.5f, -2.0f), factors = pack2<__half>(4.0f, 0.5f);
  CHECK(multiply2<__half>(pair, factors) == pack2<__half>(6.0f, -1.0f), "multiply");
}

void test_bits() {
  CHECK(__clz(0) == 32 && __clz(1) == 31 && __clz(-1) == 0, "clz");
  CHECK(__clzll(0) == 64 && __clzll(1) == 63, "clzll");
  CHECK(__ffs(0) == 0 && __ffs(8) == 4, "ffs");
  CHECK(__popc(0xf0f0u) == 8 && __popcll(~0ull) == 64, "popc");
  CHECK(__brev(1u) == 0x80000000u && __brev(0x12345678u) == 0x1e6a2c48u, "brev");
  CHECK(__umulhi(0x80000000u, 6u) == 3u, "umulhi");
  CHECK(__umul64hi(1ull << 63, 6ull) == 3ull, "umul64hi");
  CHECK(__funnelshift_l(0x80000000u, 1u, 1) == 3u, "funnel shift left");
  CHECK(__funnelshift_r(0u, 1u, 4) == 0x10000000u, "funnel shift right");
  CHECK(__byte_perm(0x33221100u, 0x77665544u, 0x7531u) == 0x77553311u, "byte_perm");
  CHECK(__byte_perm(0x00000080u, 0u, 0x8888u) == 0xffffffffu, "byte_perm spreads a sign");
  CHECK(__float2int_rn(2.5f) == 2 && __float2int_rn(-3.5f) == -4, "to nearest even");
  CHECK(__float2int_rz(1e20f) == 2147483647 && __float2int_rz(NAN) == 0, "saturates");
  CHECK(__float2uint_rz(-1.0f) == 0u, "unsigned saturates");
  CHECK(min(1.0f, NAN) == 1.0f && max(NAN, 1.0f) == 1.0f, "a NaN loses");
  CHECK(ex2(3.0f) == 8.0f && ex2(-200.0f) == 0.0f && ex2(-130.0f) == 0.0f, "ex2");
}

}  // namespace

int main() {
  std::mt19937 engine(7);
  test_every_16_bit_value_survives_a_round_trip<__half>();
  test_every_16_bit_value_survives_a_round_trip<__nv_bfloat16>();
  test_half_rounds_to_nearest_even();
  test_bfloat16_rounds_to_nearest_even(engine);
  test_arithmetic_rounds_once<__half>(engine, 12);
  test_arithmetic_rounds_once<__nv_bfloat16>(engine, 18);
  test_pairs_keep_the_first_in_the_low_half();
  test_bits();
}
