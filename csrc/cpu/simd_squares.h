/* simd_squares.h: transposing 8 x 8 floats and 4 x 4 doubles in 32-byte registers, for every tier that has AVX2. */
static inline void transpose_f32(const float *src, ptrdiff_t src_row, float *dst, ptrdiff_t dst_row) {
  __m256 in[8], pairs[8], quads[8];
  for (int i = 0; i < 8; i++) in[i] = _mm256_loadu_ps(src + i * src_row);
  for (int i = 0; i < 8; i += 2) { /* rows i and i + 1, interleaved within each half */
    pairs[i] = _mm256_unpacklo_ps(in[i], in[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(in[i], in[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) { /* rows i .. i + 3: columns c and c + 4 */
    quads[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    quads[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xEE);
    quads[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    quads[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xEE);
  }
  for (int i = 0; i < 4; i++) {
    _mm256_storeu_ps(dst + i * dst_row, _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x20));
    _mm256_storeu_ps(dst + (i + 4) * dst_row, _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x31));
  }
}

static inline void transpose_f64(const double *src, ptrdiff_t src_row, double *dst, ptrdiff_t dst_row) {
  __m256d in[4], pairs[4];
  for (int i = 0; i < 4; i++) in[i] = _mm256_loadu_pd(src + i * src_row);
  for (int i = 0; i < 4; i += 2) {
    pairs[i] = _mm256_unpacklo_pd(in[i], in[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_pd(in[i], in[i + 1]);
  }
  for (int i = 0; i < 2; i++) {
    _mm256_storeu_pd(dst + i * dst_row, _mm256_permute2f128_pd(pairs[i], pairs[i + 2], 0x20));
    _mm256_storeu_pd(dst + (i + 2) * dst_row, _mm256_permute2f128_pd(pairs[i], pairs[i + 2], 0x31));
  }
}

#define EDGE_f32 8
#define EDGE_f64 4
#define TRANSPOSE_f32 transpose_f32
#define TRANSPOSE_f64 transpose_f64
