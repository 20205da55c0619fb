/* bias_tile.h: which tile of dbias a CTA owns, what adds to it, and how it is written. Both bias kernels do this alike.
 *
 * dbias is dS summed over the dimensions that bias broadcasts. A CTA owns one tile and walks over all (batch entry, head, query tile,
 * key tile) that add to it, in order: no atomics, bitwise stable. Where rows (or columns) are broadcast the tile collects whole tiles
 * of dS, and the sum over its rows (columns) comes at the end.
 */
#ifndef FA_BIAS_TILE_H
#define FA_BIAS_TILE_H

#include "gradient.h"

typedef struct {
  fa_range b, h, m, n; /* batch entries, heads, first rows of tiles, first keys of tiles */
} fa_bias_work;

FA_INLINE fa_range fa_bias_range(int broadcast, int begin, int step, int all) {
  fa_range r = {broadcast ? 0 : begin, broadcast ? all : begin + step};
  return r;
}

/* The grid counts, from the fastest: key tile, query tile, head, batch entry of dbias. */
FA_INLINE fa_bias_work fa_find_bias_tile(const fa_gradient_args *args, int rows, int columns) {
  const fa_arg_bias_gradient *g = &args->dbias;
  unsigned tiles_n = (unsigned)fa_ceil_div(g->columns, columns), tiles_m = (unsigned)fa_ceil_div(g->rows, rows), left = blockIdx.x;
  fa_bias_work work;
  work.n = fa_bias_range(g->columns == 1, (int)(left % tiles_n) * columns, columns, args->problem.seqlen_k);
  left /= tiles_n;
  work.m = fa_bias_range(g->rows == 1, (int)(left % tiles_m) * rows, rows, args->problem.seqlen_q);
  left /= tiles_m;
  work.h = fa_bias_range(g->heads == 1, (int)(left % (unsigned)g->heads), 1, args->problem.heads_q);
  work.b = fa_bias_range(g->batch == 1, (int)(left / (unsigned)g->heads), 1, args->problem.batch);
  return work;
}

/* False when no pair of the tile is visible by the rule and the block mask. */
FA_INLINE int fa_bias_tile_is_visible(const fa_arg_problem *p, const fa_tile *tile, int m0, int rows, int n0, int columns) {
  int m1 = fa_min(m0 + rows, tile->len_q);
  if (m0 >= m1 || n0 >= tile->len_k) return 0;
  fa_range keys = fa_visited_keys(p->rule, tile->len_q, tile->len_k, m0, m1);
  return n0 < keys.hi && n0 + columns > keys.lo && fa_in_block_mask(p, tile->b, tile->h, m0, n0);
}

FA_INLINE void fa_store_bias(const fa_gradient_args *args, const fa_bias_work *work, int row, int column, REAL x) {
  const fa_arg_grid *grid = &args->dbias.grid;
  if (work->m.lo + row >= args->dbias.rows || work->n.lo + column >= args->dbias.columns) return;
  int64_t at = work->b.lo * grid->b + work->h.lo * grid->h + (work->m.lo + row) * grid->m + (work->n.lo + column) * grid->n;
  if (grid->dtype == FA_ARG_F64)
    ((double *)grid->data)[at] = x;
  else if (grid->dtype == FA_ARG_F32)
    ((float *)grid->data)[at] = (float)x;
  else
    ((uint16_t *)grid->data)[at] = (uint16_t)fa_pack((float)x, 0.0f);
}

/* Writes the CTA's tile from shared memory, [rows][columns] and complete for all threads. Uses it up. */
FA_INLINE void fa_write_bias_tile(const fa_gradient_args *args, const fa_bias_work *work, REAL *sum_smem, int rows, int columns,
                                  int threads) {
  int one_row = args->dbias.rows == 1, one_column = args->dbias.columns == 1;
  if (one_column) {
    for (int row = threadIdx.x; row < rows; row += threads)
      for (int column = 1; column < columns; column++) sum_smem[row * columns] += sum_smem[row * columns + column];
    __syncthreads(); /* every row's sum is in its first column */
  }
  int used_columns = one_column ? 1 : columns;
  if (one_row) {
    for (int column = threadIdx.x; column < used_columns; column += threads)
      for (int row = 1; row < rows; row++) sum_smem[column] += sum_smem[row * columns + column];
    __syncthreads(); /* every column's sum is in its first row */
  }
  int used_rows = one_row ? 1 : rows;
  for (int item = threadIdx.x; item < used_rows * used_columns; item += threads)
    fa_store_bias(args, work, item / used_columns, item % used_columns, sum_smem[item / used_columns * columns + item % used_columns]);
}

#endif
