/* tier_body.h: the inner loops on tiles, for one element type and one vector width. A tier file sets the compiler's target and
 * VECTOR_BYTES, GEMM_ROWS, GEMM_VECTORS, then includes tier_types.h, which includes this file twice:
 *
 *     REAL float  / double     REAL_BITS 32 / 64      FN(name) name_f32 / name_f64
 *
 * Vectors are the compiler's own (vector_size), so that one text serves SSE2, AVX2, AVX-512 and NEON. */

typedef REAL FN(vec) __attribute__((vector_size(VECTOR_BYTES)));
typedef REAL FN(loose_vec) __attribute__((vector_size(VECTOR_BYTES), aligned(REAL_BITS / 8), may_alias)); /* as it lies in memory */
typedef REAL_INT FN(ivec) __attribute__((vector_size(VECTOR_BYTES)));
#define VEC FN(vec)
#define IVEC FN(ivec)
#define LANES (VECTOR_BYTES * 8 / REAL_BITS)
#define LOAD(p) ((VEC) * (const FN(loose_vec) *)(p))
#define STORE(p, v) (*(FN(loose_vec) *)(p) = (v))

ALWAYS_INLINE VEC FN(splat)(REAL x) { return x - (VEC){0}; }

/* where condition lanes are -1, a; where 0, b */
ALWAYS_INLINE VEC FN(select)(IVEC condition, VEC a, VEC b) { return (VEC)((condition & (IVEC)a) | (~condition & (IVEC)b)); }

/* A rows x vectors block of c stays in registers while k runs: GEMM_ROWS * GEMM_VECTORS accumulators, GEMM_VECTORS of b, one of a. */
ALWAYS_INLINE void FN(gemm_block)(const int rows, const int vectors, int k, const REAL *a, ptrdiff_t a_row, ptrdiff_t a_col, const REAL *b,
                                  ptrdiff_t b_row, REAL *c, ptrdiff_t c_row, int accumulate) {
  VEC sum[GEMM_ROWS][GEMM_VECTORS];
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < vectors; v++) sum[r][v] = accumulate ? LOAD(c + r * c_row + v * LANES) : (VEC){0};
  for (int i = 0; i < k; i++) {
    VEC b_vec[GEMM_VECTORS];
    for (int v = 0; v < vectors; v++) b_vec[v] = LOAD(b + i * b_row + v * LANES);
    for (int r = 0; r < rows; r++) {
      VEC a_vec = FN(splat)(a[r * a_row + i * a_col]);
      for (int v = 0; v < vectors; v++) sum[r][v] += a_vec * b_vec[v];
    }
  }
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < vectors; v++) STORE(c + r * c_row + v * LANES, sum[r][v]);
}

/* All row blocks against one panel of b, which is small enough to stay in L1. */
ALWAYS_INLINE void FN(gemm_panel)(const int vectors, int m, int k, const REAL *a, ptrdiff_t a_row, ptrdiff_t a_col, const REAL *b,
                                  ptrdiff_t b_row, REAL *c, ptrdiff_t c_row, int accumulate) {
  int i = 0;
  for (; i + GEMM_ROWS <= m; i += GEMM_ROWS)
    FN(gemm_block)(GEMM_ROWS, vectors, k, a + i * a_row, a_row, a_col, b, b_row, c + i * c_row, c_row, accumulate);
  for (; i + 2 <= m; i += 2) FN(gemm_block)(2, vectors, k, a + i * a_row, a_row, a_col, b, b_row, c + i * c_row, c_row, accumulate);
  if (i < m) FN(gemm_block)(1, vectors, k, a + i * a_row, a_row, a_col, b, b_row, c + i * c_row, c_row, accumulate);
}

static void FN(gemm)(int m, int n, int k, const void *a, ptrdiff_t a_row, ptrdiff_t a_col, const void *b, ptrdiff_t b_row, void *c,
                     ptrdiff_t c_row, int accumulate) {
  const REAL *b_real = b;
  REAL *c_real = c;
  int j = 0;
  for (; j + GEMM_VECTORS * LANES <= n; j += GEMM_VECTORS * LANES)
    FN(gemm_panel)(GEMM_VECTORS, m, k, a, a_row, a_col, b_real + j, b_row, c_real + j, c_row, accumulate);
  for (; j < n; j += LANES) FN(gemm_panel)(1, m, k, a, a_row, a_col, b_real + j, b_row, c_real + j, c_row, accumulate);
}

static void FN(gemm_skipping_zeros)(int m, int n, int k, const void *a, ptrdiff_t a_row, ptrdiff_t a_col, const void *b, ptrdiff_t b_row,
                                    void *c, ptrdiff_t c_row) {
  for (int r = 0; r < m; r++)
    for (int i = 0; i < k; i++) {
      REAL coefficient = ((const REAL *)a)[r * a_row + i * a_col];
      if (coefficient == 0) continue;
      for (int j = 0; j < n; j++) ((REAL *)c)[r * c_row + j] += coefficient * ((const REAL *)b)[i * b_row + j];
    }
}

ALWAYS_INLINE REAL FN(get)(const void *src, fa_dtype dtype, int64_t index) {
  if (dtype == FA_F32) return (REAL)((const float *)src)[index];
  if (dtype == FA_F64) return (REAL)((const double *)src)[index];
  if (dtype == FA_BF16) return fa_from_bf16(((const uint16_t *)src)[index]);
  return fa_from_f16(((const uint16_t *)src)[index]);
}

ALWAYS_INLINE void FN(put)(void *dst, fa_dtype dtype, int64_t index, REAL x) {
  if (dtype == FA_F32) ((float *)dst)[index] = (float)x;
  if (dtype == FA_F64) ((double *)dst)[index] = (double)x;
  if (dtype == FA_BF16) ((uint16_t *)dst)[index] = fa_to_bf16((float)x);
  if (dtype == FA_F16) ((uint16_t *)dst)[index] = fa_to_f16((float)x);
}

/* dtype and stride are constants after inlining, so the loop vectorises. */
ALWAYS_INLINE void FN(get_row)(REAL *restrict dst, const void *src, const fa_dtype dtype, int64_t start, const int64_t stride, int count) {
  for (int i = 0; i < count; i++) dst[i] = FN(get)(src, dtype, start + i * stride);
}

static void FN(load_row)(REAL *dst, const void *src, fa_dtype dtype, int64_t start, int64_t stride, int count) {
  if (stride != 1) {
    FN(get_row)(dst, src, dtype, start, stride, count);
    return;
  }
  switch (dtype) {
    case FA_F32: FN(get_row)(dst, src, FA_F32, start, 1, count); break;
    case FA_F64: FN(get_row)(dst, src, FA_F64, start, 1, count); break;
    case FA_BF16: FN(get_row)(dst, src, FA_BF16, start, 1, count); break;
    default: FN(get_row)(dst, src, FA_F16, start, 1, count); break;
  }
}

static void FN(load)(void *dst, int ld, const void *src, fa_dtype dtype, int64_t row_stride, int64_t column_stride, int rows, int columns) {
  for (int r = 0; r < rows; r++) {
    REAL *row = (REAL *)dst + (ptrdiff_t)r * ld;
    FN(load_row)(row, src, dtype, r * row_stride, column_stride, columns);
    for (int c = columns; c < ld; c++) row[c] = 0;
  }
}

/* Four rows at a time through a small buffer: conversion runs along rows, and each column gets four neighbours in one go. */
static void FN(load_transposed)(void *dst, int ld, const void *src, fa_dtype dtype, int64_t row_stride, int64_t column_stride, int rows,
                                int columns) {
  REAL buffer[4][FA_MAX_HEAD_DIM];
  for (int r = 0; r < ld; r += 4) {
    for (int i = 0; i < 4; i++) {
      if (r + i < rows)
        FN(load_row)(buffer[i], src, dtype, (r + i) * row_stride, column_stride, columns);
      else
        memset(buffer[i], 0, (size_t)columns * sizeof(REAL));
    }
    for (int c = 0; c < columns; c++)
      for (int i = 0; i < 4; i++) ((REAL *)dst)[(ptrdiff_t)c * ld + r + i] = buffer[i][c];
  }
}

ALWAYS_INLINE void FN(put_row)(void *restrict dst, const fa_dtype dtype, int64_t start, const int64_t stride, const REAL *restrict src,
                               REAL scale, int count) {
  for (int i = 0; i < count; i++) FN(put)(dst, dtype, start + i * stride, src[i] * scale);
}

static void FN(store)(void *dst, fa_dtype dtype, int64_t row_stride, int64_t column_stride, const void *src, int ld, int rows, int columns,
                      const double *row_scale) {
  for (int r = 0; r < rows; r++) {
    const REAL *row = (const REAL *)src + (ptrdiff_t)r * ld;
    REAL scale = row_scale ? (REAL)row_scale[r] : 1;
    int64_t start = r * row_stride;
    if (column_stride != 1)
      FN(put_row)(dst, dtype, start, column_stride, row, scale, columns);
    else if (dtype == FA_F32)
      FN(put_row)(dst, FA_F32, start, 1, row, scale, columns);
    else if (dtype == FA_BF16)
      FN(put_row)(dst, FA_BF16, start, 1, row, scale, columns);
    else if (dtype == FA_F16)
      FN(put_row)(dst, FA_F16, start, 1, row, scale, columns);
    else
      FN(put_row)(dst, FA_F64, start, 1, row, scale, columns);
  }
}

/* x - x is 0 for a finite x and NaN else, and NaN survives the sum. */
static int FN(all_finite)(const void *tile, int64_t count) {
  VEC sum = {0};
  for (int64_t i = 0; i < count; i += LANES) sum += LOAD((const REAL *)tile + i) - LOAD((const REAL *)tile + i);
  for (int i = 0; i < LANES; i++)
    if (sum[i] != 0) return 0;
  return 1;
}

/* exp(x) = 2^n * e^r with n = round(x / ln 2), |r| <= ln 2 / 2. Adding ROUND_MAGIC puts n into the low bits of the sum, from where a
 * shift makes it an exponent. Below EXP_LOW: 0 exactly. NaN stays NaN. */
ALWAYS_INLINE VEC FN(exp)(VEC x) {
  static const REAL coefficient[] = {EXP_COEFFICIENTS};
  const int degree = sizeof coefficient / sizeof coefficient[0] - 1;
  IVEC vanishes = (IVEC)(x < FN(splat)(EXP_LOW));
  x = FN(select)(vanishes, FN(splat)(EXP_LOW), x);
  x = FN(select)((IVEC)(x > FN(splat)(EXP_HIGH)), FN(splat)(EXP_HIGH), x);
  VEC shifted = x * FN(splat)((REAL)1.4426950408889634074) + FN(splat)(ROUND_MAGIC);
  VEC n = shifted - FN(splat)(ROUND_MAGIC);
  VEC r = x - n * FN(splat)(LN2_HIGH);
  r = r - n * FN(splat)(LN2_LOW);
  VEC sum = FN(splat)(coefficient[degree]);
  for (int i = degree - 1; i >= 0; i--) sum = sum * r + FN(splat)(coefficient[i]);
  IVEC exponent = ((IVEC)shifted + EXPONENT_BIAS) << MANTISSA_BITS;
  return FN(select)(vanishes, (VEC){0}, sum * (VEC)exponent);
}

/* tanh(x) = sign(x) (1 - e) / (1 + e) with e = exp(-2|x|): absolute error of one rounding, which is what a score needs. */
ALWAYS_INLINE VEC FN(tanh)(VEC x) {
  IVEC sign = (IVEC)x & (IVEC)FN(splat)((REAL)-0.0);
  VEC magnitude = (VEC)((IVEC)x ^ sign);
  VEC e = FN(exp)(magnitude * FN(splat)(-2));
  VEC one = FN(splat)(1);
  return (VEC)((IVEC)((one - e) / (one + e)) | sign);
}

static void FN(softcap)(REAL *s, int count, REAL scale, REAL cap, REAL *factor) {
  VEC inner = FN(splat)(scale / cap);
  for (int i = 0; i < count; i += LANES) {
    VEC t = FN(tanh)(LOAD(s + i) * inner);
    STORE(s + i, t * FN(splat)(cap));
    if (factor) STORE(factor + i, FN(splat)(1) - t * t);
  }
}

static void FN(score_row)(const fa_score_row *row, void *scores, int count, void *softcap_factor) {
  REAL *s = scores, *factor = softcap_factor;
  if (row->softcap > 0)
    FN(softcap)(s, count, (REAL)row->scale, (REAL)row->softcap, factor);
  else
    for (int i = 0; i < count; i++) s[i] *= (REAL)row->scale;
  if (row->slope != 0)
    for (int i = 0; i < count; i++) s[i] -= (REAL)row->slope * (REAL)abs(row->diagonal - i);
  if (row->bias && row->lo < row->hi) {
    REAL bias[FA_BLOCK_N];
    FN(load_row)(bias, row->bias, row->bias_dtype, row->lo * row->bias_stride, row->bias_stride, row->hi - row->lo);
    for (int i = row->lo; i < row->hi; i++) s[i] += bias[i - row->lo];
  }
  if (row->mask)
    for (int i = row->lo; i < row->hi; i++) s[i] = row->mask[i * row->mask_stride] ? s[i] : -(REAL)INFINITY;
  for (int i = 0; i < row->lo && i < count; i++) s[i] = -(REAL)INFINITY;
  for (int i = row->hi > 0 ? row->hi : 0; i < count; i++) s[i] = -(REAL)INFINITY;
  if (row->softcap > 0 && factor) /* an invisible product may be NaN */
    for (int i = 0; i < count; i++) factor[i] = s[i] == -(REAL)INFINITY ? 0 : factor[i];
}

/* NaN is not a maximum; it comes through in the exponentials. */
static double FN(row_max)(const void *s, int count) {
  VEC best = FN(splat)(-(REAL)INFINITY);
  for (int i = 0; i < count; i += LANES) {
    VEC x = LOAD((const REAL *)s + i);
    best = FN(select)((IVEC)(x > best), x, best);
  }
  REAL result = best[0];
  for (int i = 1; i < LANES; i++) result = best[i] > result ? best[i] : result;
  return (double)result;
}

ALWAYS_INLINE double FN(horizontal_sum)(VEC sum) {
  double result = 0;
  for (int i = 0; i < LANES; i++) result += (double)sum[i];
  return result;
}

static double FN(exp_row)(void *s, int count, double shift) {
  VEC sum = {0};
  for (int i = 0; i < count; i += LANES) {
    VEC p = FN(exp)(LOAD((REAL *)s + i) - FN(splat)((REAL)shift));
    STORE((REAL *)s + i, p);
    sum += p;
  }
  return FN(horizontal_sum)(sum);
}

static void FN(scale_row)(void *s, int count, double factor) {
  for (int i = 0; i < count; i++) ((REAL *)s)[i] *= (REAL)factor;
}

/* Summed in double: delta's error enters every gradient of its row with one sign. */
static double FN(dot_row)(const void *a, const void *b, int count) {
  double sum[4] = {0, 0, 0, 0};
  for (int i = 0; i < count; i += 4)
    for (int c = 0; c < 4; c++) sum[c] += (double)((const REAL *)a)[i + c] * (double)((const REAL *)b)[i + c];
  return sum[0] + sum[1] + (sum[2] + sum[3]);
}

static void FN(multiply_row)(void *out, const void *a, const void *b, int count) {
  for (int i = 0; i < count; i += LANES) STORE((REAL *)out + i, LOAD((const REAL *)a + i) * LOAD((const REAL *)b + i));
}

/* Tiles start at multiples of 64 keys, so a block of four words never straddles two tiles. */
static void FN(dropout_row)(const fa_dropout_row *row, void *multiplier, int count) {
  for (int i = 0; i < count; i += 4) {
    fa_philox_block words = fa_dropout_words(row->key, row->b, row->h, row->i, (row->first_column + i) >> 2);
    for (int c = 0; c < 4; c++) ((REAL *)multiplier)[i + c] = words.word[c] < row->threshold ? 0 : (REAL)row->keep_scale;
  }
}

static void FN(signs_row)(void *s, const void *multiplier, int count) {
  for (int i = 0; i < count; i++) ((REAL *)s)[i] = ((const REAL *)multiplier)[i] == 0 ? -((REAL *)s)[i] : ((REAL *)s)[i];
}

/* delta in two parts: rounded to one, it would shift a whole row by one error. */
static void FN(gradient_row)(void *ds, const void *p, const void *dp, double delta, int count) {
  VEC high = FN(splat)((REAL)delta), low = FN(splat)((REAL)(delta - (double)(REAL)delta));
  for (int i = 0; i < count; i += LANES) {
    VEC weight = LOAD((const REAL *)p + i);
    VEC gradient = weight * ((LOAD((const REAL *)dp + i) - high) - low);
    STORE((REAL *)ds + i, FN(select)((IVEC)(weight == (VEC){0}), (VEC){0}, gradient));
  }
}

static double FN(distance_sum)(const void *ds, int count, int diagonal) {
  double sum = 0;
  for (int i = 0; i < count; i++) sum += (double)((const REAL *)ds)[i] * abs(diagonal - i);
  return sum;
}

static void FN(add_row)(void *out, const void *in, int count) {
  for (int i = 0; i < count; i += LANES) STORE((REAL *)out + i, LOAD((REAL *)out + i) + LOAD((const REAL *)in + i));
}

static double FN(row_sum)(const void *s, int count) {
  double sum[4] = {0, 0, 0, 0};
  for (int i = 0; i < count; i += 4)
    for (int c = 0; c < 4; c++) sum[c] += (double)((const REAL *)s)[i + c];
  return sum[0] + sum[1] + (sum[2] + sum[3]);
}

static const fa_tile_ops FN(ops) = {
    .real_bytes = REAL_BITS / 8,
    .gemm = FN(gemm),
    .gemm_skipping_zeros = FN(gemm_skipping_zeros),
    .load = FN(load),
    .load_transposed = FN(load_transposed),
    .store = FN(store),
    .all_finite = FN(all_finite),
    .score_row = FN(score_row),
    .row_max = FN(row_max),
    .exp_row = FN(exp_row),
    .scale_row = FN(scale_row),
    .dot_row = FN(dot_row),
    .multiply_row = FN(multiply_row),
    .dropout_row = FN(dropout_row),
    .signs_row = FN(signs_row),
    .gradient_row = FN(gradient_row),
    .distance_sum = FN(distance_sum),
    .add_row = FN(add_row),
    .row_sum = FN(row_sum),
};

#undef VEC
#undef IVEC
#undef LANES
#undef LOAD
#undef STORE
