/* tier.h: what a CPU tier provides: the inner loops on tiles, once in float and once in double.
 *
 * The engine above is written once for both: a tile is a `void *` to `real` elements (float for 16- and 32-bit inputs, double for 64-bit)
 * with a leading dimension counted in elements; row statistics cross this border as double. A new tier is one row in tiers.def and
 * one file. */
#ifndef FA_CPU_TIER_H
#define FA_CPU_TIER_H

#include <stddef.h>

#include "../core/philox.h"
#include "../core/problem.h"

/* Every leading dimension, and so every n of gemm, is a multiple of this many elements; tiles are zero-filled up to it. */
enum { FA_TILE_PAD = 16 };

/* Keys of a tile. 64, so that a block mask (multiples of 64) never cuts one. Score tiles and transposed keys have 64 columns, and rows
 * FA_BLOCK_LD elements apart: an odd number of FA_TILE_PAD, so that a column does not fall into a few sets of the cache. */
enum { FA_BLOCK_N = 64, FA_BLOCK_LD = FA_BLOCK_N + FA_TILE_PAD };

/* How the raw products of one row of a score tile become scores. Columns count from the tile's first key. */
typedef struct {
  double scale, softcap; /* softcap 0: none */
  double slope;          /* ALiBi: adds -slope * |diagonal - column| */
  int diagonal;
  const void *bias; /* NULL: none */
  fa_dtype bias_dtype;
  int64_t bias_stride;
  const uint8_t *mask; /* NULL: none */
  int64_t mask_stride;
  int lo, hi; /* columns outside [lo, hi) become -inf; nothing outside is read */
} fa_score_row;

typedef struct {
  fa_philox_key key;
  uint32_t threshold;
  double keep_scale; /* 1 / (1 - p) */
  int b, h, i, first_column;
} fa_dropout_row;

typedef struct {
  int real_bytes;

  /* c[m][n] (+)= sum over k of a(m, k) * b[k][n], a(m, k) = a[m * a_row + k * a_col]: rows and columns of a may change roles. */
  void (*gemm)(int m, int n, int k, const void *a, ptrdiff_t a_row, ptrdiff_t a_col, const void *b, ptrdiff_t b_row, void *c,
               ptrdiff_t c_row, int accumulate);
  /* The same with a zero a(m, k) meaning "no such pair": a NaN or infinity in that row of b does not reach c. Always accumulates. */
  void (*gemm_skipping_zeros)(int m, int n, int k, const void *a, ptrdiff_t a_row, ptrdiff_t a_col, const void *b, ptrdiff_t b_row, void *c,
                              ptrdiff_t c_row);

  /* Few rows of a: b is read once, as it lies, of the tiles' own type or a 16-bit one; its dims are a multiple of FA_TILE_PAD. */

  /* c[m][n] = sum over k of a[m][k] * b[n][k]; n of any size, and columns of c up to the next multiple of 4 may be overwritten. */
  void (*dots)(int m, int n, int k, const void *a, ptrdiff_t a_row, const void *b, fa_dtype b_dtype, ptrdiff_t b_row, void *c,
               ptrdiff_t c_row);
  /* c[m][n] += sum over k of a[m][k] * b[k][n] */
  void (*few)(int m, int n, int k, const void *a, ptrdiff_t a_row, const void *b, fa_dtype b_dtype, ptrdiff_t b_row, void *c,
              ptrdiff_t c_row);

  /* rows x columns elements of any dtype and strides -> dst[row][column], zero up to ld. */
  void (*load)(void *dst, int ld, const void *src, fa_dtype dtype, int64_t row_stride, int64_t column_stride, int rows, int columns);
  /* The same, transposed: dst[column][row], zero from rows up to ld. */
  void (*load_transposed)(void *dst, int ld, const void *src, fa_dtype dtype, int64_t row_stride, int64_t column_stride, int rows,
                          int columns);
  /* src[row][column] * row_scale[row] -> any dtype and strides; row_scale may be NULL. */
  void (*store)(void *dst, fa_dtype dtype, int64_t row_stride, int64_t column_stride, const void *src, int ld, int rows, int columns,
                const double *row_scale);
  int (*all_finite)(const void *tile, int64_t count);

  /* Rows FA_BLOCK_LD elements apart; count is a multiple of FA_TILE_PAD. */

  /* s = 2^(s * to_log2 - shift[row]), its sum added to sum[row]. Where a row's maximum demands it, its shift is raised first, and its sum
   * and its row of out (out_ld elements) shrink accordingly. A new row starts with shift -inf and sum 0. */
  void (*softmax_tile)(int rows, int count, void *s, double to_log2, double *shift, double *sum, void *out, int out_ld);
  /* The same for a shift that is known: +inf makes a row 0. sum[row] is set; sum may be NULL. */
  void (*weights_tile)(int rows, int count, void *s, double to_log2, const double *shift, double *sum);
  /* ds = p == 0 ? 0 : p * (ds - delta[row]) */
  void (*gradient_tile)(int rows, int count, void *ds, const void *p, const double *delta);

  /* One row of a tile. */
  void (*score_row)(const fa_score_row *row, void *s, int count, void *softcap_factor); /* factor: ds/d(uncapped), may be NULL */
  double (*row_max)(const void *s, int count);
  void (*scale_row)(void *s, int count, double factor);
  double (*dot_row)(const void *a, const void *b, int count);
  void (*multiply_row)(void *out, const void *a, const void *b, int count);
  void (*dropout_row)(const fa_dropout_row *row, void *multiplier, int count); /* 0 where dropped, else keep_scale */
  void (*signs_row)(void *s, const void *multiplier, int count);               /* s gets the sign bit where multiplier is 0 */
  double (*distance_sum)(const void *ds, int count, int diagonal);             /* sum of ds * |diagonal - column| */
  void (*add_row)(void *out, const void *in, int count);
  double (*row_sum)(const void *s, int count);
} fa_tile_ops;

typedef struct {
  const fa_tile_ops *f32, *f64;
} fa_tier;

/* The tier in use: the last usable row of tiers.def, or the one that FLASH_ATTN_C_CPU names. Chosen once. */
fa_code fa_cpu_tier(const fa_tier **tier, const char **name, fa_error *error);

/* The usable rows, as JSON: ["portable", "avx2"]. */
void fa_cpu_tier_list(char *text, size_t bytes);

static inline const fa_tile_ops *fa_ops_for(const fa_tier *tier, fa_dtype dtype) { return dtype == FA_F64 ? tier->f64 : tier->f32; }

static inline void *fa_at(const fa_tile_ops *ops, const void *tile, int64_t element) {
  return (char *)(uintptr_t)tile + element * ops->real_bytes;
}

static inline int fa_pad(int count) { return (count + FA_TILE_PAD - 1) / FA_TILE_PAD * FA_TILE_PAD; }

/* The distance of rows of `dim` columns, for the same reason as FA_BLOCK_LD. */
static inline int fa_tile_ld(int dim) { return (fa_pad(dim) / FA_TILE_PAD | 1) * FA_TILE_PAD; }

#endif
