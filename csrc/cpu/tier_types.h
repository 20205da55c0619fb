/* tier_types.h: builds one tier: tier_body.h in float and in double. Included once by each tier file, after it has set the compiler's
 * target, VECTOR_BYTES and the register block of gemm. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "../core/numeric.h"
#include "tier.h"

#define ALWAYS_INLINE static inline __attribute__((always_inline))

/* Polynomials for e^r on [-ln 2 / 2, ln 2 / 2], minimax: relative error 2e-9 and 3e-18. */
#define FN(name) name##_f32
#define REAL float
#define REAL_BITS 32
#define REAL_INT int32_t
#define EXP_LOW (-87.0f)
#define EXP_HIGH 88.0f
#define EXP_COEFFICIENTS 1.0f, 1.0000000377f, 0.50000000471f, 0.16666415415f, 0.041666352771f, 0.0083751347746f, 0.0013941118896f
#define ROUND_MAGIC 12582912.0f
#define LN2_HIGH 0.693145751953125f
#define LN2_LOW 1.42860682030941723212e-6f
#define EXPONENT_BIAS 127
#define MANTISSA_BITS 23
#include "tier_body.h"
#undef FN
#undef REAL
#undef REAL_BITS
#undef REAL_INT
#undef EXP_LOW
#undef EXP_HIGH
#undef EXP_COEFFICIENTS
#undef ROUND_MAGIC
#undef LN2_HIGH
#undef LN2_LOW
#undef EXPONENT_BIAS
#undef MANTISSA_BITS

#define FN(name) name##_f64
#define REAL double
#define REAL_BITS 64
#define REAL_INT int64_t
#define EXP_LOW (-708.0)
#define EXP_HIGH 709.0
#define EXP_COEFFICIENTS                                                                                                               \
  1.0, 1.0, 0.50000000000000184039, 0.1666666666666668082, 0.04166666666648795252, 0.0083333333333195896163, 0.0013888888952352862866, \
      0.00019841269890076402829, 0.000024801485441561312966, 2.7557240887229868596e-6, 2.763265472252779189e-7, 2.5110049204818659793e-8
#define ROUND_MAGIC 6755399441055744.0
#define LN2_HIGH 0.69314718036912381649
#define LN2_LOW 1.9082149292705877e-10
#define EXPONENT_BIAS 1023
#define MANTISSA_BITS 52
#include "tier_body.h"
