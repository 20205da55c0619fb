/* amx_target.h: the instructions that the AMX passes are made of: tiles of 16 rows x 64 bytes, vectors of 16 floats. The passes are
 * written on these names alone, so that a test can put an emulation in their place (tests/c/amx_emulated.h). */
#ifndef FA_AMX_TARGET_H
#define FA_AMX_TARGET_H

#include <immintrin.h>
#include <stdint.h>

#include "tier_target.h"

#define AMX_BEGIN FA_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,amx-tile,amx-bf16")
#define AMX_END FA_TARGET_END
#ifdef __OPTIMIZE__
#define AMX_INLINE static inline __attribute__((always_inline))
#else
#define AMX_INLINE static inline __attribute__((unused)) /* nothing is inlined through a pointer then */
#endif

AMX_BEGIN

typedef __m512 f32x16;
typedef __m512i i32x16;

/* Tile instructions, t a literal 0..7. "memory": the compiler must keep them in order with the vector code that fills and reads them. */
#define TILE_ZERO(t) __asm__ volatile("tilezero %%tmm" #t ::)
#define TILE_LOAD(t, base, stride) __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #t ::"r"(base), "r"((int64_t)(stride)) : "memory")
#define TILE_STORE(t, base, stride) __asm__ volatile("tilestored %%tmm" #t ", (%0,%1,1)" ::"r"(base), "r"((int64_t)(stride)) : "memory")
/* c[16][16] += a[16][16 pairs] b[16 pairs][16], pairs of bf16 */
#define TILE_PRODUCT(c, a, b) __asm__ volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c ::)

/* Every task sets the tiles up and releases them: other code in the same thread may use another configuration. */
AMX_INLINE void tiles_begin(void) {
  static const struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  } all_full = {.palette = 1, .row_bytes = {64, 64, 64, 64, 64, 64, 64, 64}, .rows = {16, 16, 16, 16, 16, 16, 16, 16}};
  __asm__ volatile("ldtilecfg %0" ::"m"(all_full) : "memory");
}

AMX_INLINE void tiles_end(void) { __asm__ volatile("tilerelease" ::: "memory"); }

AMX_INLINE f32x16 f32_load(const float *p) { return _mm512_loadu_ps(p); }
AMX_INLINE void f32_store(float *p, f32x16 x) { _mm512_storeu_ps(p, x); }
AMX_INLINE f32x16 f32_splat(float x) { return _mm512_set1_ps(x); }
AMX_INLINE f32x16 f32_add(f32x16 a, f32x16 b) { return _mm512_add_ps(a, b); }
AMX_INLINE f32x16 f32_sub(f32x16 a, f32x16 b) { return _mm512_sub_ps(a, b); }
AMX_INLINE f32x16 f32_mul(f32x16 a, f32x16 b) { return _mm512_mul_ps(a, b); }
AMX_INLINE f32x16 f32_fma(f32x16 a, f32x16 b, f32x16 c) { return _mm512_fmadd_ps(a, b, c); }
AMX_INLINE f32x16 f32_max(f32x16 x, f32x16 best) { return _mm512_max_ps(x, best); } /* best where x is NaN */
AMX_INLINE int f32_any_greater(f32x16 a, f32x16 b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0; }

/* x where p is not 0, else 0, even for a NaN in x */
AMX_INLINE f32x16 f32_where_nonzero(f32x16 p, f32x16 x) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(p, _mm512_setzero_ps(), _CMP_NEQ_UQ), x);
}

AMX_INLINE f32x16 f32_where_greater(f32x16 a, f32x16 b, f32x16 x, f32x16 otherwise) {
  return _mm512_mask_mov_ps(otherwise, _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), x);
}

/* x where it is finite, else 0 */
AMX_INLINE f32x16 f32_finite_or_zero(f32x16 x) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(_mm512_sub_ps(x, x), _mm512_setzero_ps(), _CMP_EQ_OQ), x);
}

/* x where lo <= at < hi, else -inf */
AMX_INLINE f32x16 f32_where_inside(f32x16 x, const int32_t *lo, const int32_t *hi, int at) {
  i32x16 here = _mm512_set1_epi32(at);
  __mmask16 inside = _mm512_cmple_epi32_mask(_mm512_loadu_si512(lo), here) & _mm512_cmpgt_epi32_mask(_mm512_loadu_si512(hi), here);
  return _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), inside, x);
}

/* 2^x = 2^floor(x) * 2^f, 0 <= f < 1; a minimax polynomial of relative error 3e-6, a hundredth of what rounding results to 16 bits takes (and
 * lse is allowed 1e-5). scalef takes the floor itself; -inf gives exactly 0. */
AMX_INLINE f32x16 f32_exp2(f32x16 x) {
  f32x16 f = _mm512_reduce_ps(x, 0x09); /* x - floor(x), quietly */
  f32x16 sum = _mm512_set1_ps(0.013534168f);
  sum = _mm512_fmadd_ps(sum, f, _mm512_set1_ps(0.05201146f));
  sum = _mm512_fmadd_ps(sum, f, _mm512_set1_ps(0.24144275f));
  sum = _mm512_fmadd_ps(sum, f, _mm512_set1_ps(0.69300383f));
  sum = _mm512_fmadd_ps(sum, f, _mm512_set1_ps(1.0000026f));
  return _mm512_scalef_ps(sum, x);
}

AMX_INLINE i32x16 i32_load(const void *p) { return _mm512_loadu_si512(p); }
AMX_INLINE void i32_store(void *p, i32x16 x) { _mm512_storeu_si512(p, x); }

/* Round to nearest even. Lanes of the result: the bf16 of low[0..15], then of high[0..15]. */
AMX_INLINE i32x16 bf16_rows(f32x16 low, f32x16 high) { return (i32x16)_mm512_cvtne2ps_pbh(high, low); }

/* The same with lanes even[0], odd[0], even[1], odd[1] ... */
AMX_INLINE i32x16 bf16_pairs(f32x16 even, f32x16 odd) {
  const i32x16 order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18,
                                        2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, bf16_rows(even, odd));
}

AMX_INLINE f32x16 bf16_even(i32x16 pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
AMX_INLINE f32x16 bf16_odd(i32x16 pairs) { return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32((int32_t)0xFFFF0000))); }

/* sum[i] + a[2i] b[2i] + a[2i + 1] b[2i + 1], of halves that are bf16 */
AMX_INLINE f32x16 bf16_dot(f32x16 sum, i32x16 a, i32x16 b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }

/* The larger magnitude of each two bf16, as an integer that orders them; signs of a are ignored. */
AMX_INLINE i32x16 bf16_larger(i32x16 a, i32x16 largest) {
  return _mm512_max_epu16(_mm512_and_si512(a, _mm512_set1_epi16(0x7FFF)), largest);
}

/* a[0], b[0], a[1], b[1] ... of 16 halves each */
AMX_INLINE i32x16 i16_interleave(const uint16_t *a, const uint16_t *b) {
  i32x16 low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)a));
  i32x16 high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)b));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

/* 16 x 16 elements of 32 bits: within 128-bit lanes by pairs, then whole lanes. */
AMX_INLINE void i32_transpose(i32x16 r[16]) {
  i32x16 t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xDD);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xDD);
  }
  for (int i = 0; i < 4; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xDD);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xDD);
  }
}

AMX_END

#endif
