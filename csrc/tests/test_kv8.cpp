// 8-bit K and V: rounding against exact arithmetic, reading against pages of q's dtype.
#include "check.h"

using namespace variant;
using namespace variant::test;

namespace {

// Value of a code by the format's definition; exact in double. NaN: 0x7f and 0xff.
double e4m3_value(int code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  const double magnitude = (code & 0x7f) == 0x7f ? kNaN
                           : exponent == 0       ? std::ldexp(mantissa, -9)
                                                 : std::ldexp(8 + mantissa, exponent - 10);
  return code & 0x80 ? -magnitude : magnitude;
}

// The nearest code of |x| <= 448; of two, the even one. Differences are exact in double.
int nearest_code(double x) {
  int best = 0;
  for (int code = 1; code < 0x7f; ++code) {
    const double here = std::fabs(std::fabs(x) - e4m3_value(code));
    const double there = std::fabs(std::fabs(x) - e4m3_value(best));
    if (here < there || (here == there && code % 2 == 0)) best = code;
  }
  return best | (std::signbit(x) ? 0x80 : 0);
}

int scale_byte(double largest) {
  int byte = 1;
  while (largest > std::ldexp(448.0, byte - 127)) ++byte;
  return byte;
}

// Every code's value and every tie between two, from the largest down: x[0] fixes the row's scale.
std::vector<double> telling_numbers() {
  std::vector<double> numbers;
  for (int code = 0x7e; code >= 0; --code) {
    numbers.push_back(e4m3_value(code));
    if (code > 0) numbers.push_back((e4m3_value(code) + e4m3_value(code - 1)) / 2);
  }
  return numbers;
}

// Appends rows (tokens) of one head and returns codes [token][width] and scales [token].
struct Written {
  std::vector<uint8_t> codes, scales;
};
Written append_rows(const KernelTable& table, Values& rows, int64_t tokens, int64_t width) {
  // Two tokens of a page, one untouched slot between pages; token 1 is skipped.
  const int64_t slots = tokens + 1, head_stride = width + 3, scale_stride = 2;
  std::vector<uint8_t> k(slots * head_stride, 0x55), v(k), k_scales(slots * scale_stride, 0x55),
      v_scales(k_scales);
  std::vector<int64_t> order(tokens);
  for (int64_t t = 0; t < tokens; ++t) order[t] = t == 1 ? -1 : tokens - t;
  const HeadView view{rows.data(), tokens * width, width, width};
  table.qk_norm_append_paged_kv8({{1,
                                   tokens,
                                   1,
                                   width,
                                   1,
                                   HeadView{},
                                   view,
                                   view,
                                   nullptr,
                                   nullptr,
                                   k.data(),
                                   v.data(),
                                   head_stride,
                                   head_stride,
                                   head_stride,
                                   head_stride,
                                   head_stride,
                                   head_stride,
                                   order.data(),
                                   rows.dtype(),
                                   2},
                                  {k_scales.data(), scale_stride, scale_stride},
                                  {v_scales.data(), scale_stride, scale_stride}});
  CHECK(k == v && k_scales == v_scales, "keys and values of %lld tokens differ",
        static_cast<long long>(tokens));
  Written written;
  for (int64_t s = 0; s < slots; ++s) {
    const bool used = s > 0 && s != tokens - 1;
    for (int64_t d = 0; d < head_stride; ++d) {
      CHECK((used && d < width) || k[s * head_stride + d] == 0x55, "byte %lld of slot %lld",
            static_cast<long long>(d), static_cast<long long>(s));
    }
    CHECK(used || k_scales[s * scale_stride] == 0x55, "scale %lld", static_cast<long long>(s));
    CHECK(k_scales[s * scale_stride + 1] == 0x55, "beside scale %lld", static_cast<long long>(s));
  }
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t s = tokens - t;
    written.codes.insert(written.codes.end(), &k[s * head_stride], &k[s * head_stride] + width);
    written.scales.push_back(k_scales[s * scale_stride]);
  }
  return written;
}

void check_rounding(const char* isa, const KernelTable& table, Values& rows, int64_t tokens,
                    int64_t width) {
  const Written written = append_rows(table, rows, tokens, width);
  for (int64_t t = 0; t < tokens; ++t) {
    if (t == 1) continue;
    double largest = 0;
    for (int64_t d = 0; d < width; ++d) {
      largest = std::max(largest, std::fabs(rows[t * width + d]));
    }
    const int byte = scale_byte(largest);
    CHECK(written.scales[t] == byte, "%s %s: scale of %g: got %d, expected %d", isa, rows.name(),
          largest, written.scales[t], byte);
    for (int64_t d = 0; d < width; ++d) {
      const double x = rows[t * width + d];
      const int want = nearest_code(std::ldexp(x, 127 - byte)), got = written.codes[t * width + d];
      CHECK(got == want, "%s %s: %g by 2^%d: got %#x, expected %#x", isa, rows.name(), x,
            byte - 127, got, want);
    }
  }
}

void test_rounding(const char* isa, const KernelTable& table, std::mt19937& engine) {
  const std::vector<double> numbers = telling_numbers();
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    // Widths with and without a rest, for every vector width.
    for (const int64_t width : {16, 24, 56}) {
      std::vector<double> all;
      // The smallest scale, a usual one, and the largest one, that of the largest number.
      for (const int exponent : {-126, -9, 0, 118}) {
        for (size_t i = 0; i < numbers.size(); ++i) {
          // The first number of a row fixes its scale.
          if (all.size() % width == 0) all.push_back(std::ldexp(i % 2 ? -448.0 : 448.0, exponent));
          all.push_back(std::ldexp(i % 3 == 1 ? -numbers[i] : numbers[i], exponent));
        }
        while (all.size() % width) all.push_back(-0.0);
      }
      std::normal_distribution<double> normal;
      for (int i = 0; i < 40 * width; ++i) all.push_back(normal(engine));
      // Scales at their edges.
      for (const double largest : {448.0, 450.0, 1.75, 1.7578125, 0.0, std::ldexp(1.0, -140),
                                   std::ldexp(448.0, -126), std::ldexp(450.0, -126), 1e38}) {
        for (int64_t d = 0; d < width; ++d) all.push_back(d % 2 ? largest / 8 : -largest);
      }
      Values rows(dtype, static_cast<int64_t>(all.size()));
      for (size_t i = 0; i < all.size(); ++i) rows.set(static_cast<int64_t>(i), all[i]);
      check_rounding(isa, table, rows, rows.size() / width, width);
    }
    // A step above 448 in float32 only.
    Values above(dtype, 3 * 16, 448.00003);
    check_rounding(isa, table, above, 3, 16);
    // Numbers that are not finite become NaN, whatever their effect on the rest of the row.
    const double infinity = std::numeric_limits<double>::infinity();
    for (const double odd : {infinity, -infinity, kNaN}) {
      Values rows(dtype, 3 * 24, 1.0);
      rows.set(5, odd);
      rows.set(2 * 24 + 23, odd);
      const Written written = append_rows(table, rows, 3, 24);
      for (const int64_t i : {5, 2 * 24 + 23}) {
        CHECK((written.codes[i] & 0x7f) == 0x7f, "%s: %g gave %#x", isa, odd, written.codes[i]);
      }
      CHECK((written.codes[4] & 0x7f) != 0x7f, "%s: beside %g", isa, odd);
    }
  }
}

// Keys are normalised, rounded to the tokens' dtype, then to 8 bits.
void test_norm_comes_first(const char* isa, const KernelTable& table, std::mt19937& engine) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    for (const int64_t width : {16, 40, 64, 256}) {
      const int64_t tokens = 19, heads = 2, part = heads * width;
      Values qkv = Values::random(dtype, tokens * 3 * part, engine, 3.0);
      const int64_t bytes = dtype == DType::kFloat32 ? 4 : 2;
      const auto view = [&](int64_t which) {
        return HeadView{static_cast<char*>(qkv.data()) + which * part * bytes, 0, 3 * part, width};
      };
      const std::vector<float> scale_mul = {1.0f, 6.0f};
      Values q(dtype, tokens * part), k(dtype, tokens * part), q_out(dtype, tokens * part);
      table.qk_norm_forward({1, tokens, heads, width, view(0), view(1), scale_mul.data(), q.data(),
                             k.data(), dtype, 2});
      std::vector<int64_t> slots(tokens);
      for (int64_t t = 0; t < tokens; ++t) slots[t] = tokens - 1 - t;
      std::vector<uint8_t> pages[4], scales[4];
      for (auto& page : pages) page.assign(tokens * part, 0);
      for (auto& scale : scales) scale.assign(tokens * heads, 0);
      const auto write = [&](int at, HeadView keys, const float* mul, void* queries) {
        table.qk_norm_append_paged_kv8({{1,
                                         tokens,
                                         heads,
                                         width,
                                         1,
                                         view(0),
                                         keys,
                                         view(2),
                                         mul,
                                         queries,
                                         pages[at].data(),
                                         pages[at + 1].data(),
                                         part,
                                         part,
                                         width,
                                         part,
                                         part,
                                         width,
                                         slots.data(),
                                         dtype,
                                         2},
                                        {scales[at].data(), heads, heads},
                                        {scales[at + 1].data(), heads, heads}});
      };
      write(0, view(1), scale_mul.data(), q_out.data());
      write(2, HeadView{k.data(), 0, part, width}, nullptr, nullptr);
      for (const int which : {0, 1}) {
        CHECK(pages[which] == pages[which + 2] && scales[which] == scales[which + 2],
              "%s: %s of width %lld", isa, which ? "values" : "keys",
              static_cast<long long>(width));
      }
      for (int64_t i = 0; i < q.size(); ++i) {
        CHECK(q_out[i] == q[i], "%s q[%lld]", isa, static_cast<long long>(i));
      }
    }
  }
}

// One key: the output is its value.
void test_every_code_is_read(const char* isa, const KernelTable& table) {
  const int64_t width = 256;
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    for (const int byte : {1, 2, 9, 10, 127, 246, 247, 254}) {
      Values q(dtype, width, 0.0), out(dtype, width);
      std::vector<uint8_t> k(width, 0), v(width);
      for (int64_t d = 0; d < width; ++d) v[d] = static_cast<uint8_t>(d);
      uint8_t k_scale = 1, v_scale = static_cast<uint8_t>(byte);
      const int32_t page = 0, length = 1;
      table.paged_attention_kv8_forward(
          {{1, 1, 1, width, 1, HeadView{q.data(), width, width, width},
            HeadView{k.data(), width, width, width}, HeadView{v.data(), width, width, width}, &page,
            1, &length, out.data(), 1.0f, dtype, 1},
           {&k_scale, 1, 1},
           {&v_scale, 1, 1}});
      for (int64_t d = 0; d < width; ++d) {
        const float wide = static_cast<float>(std::ldexp(e4m3_value(v[d]), byte - 127));
        const double want = dtype == DType::kFloat32 ? wide : bf16_to_float(float_to_bf16(wide));
        CHECK(out[d] == want || (std::isnan(want) && std::isnan(out[d])),
              "%s %s: %#x by 2^%d: got %g, expected %g", isa, out.name(), v[d], byte - 127, out[d],
              want);
      }
    }
  }
}

struct Case {
  int64_t tokens, heads, width, page_size;
  std::vector<int32_t> lengths;
  int lowest, highest;  // scale bytes of the values
  bool any_code;        // NaN too
};

// The same bits as from pages that hold the codes' values.
void test_case(const char* isa, const KernelTable& table, const Case& c, DType dtype,
               std::mt19937& engine) {
  const int64_t batch = static_cast<int64_t>(c.lengths.size());
  int64_t entries = 1;
  for (const int32_t length : c.lengths) {
    entries = std::max(entries, (length + c.page_size - 1) / c.page_size);
  }
  const int64_t pages = batch * entries, slots = pages * c.page_size, slot = c.heads * c.width;
  // Past a length: codes and scales are NaN, table entries are out of range.
  std::vector<uint8_t> codes[2], scales[2];
  std::vector<Values> exact(2, Values(dtype, slots * slot));
  for (const int which : {0, 1}) {
    codes[which].assign(slots * slot, 0x7f);
    scales[which].assign(slots * c.heads, 255);
  }
  std::vector<int32_t> page_table(batch * entries, -1234567);
  std::uniform_int_distribution<int> any_code(0, 255), byte(c.lowest, c.highest);
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t s = 0; s < c.lengths[b]; ++s) {
      const int32_t page = static_cast<int32_t>(pages - 1 - b * entries - s / c.page_size);
      page_table[b * entries + s / c.page_size] = page;
      const int64_t at = page * c.page_size + s % c.page_size;
      for (int64_t i = 0; i < 2 * slot; ++i) {
        const int64_t which = i / slot, h = i % slot / c.width, index = at * slot + i % slot;
        uint8_t& scale = scales[which][at * c.heads + h];
        // Keys stay small enough for finite scores.
        if (i % c.width == 0) scale = static_cast<uint8_t>(which ? byte(engine) : 118 + s % 4);
        uint8_t& code = codes[which][index];
        do {
          code = static_cast<uint8_t>(any_code(engine));
        } while ((code & 0x7f) == 0x7f && !(which && c.any_code));
        exact[which].set(index, std::ldexp(e4m3_value(code), scale - 127));
      }
    }
  }
  Values q = Values::random(dtype, batch * c.tokens * slot, engine, 0.3);
  Values out(dtype, q.size()), want(dtype, q.size());
  const auto arguments = [&](void* k, void* v, void* to) {
    const int64_t page = c.page_size * slot;
    return PagedAttentionForwardArgs{batch,
                                     c.tokens,
                                     c.heads,
                                     c.width,
                                     c.page_size,
                                     HeadView{q.data(), c.tokens * slot, slot, c.width},
                                     HeadView{k, page, slot, c.width},
                                     HeadView{v, page, slot, c.width},
                                     page_table.data(),
                                     entries,
                                     c.lengths.data(),
                                     to,
                                     0.3f,
                                     dtype,
                                     2};
  };
  table.paged_attention_forward(arguments(exact[0].data(), exact[1].data(), want.data()));
  const int64_t page = c.page_size * c.heads;
  table.paged_attention_kv8_forward({arguments(codes[0].data(), codes[1].data(), out.data()),
                                     {scales[0].data(), page, c.heads},
                                     {scales[1].data(), page, c.heads}});
  bool seen = false;
  for (int64_t i = 0; i < out.size(); ++i) {
    seen |= std::isfinite(out[i]) && out[i] != 0;
    CHECK(out[i] == want[i] || (std::isnan(out[i]) && std::isnan(want[i])),
          "%s %s %lld queries, width %lld, scales from %d: out[%lld] got %g, expected %g", isa,
          out.name(), static_cast<long long>(c.tokens), static_cast<long long>(c.width), c.lowest,
          static_cast<long long>(i), out[i], want[i]);
  }
  CHECK(seen || c.any_code, "%s: nothing was compared at scales from %d", isa, c.lowest);
}

}  // namespace

int main() {
  for_each_isa([](const char* isa, const KernelTable& table) {
    std::mt19937 engine(8);
    test_rounding(isa, table, engine);
    test_norm_comes_first(isa, table, engine);
    test_every_code_is_read(isa, table);
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
      for (const Case& c :
           {Case{1, 1, 16, 4, {1}, 120, 130, false},
            Case{5, 2, 24, 7, {0, 13, 97}, 110, 130, false},
            Case{70, 2, 64, 16, {200, 33}, 120, 126, false},
            Case{3, 2, 256, 1, {5, 2}, 100, 140, true},
            Case{66, 1, 40, 16, {96, 197}, 127, 127, true},
            // Rows that bfloat16 holds as subnormal numbers or as infinity.
            Case{4, 1, 72, 3, {9}, 1, 12, false}, Case{4, 1, 72, 3, {8}, 9, 10, false},
            Case{4, 1, 24, 3, {8}, 244, 246, false}, Case{4, 1, 24, 3, {8}, 244, 249, true}}) {
        test_case(isa, table, c, dtype, engine);
      }
    }
  });
}
