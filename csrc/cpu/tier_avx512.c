/* tier_avx512.c: 64-byte vectors. gemm: 6 x 4 accumulators, 4 of b, 1 of a: 29 of 32 registers. */
#if defined(__x86_64__)
#include <immintrin.h>

#include "tier_target.h"
FA_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define VECTOR_BYTES 64
#define GEMM_ROWS 6
#define GEMM_VECTORS 4
#define SIMD_HEADER "simd_avx512.h"
#include "tier_types.h"

const fa_tier fa_tier_avx512 = {&ops_f32, &ops_f64};
FA_TARGET_END
#endif
