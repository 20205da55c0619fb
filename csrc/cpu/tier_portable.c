/* tier_portable.c: the tier of every machine: 16-byte vectors, which all 64-bit targets have (SSE2, NEON). */
#define VECTOR_BYTES 16
#define GEMM_ROWS 4
#define GEMM_VECTORS 2
#define SIMD_HEADER "simd_plain.h"
#include "tier_types.h"

const fa_tier fa_tier_portable = {&ops_f32, &ops_f64};
