// 8-bit keys and values: every code and scale against exact arithmetic, then the kernel that rounds
// rows and writes them into pages.
#include <algorithm>

#include "../qk_norm_append_paged_kv8.cu"
#include "kv8_codes.h"
#include "tensors.h"

using namespace variant;
using namespace variant::test;

namespace {

void test_every_code_is_read_and_written_exactly() {
  for (int code = 0; code < 256; ++code) {
    const double exact = exact_value(static_cast<uint8_t>(code));
    const float value = cuda::value_of_e4m3(code);
    if (std::isnan(exact)) {
      CHECK(std::isnan(value), "%02x: got %g", code, static_cast<double>(value));
      continue;
    }
    CHECK(value == exact && std::signbit(value) == (code >= 0x80), "%02x: got %g, expected %g",
          code, static_cast<double>(value), exact);
    CHECK(cuda::e4m3_of(value) == static_cast<uint32_t>(code), "%02x", code);
  }
  CHECK(cuda::e4m3_of(NAN) == 0x7f && cuda::e4m3_of(-INFINITY) == 0xff, "not finite");
}

void test_numbers_between_two_codes_go_to_the_nearest_or_the_even() {
  const std::vector<double>& all = e4m3_magnitudes();
  for (size_t i = 0; i + 1 < all.size(); ++i) {
    const float middle = static_cast<float>((all[i] + all[i + 1]) / 2);
    for (const float x : {middle, std::nextafter(middle, 0.0f), std::nextafter(middle, 500.0f)}) {
      CHECK(cuda::e4m3_of(x) == exact_code(x), "%g", static_cast<double>(x));
      CHECK(cuda::e4m3_of(-x) == exact_code(-x), "%g", static_cast<double>(-x));
    }
  }
  CHECK(cuda::e4m3_of(1e-45f) == 0 && cuda::e4m3_of(-1e-45f) == 0x80, "tiny");
}

void test_a_scale_is_the_smallest_that_holds_its_row() {
  for (int exponent = -149; exponent < 128; ++exponent) {
    for (const float mantissa : {1.0f, 1.75f, std::nextafter(1.75f, 2.0f), 1.9999f}) {
      const float x = std::ldexp(mantissa, exponent);
      CHECK(cuda::scale_of(__float_as_uint(x)) == exact_row_scale(x), "%g", static_cast<double>(x));
    }
  }
  CHECK(cuda::scale_of(0) == 1, "zero");
  for (int scale = 1; scale < 248; ++scale) {
    CHECK(cuda::value_of_scale(scale) == exact_scale(scale), "%d", scale);
    CHECK(cuda::reciprocal_of_scale(scale) * exact_scale(scale) == 1.0, "1 / %d", scale);
  }
}

// Products with every scale from first to last, rounded once where T does not hold them.
template <class T>
void test_codes_widen_to_16_bits(int first, int last) {
  for (int scale = first; scale <= last; ++scale) {
    for (int begin = 0; begin < 256; begin += 16) {
      uint8_t codes[16];
      for (int i = 0; i < 16; ++i) codes[i] = static_cast<uint8_t>(begin + i);
      uint4 raw;
      std::memcpy(&raw, codes, 16);
      uint32_t pairs[8];
      cuda::widen_sixteen<T>(raw, scale, pairs);
      T got[16];
      std::memcpy(got, pairs, 32);
      for (int i = 0; i < 16; ++i) {
        const T expected = T(exact_value(codes[i]) * exact_scale(scale));
        const bool same =
            std::isnan(widen(expected)) ? std::isnan(widen(got[i])) : got[i].bits == expected.bits;
        CHECK(same, "%s %02x * 2^%d: got %g, expected %g", name_of<T>(), codes[i], scale - 127,
              static_cast<double>(widen(got[i])), static_cast<double>(widen(expected)));
      }
    }
  }
  uint32_t pairs[8];
  cuda::widen_sixteen<T>(make_uint4(0, 0, 0, 0), 255, pairs);
  CHECK(std::isnan(unpack2<T>(pairs[0]).x), "a scale of 255 is NaN");
}

// A row as the contract rounds it.
struct Rounded {
  uint8_t scale;
  std::vector<uint8_t> codes;

  explicit Rounded(const std::vector<double>& x) {
    double largest = 0;
    for (double value : x) largest = std::max(largest, std::fabs(value));
    scale = exact_row_scale(largest);
    for (double value : x) codes.push_back(exact_code(value / exact_scale(scale)));
  }
};

struct Case {
  int64_t batch, tokens, heads, width;
  int64_t shift = 0;  // offset of tokens from a 16-byte, of codes from an 8-byte boundary
};

template <class T>
void test_rows_are_rounded_into_their_slots(const Case& c, bool norm, std::mt19937& engine) {
  const int64_t head = c.heads * c.width, token = 3 * head, rows = c.batch * c.tokens;
  const int64_t page_size = 3, pages = cuda::ceil_div(rows, page_size) + 1;
  Shifted<T> qkv(c.batch * c.tokens * token, c.shift, engine);
  for (int64_t i = 0; i < c.width; ++i) qkv.memory[c.shift + 2 * head + i] = T(0.0f);
  const std::vector<float> scale_mul(c.heads, 0.5f);
  std::vector<int64_t> slots(pages * page_size);
  for (size_t i = 0; i < slots.size(); ++i) slots[i] = static_cast<int64_t>(i);
  std::shuffle(slots.begin(), slots.end(), engine);
  slots.resize(rows);
  slots.shrink_to_fit();
  if (rows > 2) slots[1] = -1;
  if (rows > 2) slots[2] = pages * page_size;  // past the last page
  const int64_t stored = pages * page_size * head;
  std::vector<T> q_out = nans<T>(norm ? rows * head : 0);
  std::vector<uint8_t> codes[2], scales[2], want_codes[2], want_scales[2];
  for (int part = 0; part < 2; ++part) {
    codes[part].assign(c.shift + stored, 0x7f);
    scales[part].assign(stored / c.width, 255);
    want_codes[part] = codes[part];
    want_scales[part] = scales[part];
    for (int64_t r = 0; r < rows; ++r) {
      if (slots[r] < 0 || slots[r] >= pages * page_size) continue;
      for (int64_t h = 0; h < c.heads; ++h) {
        std::vector<double> x(c.width);
        double squares = 0;
        for (int64_t d = 0; d < c.width; ++d) {
          x[d] = qkv[r * token + (part + 1) * head + h * c.width + d];
          squares += x[d] * x[d];
        }
        if (norm && part == 0) {
          for (double& value : x) value = widen(T(value / std::max(std::sqrt(squares), 1e-12)));
        }
        const Rounded rounded(x);
        want_scales[part][slots[r] * c.heads + h] = rounded.scale;
        std::copy(rounded.codes.begin(), rounded.codes.end(),
                  want_codes[part].begin() + c.shift + slots[r] * head + h * c.width);
      }
    }
  }
  const auto view = [&](int64_t part) {
    return HeadView{qkv.data() + part * head, c.tokens * token, token, c.width};
  };
  const QkNormAppendPagedKvArgs op = {c.batch,
                                      c.tokens,
                                      c.heads,
                                      c.width,
                                      page_size,
                                      norm ? view(0) : HeadView{},
                                      view(1),
                                      view(2),
                                      norm ? scale_mul.data() : nullptr,
                                      norm ? q_out.data() : nullptr,
                                      codes[0].data() + c.shift,
                                      codes[1].data() + c.shift,
                                      page_size * head,
                                      head,
                                      c.width,
                                      page_size * head,
                                      head,
                                      c.width,
                                      slots.data(),
                                      dtype_of<T>(),
                                      0};
  const cuda::QkNormAppendPagedKv8Args args = {
      {op, pages}, scales[0].data(),    scales[1].data(), page_size * c.heads,
      c.heads,     page_size * c.heads, c.heads};
  CHECK(variant_cuda_qk_norm_append_paged_kv8(&args, sizeof args, 0, nullptr) == 0,
        "launch failed");
  for (int part = 0; part < 2; ++part) {
    for (size_t i = 0; i < want_scales[part].size(); ++i) {
      CHECK(scales[part][i] == want_scales[part][i], "%s scale[%d][%zu]: got %d, expected %d",
            name_of<T>(), part, i, scales[part][i], want_scales[part][i]);
    }
    for (size_t i = 0; i < want_codes[part].size(); ++i) {
      // The norm's own rounding may move a normalised key across a boundary of the 8-bit rounding.
      const int apart = codes[part][i] - want_codes[part][i];
      CHECK(apart == 0 || (norm && part == 0 && std::abs(apart) == 1),
            "%s code[%d][%zu]: got %02x, expected %02x", name_of<T>(), part, i, codes[part][i],
            want_codes[part][i]);
    }
  }
  if (norm) {
    for (const T x : q_out) CHECK(std::isfinite(widen(x)), "a query was not written");
  }
}

template <class T>
void test_dtype(std::mt19937& engine) {
  for (const Case& c : {Case{1, 1, 1, 16}, Case{2, 3, 2, 24}, Case{1, 35, 2, 64}, Case{2, 2, 3, 80},
                        Case{1, 3, 2, 256}, Case{2, 3, 1, 40, 1}}) {
    test_rows_are_rounded_into_their_slots<T>(c, true, engine);
    test_rows_are_rounded_into_their_slots<T>(c, false, engine);
  }
}

void test_arguments_of_another_size_are_refused() {
  const cuda::QkNormAppendPagedKv8Args args = {};
  CHECK(variant_cuda_qk_norm_append_paged_kv8(&args, sizeof args - 8, 0, nullptr) != 0,
        "accepted arguments of the wrong size");
}

}  // namespace

int main() {
  std::mt19937 engine(5);
  test_every_code_is_read_and_written_exactly();
  test_numbers_between_two_codes_go_to_the_nearest_or_the_even();
  test_a_scale_is_the_smallest_that_holds_its_row();
  // Below 2^-32 a scale times the smallest code is zero in float16; above 2^22 float16 holds only
  // codes of the lowest magnitude.
  test_codes_widen_to_16_bits<Half>(95, 149);
  test_codes_widen_to_16_bits<BF16>(1, 254);
  test_dtype<float>(engine);
  test_dtype<BF16>(engine);
  test_dtype<Half>(engine);
  test_arguments_of_another_size_are_refused();
}
