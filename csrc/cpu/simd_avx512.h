/* simd_avx512.h: see simd_plain.h. The maximum returns its second operand where one is NaN. */
#define MAX_f32(a, b) ((vec_f32)_mm512_max_ps((__m512)(a), (__m512)(b)))
#define MAX_f64(a, b) ((vec_f64)_mm512_max_pd((__m512d)(a), (__m512d)(b)))
#define MIN_f32(a, b) ((vec_f32)_mm512_min_ps((__m512)(a), (__m512)(b)))
#define MIN_f64(a, b) ((vec_f64)_mm512_min_pd((__m512d)(a), (__m512d)(b)))
#define MAX_LANES_f32(v) _mm512_reduce_max_ps((__m512)(v))
#define MAX_LANES_f64(v) _mm512_reduce_max_pd((__m512d)(v))
#define SUM_LANES_f32(v) _mm512_reduce_add_ps((__m512)(v))
#define SUM_LANES_f64(v) _mm512_reduce_add_pd((__m512d)(v))

/* out[i] = the sum over the lanes of v[i] */
static inline void sum_four_f32(const vec_f32 *v, float *out) {
  __m256 half[4];
  for (int i = 0; i < 4; i++) half[i] = _mm256_add_ps(_mm512_castps512_ps256((__m512)v[i]), _mm512_extractf32x8_ps((__m512)v[i], 1));
  __m256 sums = _mm256_hadd_ps(_mm256_hadd_ps(half[0], half[1]), _mm256_hadd_ps(half[2], half[3]));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1)));
}

static inline void sum_four_f64(const vec_f64 *v, double *out) {
  for (int i = 0; i < 4; i++) out[i] = _mm512_reduce_add_pd((__m512d)v[i]);
}

#define WIDEN_BF16(p) ((vec_f32)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(p))), 16))
#define WIDEN_F16(p) ((vec_f32)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p))))

#define HALVES 16
#define LOAD_HALVES(dst, src) _mm512_storeu_ps(dst, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(src))))
#define STORE_HALVES(dst, src) \
  _mm256_storeu_si256((__m256i *)(dst), _mm512_cvtps_ph((__m512)(src), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))

#include "simd_squares.h"
