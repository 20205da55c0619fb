/* test_numeric.c: every half and bfloat16 there is, there and back, and rounding to nearest even between neighbours. */
#include <math.h>

#include "core_tests.h"
#include "csrc/core/numeric.h"

/* The value by its definition: sign, exponent field, mantissa field. */
static double value_of(uint16_t bits, int mantissa_bits, int bias) {
  int exponent_field = (bits & 0x7FFF) >> mantissa_bits, mantissa = bits & ((1 << mantissa_bits) - 1);
  double magnitude =
      exponent_field ? ldexp(1 + ldexp(mantissa, -mantissa_bits), exponent_field - bias) : ldexp(mantissa, 1 - bias - mantissa_bits);
  return bits & 0x8000 ? -magnitude : magnitude;
}

static int is_finite_pattern(uint16_t bits, int mantissa_bits) {
  return ((bits & 0x7FFF) >> mantissa_bits) != (1 << (15 - mantissa_bits)) - 1;
}

static void test_format(const char *name, float (*from)(uint16_t), uint16_t (*to)(float), int mantissa_bits, int bias) {
  int wrong_value = 0, wrong_back = 0, wrong_tie = 0, wrong_nearest = 0;
  for (int i = 0; i < 0x10000; i++) {
    uint16_t bits = (uint16_t)i;
    float x = from(bits);
    if (!is_finite_pattern(bits, mantissa_bits)) {
      int mantissa = bits & ((1 << mantissa_bits) - 1);
      wrong_value += mantissa ? !isnan(x) || !isnan(from(to(x))) : !isinf(x) || to(x) != bits;
      continue;
    }
    wrong_value += x != value_of(bits, mantissa_bits, bias);
    wrong_back += to(x) != bits;
    if (bits & 0x8000 || !is_finite_pattern((uint16_t)(bits + 1), mantissa_bits)) continue;
    float next = from((uint16_t)(bits + 1)), tie = x + (next - x) / 2;
    if (bits < 2) continue; /* the midpoint of bfloat16's smallest numbers is no float */
    wrong_tie += to(tie) != (bits & 1 ? bits + 1 : bits) || to(-tie) != ((bits & 1 ? bits + 1 : bits) | 0x8000);
    wrong_nearest += to(nextafterf(tie, INFINITY)) != bits + 1 || to(nextafterf(tie, 0)) != bits;
  }
  CHECK(wrong_value == 0, "%s: %d values", name, wrong_value);
  CHECK(wrong_back == 0, "%s: %d there and back", name, wrong_back);
  CHECK(wrong_tie == 0, "%s: %d ties", name, wrong_tie);
  CHECK(wrong_nearest == 0, "%s: %d next to ties", name, wrong_nearest);
}

void test_numeric(void) {
  test_format("float16", fa_from_f16, fa_to_f16, 10, 15);
  test_format("bfloat16", fa_from_bf16, fa_to_bf16, 7, 127);
  CHECK(fa_to_f16(65519.0f) == 0x7BFF && fa_to_f16(65520.0f) == 0x7C00, "the largest half");
  CHECK(fa_to_f16(1e30f) == 0x7C00 && fa_to_f16(-1e30f) == 0xFC00, "overflow");
  CHECK(fa_to_f16(1e-30f) == 0 && fa_to_f16(-1e-30f) == 0x8000, "underflow");
}
