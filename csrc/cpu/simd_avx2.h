/* simd_avx2.h: see simd_plain.h. The maximum returns its second operand where one is NaN. */
#define MAX_f32(a, b) ((vec_f32)_mm256_max_ps((__m256)(a), (__m256)(b)))
#define MAX_f64(a, b) ((vec_f64)_mm256_max_pd((__m256d)(a), (__m256d)(b)))
#define MIN_f32(a, b) ((vec_f32)_mm256_min_ps((__m256)(a), (__m256)(b)))
#define MIN_f64(a, b) ((vec_f64)_mm256_min_pd((__m256d)(a), (__m256d)(b)))

static inline float max_lanes_f32(__m256 v) {
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

static inline float sum_lanes_f32(__m256 v) {
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

static inline double max_lanes_f64(__m256d v) {
  __m128d two = _mm_max_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
  return _mm_cvtsd_f64(_mm_max_sd(two, _mm_unpackhi_pd(two, two)));
}

static inline double sum_lanes_f64(__m256d v) {
  __m128d two = _mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
  return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}

#define MAX_LANES_f32(v) max_lanes_f32((__m256)(v))
#define MAX_LANES_f64(v) max_lanes_f64((__m256d)(v))
#define SUM_LANES_f32(v) sum_lanes_f32((__m256)(v))
#define SUM_LANES_f64(v) sum_lanes_f64((__m256d)(v))

/* out[i] = the sum over the lanes of v[i] */
static inline void sum_four_f32(const vec_f32 *v, float *out) {
  __m256 pairs = _mm256_hadd_ps((__m256)v[0], (__m256)v[1]), more = _mm256_hadd_ps((__m256)v[2], (__m256)v[3]);
  __m256 halves = _mm256_hadd_ps(pairs, more);
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
}

static inline void sum_four_f64(const vec_f64 *v, double *out) {
  for (int i = 0; i < 4; i++) out[i] = sum_lanes_f64((__m256d)v[i]);
}

#define WIDEN_BF16(p) ((vec_f32)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p))), 16))
#define WIDEN_F16(p) ((vec_f32)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p))))

#define HALVES 8
#define LOAD_HALVES(dst, src) _mm256_storeu_ps(dst, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(src))))
#define STORE_HALVES(dst, src) \
  _mm_storeu_si128((__m128i *)(dst), _mm256_cvtps_ph((__m256)(src), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))

#include "simd_squares.h"
