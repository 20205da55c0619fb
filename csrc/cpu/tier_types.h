/* tier_types.h: builds one tier: its inner loops in float and in double. Included once by each tier file, after it has set the compiler's
 * target, VECTOR_BYTES, the register block of gemm, and SIMD_HEADER with the few things that vector extensions cannot say. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "../core/numeric.h"
#include "tier.h"

#define ALWAYS_INLINE static inline __attribute__((always_inline))

/* Vectors are the compiler's own, so that one text serves SSE2, AVX2, AVX-512 and NEON. loose: as it lies in memory. */
#define TIER_VECTORS(suffix, real, integer)                                                                     \
  typedef real vec_##suffix __attribute__((vector_size(VECTOR_BYTES)));                                         \
  typedef integer ivec_##suffix __attribute__((vector_size(VECTOR_BYTES)));                                     \
  typedef real loose_vec_##suffix __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(real)), may_alias)); \
  ALWAYS_INLINE vec_##suffix splat_##suffix(real x) { return x - (vec_##suffix){0}; }                           \
  /* where condition lanes are -1, a; where 0, b */                                                             \
  ALWAYS_INLINE vec_##suffix select_##suffix(ivec_##suffix condition, vec_##suffix a, vec_##suffix b) {         \
    return (vec_##suffix)((condition & (ivec_##suffix)a) | (~condition & (ivec_##suffix)b));                    \
  }
TIER_VECTORS(f32, float, int32_t)
TIER_VECTORS(f64, double, int64_t)
#include SIMD_HEADER

/* Dense rows of float16 through the tier's own conversion, to and from float; they return how many elements that was. */
ALWAYS_INLINE int load_halves(void *floats, const uint16_t *src, int count) {
  float *dst = floats;
  int i = 0;
  (void)dst, (void)src;
  for (; HALVES && i + HALVES <= count; i += HALVES) LOAD_HALVES(dst + i, src + i);
  return i;
}

ALWAYS_INLINE int store_halves(uint16_t *dst, const void *floats, float scale, int count) {
  const float *src = floats;
  int i = 0;
  (void)dst;
  for (; HALVES && i + HALVES <= count; i += HALVES) {
    vec_f32 scaled = *(const loose_vec_f32 *)(src + i) * splat_f32(scale);
    STORE_HALVES(dst + i, scaled);
  }
  return i;
}

/* 16-bit elements are widened in registers; others are of the vectors' own type. */
ALWAYS_INLINE vec_f32 load_as_f32(const void *src, const fa_dtype dtype, ptrdiff_t index) {
  if (dtype == FA_BF16) return WIDEN_BF16((const uint16_t *)src + index);
  if (dtype == FA_F16) return WIDEN_F16((const uint16_t *)src + index);
  return *(const loose_vec_f32 *)((const float *)src + index);
}

ALWAYS_INLINE vec_f64 load_as_f64(const void *src, const fa_dtype dtype, ptrdiff_t index) {
  (void)dtype;
  return *(const loose_vec_f64 *)((const double *)src + index);
}

#define VEC FN(vec)
#define IVEC FN(ivec)
#define LANES (VECTOR_BYTES * 8 / REAL_BITS)
#define LOAD(p) ((VEC) * (const FN(loose_vec) *)(p))
#define STORE(p, v) (*(FN(loose_vec) *)(p) = (v))

/* 2^r on [-1/2, 1/2] by minimax polynomials: relative error 1.5e-7 and 3e-18. EXP2_MAGIC is 1.5 * 2^MANTISSA_BITS + the exponent's bias. */
#define FN(name) name##_f32
#define REAL float
#define REAL_BITS 32
#define REAL_DTYPE FA_F32
#define EXP2_LOW (-127.0f)
#define EXP2_HIGH 127.0f
#define EXP2_COEFFICIENTS 1.0f, 0.693146967f, 0.240221197f, 0.0555071327f, 0.00967554133f, 0.00132764720f
#define EXP2_MAGIC 12583039.0f
#define MANTISSA_BITS 23
#include "tier_gemm.h"
#include "tier_memory.h"
#include "tier_softmax.h"
#include "tier_rows.h"
#undef FN
#undef REAL
#undef REAL_BITS
#undef REAL_DTYPE
#undef EXP2_LOW
#undef EXP2_HIGH
#undef EXP2_COEFFICIENTS
#undef EXP2_MAGIC
#undef MANTISSA_BITS

#define FN(name) name##_f64
#define REAL double
#define REAL_BITS 64
#define REAL_DTYPE FA_F64
#define EXP2_LOW (-1023.0)
#define EXP2_HIGH 1023.0
#define EXP2_COEFFICIENTS                                                                                                               \
  1.0, 0.69314718055994528623, 0.24022650695910161001, 0.055504108664821617813, 0.0096181291075872234198, 0.0013333558146406449159,     \
      0.00015403530463766593509, 1.525273384157928576e-5, 1.3215432514189645726e-6, 1.0178057077155053298e-7, 7.0741981587913430311e-9, \
      4.4558199665721398587e-10
#define EXP2_MAGIC 6755399441056767.0
#define MANTISSA_BITS 52
#include "tier_gemm.h"
#include "tier_memory.h"
#include "tier_softmax.h"
#include "tier_rows.h"
