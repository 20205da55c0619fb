/* numeric.h: 16-bit floats in plain C. Branch-free, so that loops over them vectorise; exact in the presence of denormals, infinities
 * and NaN, and independent of the flush-to-zero mode (no denormal single is ever formed). */
#ifndef FA_NUMERIC_H
#define FA_NUMERIC_H

#include <stdint.h>
#include <string.h>

static inline uint32_t fa_bits(float x) {
  uint32_t u;
  memcpy(&u, &x, sizeof u);
  return u;
}

static inline float fa_float(uint32_t u) {
  float x;
  memcpy(&x, &u, sizeof x);
  return x;
}

static inline float fa_from_bf16(uint16_t x) { return fa_float((uint32_t)x << 16); }

/* Round to nearest even; NaN stays NaN (quiet). */
static inline uint16_t fa_to_bf16(float x) {
  uint32_t u = fa_bits(x), rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16, nan = (u >> 16) | 0x40u;
  return (uint16_t)((u & 0x7FFFFFFFu) > 0x7F800000u ? nan : rounded);
}

/* The exponent is rebiased by 112; a denormal half becomes normal by taking 2^-14 off 1.m * 2^-14. */
static inline float fa_from_f16(uint16_t x) {
  uint32_t magnitude = (uint32_t)(x & 0x7FFFu) << 13, exponent = magnitude & 0x0F800000u, sign = (uint32_t)(x & 0x8000u) << 16;
  uint32_t normal = magnitude + (exponent == 0x0F800000u ? 224u << 23 : 112u << 23);
  float denormal = fa_float(magnitude + (113u << 23)) - fa_float(113u << 23);
  return fa_float((exponent == 0 ? fa_bits(denormal) : normal) | sign);
}

/* Round to nearest even; above 65504 + half a step: infinity; NaN stays NaN. Below 2^-14 the sum with 0.5 lets the adder round to
 * multiples of 2^-24. */
static inline uint16_t fa_to_f16(float x) {
  uint32_t u = fa_bits(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7FFFFFFFu;
  uint32_t normal = (magnitude - (112u << 23) + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  uint32_t denormal = fa_bits(fa_float(magnitude) + 0.5f) - fa_bits(0.5f);
  uint32_t special = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
  uint32_t half = magnitude < (113u << 23) ? denormal : normal;
  return (uint16_t)((magnitude >= 0x477FF000u ? special : half) | sign);
}

#endif
