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

/* 32 rows as bf16, zero past the last row and dim: where they lie, if that is how they lie, else a copy. */
typedef struct {
  int strips, parts; /* 32 dims each; 2: high and low */
  const uint16_t *row[2][32];
  _Alignas(64) uint16_t copy[2][32][FA_MAX_HEAD_DIM];
  _Alignas(64) float loaded[32 * FA_MAX_HEAD_DIM]; /* on the way to a copy */
} fa_amx_rows;

/* Parts of a value of this dtype; 0: AMX does not compute with it. */
static inline int fa_amx_parts(fa_dtype dtype) { return dtype == FA_BF16 ? 1 : dtype == FA_F16 ? 2 : 0; }

static inline int fa_amx_strips(int dim) { return (dim + 31) / 32; }

static inline int64_t fa_amx_halves(int dim, int parts) { return (int64_t)fa_amx_strips(dim) * parts * 2 * 512; }

/* Rows [start, start + rows) of a head; negate turns their signs. */
void fa_amx_take_queries(fa_amx_rows *out, const fa_head *head, const fa_view *view, int start, int rows, int dim, int negate);
void fa_amx_take_keys(fa_amx_rows *out, const fa_head *head, const fa_view *view, int start, int rows, int dim);

void fa_amx_put(const fa_amx_rows *rows, fa_amx_form form, uint16_t *tiles);

/* No NaN and no infinity among them. */
int fa_amx_finite(const fa_amx_rows *rows);

/* sums[r] = a's row r times b's. */
void fa_amx_dot_rows(const fa_amx_rows *a, const fa_amx_rows *b, float sums[32]);

#endif
