/* amx_pack.h: rows of a tensor -> operand tiles of the AMX products, 32 rows at a time.
 *
 * A row is a key or a query. A product sums either over the dims of rows or over the rows, with the rows' tensor at its left or at its
 * right; in each of the four forms 32 rows take fa_amx_halves():
 *
 *     FA_AMX_DIMS_LEFT    [32 dims each][part][16 rows each] of [16 rows][32 dims]          as the rows lie
 *     FA_AMX_DIMS_RIGHT   [32 dims each][part][16 rows each] of [16 pairs of dims][16 rows]
 *     FA_AMX_ROWS_RIGHT   [32 dims each][part][16 dims each] of [16 pairs of rows][16 dims]
 *     FA_AMX_ROWS_LEFT    [32 dims each][part][16 dims each] of [16 dims][32 rows] */
#ifndef FA_AMX_PACK_H
#define FA_AMX_PACK_H

#include "head.h"

typedef enum { FA_AMX_DIMS_LEFT, FA_AMX_DIMS_RIGHT, FA_AMX_ROWS_LEFT, FA_AMX_ROWS_RIGHT } fa_amx_form;

/* 32 rows as bf16, zero past the last row and dim. */
typedef struct {
  int strips, parts; /* 32 dims each; 2: high and low */
  _Alignas(64) uint16_t part[2][32][FA_MAX_HEAD_DIM];
} fa_amx_rows;

/* Parts of a value of this dtype; 0: AMX does not compute with it. */
static inline int fa_amx_parts(fa_dtype dtype) { return dtype == FA_BF16 ? 1 : dtype == FA_F16 ? 2 : 0; }

static inline int fa_amx_strips(int dim) { return (dim + 31) / 32; }

static inline int64_t fa_amx_halves(int dim, int parts) { return (int64_t)fa_amx_strips(dim) * parts * 2 * 512; }

/* tile[row][ld] of floats that came from 16-bit values; negate turns their signs. */
void fa_amx_take_rows(fa_amx_rows *out, const float *tile, int ld, int rows, int dim, int parts, int negate);

void fa_amx_put(const fa_amx_rows *rows, fa_amx_form form, uint16_t *tiles);

/* The largest |row|^2, and the largest element, of what is finite in tile[row][ld]. */
void fa_amx_row_sizes(const float *tile, int rows, int ld, float *norm, float *top);

#endif
