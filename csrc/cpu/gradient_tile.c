/* gradient_tile.c: see gradient_tile.h. */
#include "gradient_tile.h"

#include <math.h>
#include <string.h>

#define LOG2_E 1.4426950408889634074

void fa_carve_key_side(const fa_job *job, fa_gradient_tiles *t, fa_arena *arena) {
  const fa_problem *p = job->problem;
  size_t real = (size_t)job->ops->real_bytes;
  t->k = fa_take(arena, FA_BLOCK_N * (size_t)fa_tile_ld(p->dim_qk) * real);
  t->kt = fa_take(arena, (size_t)p->dim_qk * FA_BLOCK_LD * real);
  t->vt = fa_take(arena, (size_t)p->dim_v * FA_BLOCK_LD * real);
}

fa_gradient_tiles fa_carve_gradient_tiles(const fa_job *job, fa_arena *arena) {
  const fa_problem *p = job->problem;
  size_t real = (size_t)job->ops->real_bytes, rows = (size_t)job->block_m;
  size_t dim_qk = (size_t)fa_tile_ld(p->dim_qk), dim_v = (size_t)fa_tile_ld(p->dim_v), scores = rows * FA_BLOCK_LD * real;
  fa_gradient_tiles t;
  t.q = fa_take(arena, rows * dim_qk * real);
  t.dout = fa_take(arena, rows * dim_v * real);
  fa_carve_key_side(job, &t, arena);
  t.p = fa_take(arena, scores);
  t.ds = fa_take(arena, scores);
  t.softcap = fa_take(arena, p->score.softcap > 0 ? scores : 0);
  t.multiplier = fa_take(arena, FA_BLOCK_N * real);
  t.shift = fa_take(arena, rows * sizeof(double));
  t.p_sum = p->grad.dsinks.data || p->grad.dalibi.data ? fa_take(arena, rows * sizeof(double)) : NULL;
  t.distances = p->grad.dalibi.data ? fa_take(arena, rows * sizeof(double)) : NULL;
  return t;
}

void fa_load_key_side(const fa_head *head, fa_gradient_tiles *t, int n0, int columns) {
  const fa_problem *p = head->problem;
  fa_load_key_rows(head, &p->k, n0, columns, p->dim_qk, t->k, fa_tile_ld(p->dim_qk));
  fa_load_keys_transposed(head, &p->k, n0, columns, p->dim_qk, t->kt);
  fa_load_keys_transposed(head, &p->v, n0, columns, p->dim_v, t->vt);
}

void fa_load_query_side(const fa_head *head, fa_gradient_tiles *t, int m0, int rows) {
  const fa_problem *p = head->problem;
  fa_load_query_rows(head, &p->q, m0, rows, p->dim_qk, t->q, fa_tile_ld(p->dim_qk));
  fa_load_query_rows(head, &p->grad.dout, m0, rows, p->dim_v, t->dout, fa_tile_ld(p->dim_v));
  for (int r = 0; r < rows; r++) {
    double lse = fa_statistic(head, &p->lse, m0 + r);
    t->shift[r] = lse == -INFINITY ? INFINITY : lse * LOG2_E; /* a row that sees nothing has weights 0 */
  }
}

/* One row with dropout: dS is of the kept and scaled dP, and dV is of the kept and scaled P. */
static void dropped_row(const fa_head *head, fa_gradient_tiles *t, void *p, void *ds, int m, int n, int count, const double *delta) {
  const fa_tile_ops *ops = head->ops;
  fa_dropout_row row = fa_dropout_of(head, m, n);
  ops->dropout_row(&row, t->multiplier, count);
  ops->multiply_row(ds, ds, t->multiplier, count);
  ops->gradient_tile(1, count, ds, p, delta);
  ops->multiply_row(p, p, t->multiplier, count);
}

int fa_gradient_patch(const fa_head *head, fa_gradient_tiles *t, const double *delta, int m0, int n0, int columns, const fa_patch *patch) {
  const fa_problem *p = head->problem;
  const fa_tile_ops *ops = head->ops;
  int row = patch->row, rows = patch->rows, count = patch->hi - patch->lo, ld_qk = fa_tile_ld(p->dim_qk), ld_v = fa_tile_ld(p->dim_v);
  int64_t first = (int64_t)row * FA_BLOCK_LD + patch->lo;
  void *weights = fa_at(ops, t->p, first), *ds = fa_at(ops, t->ds, first);
  ops->gemm(rows, count, p->dim_qk, fa_at(ops, t->q, (int64_t)row * ld_qk), ld_qk, 1, fa_at(ops, t->kt, patch->lo), FA_BLOCK_LD, weights,
            FA_BLOCK_LD, 0);
  ops->gemm(rows, count, p->dim_v, fa_at(ops, t->dout, (int64_t)row * ld_v), ld_v, 1, fa_at(ops, t->vt, patch->lo), FA_BLOCK_LD, ds,
            FA_BLOCK_LD, 0);
  void *softcap = p->score.softcap > 0 ? fa_at(ops, t->softcap, first) : NULL;
  int partial = fa_score_patch(head, m0, n0, columns, patch, weights, softcap);
  ops->weights_tile(rows, count, weights, head->to_log2, t->shift + row, t->p_sum ? t->p_sum + row : NULL);
  for (int r = 0; r < rows && t->distances; r++)
    t->distances[row + r] =
        ops->distance_sum(fa_at(ops, weights, (int64_t)r * FA_BLOCK_LD), count, fa_diagonal(head, m0 + row + r) - n0 - patch->lo);
  if (p->dropout.p == 0) ops->gradient_tile(rows, count, ds, weights, delta + row);
  for (int r = 0; r < rows && p->dropout.p > 0; r++)
    dropped_row(head, t, fa_at(ops, weights, (int64_t)r * FA_BLOCK_LD), fa_at(ops, ds, (int64_t)r * FA_BLOCK_LD), m0 + row + r,
                n0 + patch->lo, count, delta + row + r);
  return partial;
}

void fa_gradient_tile(const fa_head *head, fa_gradient_tiles *t, const double *delta, int m0, int rows, int n0, int columns) {
  fa_gradient_patch(head, t, delta, m0, n0, columns, &(fa_patch){0, rows, 0, FA_BLOCK_N});
}
