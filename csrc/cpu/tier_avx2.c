/* tier_avx2.c: 32-byte vectors with fused multiply-add. gemm: 6 x 2 accumulators, 2 of b, 1 of a: 15 of 16 registers. */
#if defined(__x86_64__)
#include <immintrin.h>

#include "tier_target.h"
FA_TARGET_BEGIN("avx2,fma,f16c")
#define VECTOR_BYTES 32
#define GEMM_ROWS 6
#define GEMM_VECTORS 2
#define SIMD_HEADER "simd_avx2.h"
#include "tier_types.h"

const fa_tier fa_tier_avx2 = {&ops_f32, &ops_f64};
FA_TARGET_END
#endif
