/* gradient_tile.c: see gradient_tile.h. */
#include "gradient_tile.h"

#include <math.h>
#include <string.h>

fa_gradient_tiles fa_carve_gradient_tiles(const fa_job *job, fa_arena *arena) {
  const fa_problem *p = job->problem;
  size_t real = (size_t)job->ops->real_bytes, rows = (size_t)job->block_m;
  size_t dim_qk = (size_t)fa_pad(p->dim_qk), dim_v = (size_t)fa_pad(p->dim_v), scores = rows * FA_BLOCK_N * real;
  fa_gradient_tiles t;
  t.q = fa_take(arena, rows * dim_qk * real);
  t.dout = fa_take(arena, rows * dim_v * real);
  t.k = fa_take(arena, FA_BLOCK_N * dim_qk * real);
  t.kt = fa_take(arena, (size_t)p->dim_qk * FA_BLOCK_N * real);
  t.vt = fa_take(arena, (size_t)p->dim_v * FA_BLOCK_N * real);
  t.p = fa_take(arena, scores);
  t.ds = fa_take(arena, scores);
  t.softcap = fa_take(arena, p->score.softcap > 0 ? scores : 0);
  t.multiplier = fa_take(arena, FA_BLOCK_N * real);
  t.p_sum = fa_take(arena, rows * sizeof(double));
  t.distances = fa_take(arena, rows * sizeof(double));
  return t;
}

void fa_load_key_side(const fa_head *head, fa_gradient_tiles *t, int n0, int columns) {
  const fa_problem *p = head->problem;
  fa_load_keys(head, &p->k, n0, columns, p->dim_qk, t->k);
  fa_load_keys_transposed(head, &p->k, n0, columns, p->dim_qk, t->kt);
  fa_load_keys_transposed(head, &p->v, n0, columns, p->dim_v, t->vt);
}

void fa_load_query_side(const fa_head *head, fa_gradient_tiles *t, int m0, int rows) {
  const fa_problem *p = head->problem;
  fa_load_queries(head, &p->q, m0, rows, p->dim_qk, t->q);
  fa_load_queries(head, &p->grad.dout, m0, rows, p->dim_v, t->dout);
}

/* One row: scores -> p, products dout.v -> ds. */
static void gradient_row(const fa_head *head, fa_gradient_tiles *t, int r, int m, int n0, double delta) {
  const fa_tile_ops *ops = head->ops;
  void *p = fa_at(ops, t->p, (int64_t)r * FA_BLOCK_N), *ds = fa_at(ops, t->ds, (int64_t)r * FA_BLOCK_N);
  double lse = fa_statistic(head, &head->problem->lse, m);
  t->p_sum[r] = 0;
  if (lse == -INFINITY)
    memset(p, 0, FA_BLOCK_N * (size_t)ops->real_bytes); /* this row sees nothing */
  else
    t->p_sum[r] = ops->exp_row(p, FA_BLOCK_N, lse);
  if (head->problem->score.alibi.data) t->distances[r] = ops->distance_sum(p, FA_BLOCK_N, fa_diagonal(head, m) - n0);
  if (head->problem->dropout.p > 0) {
    fa_dropout_row row = fa_dropout_of(head, m, n0);
    ops->dropout_row(&row, t->multiplier, FA_BLOCK_N);
    ops->multiply_row(ds, ds, t->multiplier, FA_BLOCK_N);
  }
  ops->gradient_row(ds, p, ds, delta, FA_BLOCK_N);
  if (head->problem->dropout.p > 0) ops->multiply_row(p, p, t->multiplier, FA_BLOCK_N);
}

int fa_gradient_tile(const fa_head *head, fa_gradient_tiles *t, const double *delta, int m0, int rows, int n0, int columns) {
  const fa_problem *p = head->problem;
  const fa_tile_ops *ops = head->ops;
  ops->gemm(rows, FA_BLOCK_N, p->dim_qk, t->q, fa_pad(p->dim_qk), 1, t->kt, FA_BLOCK_N, t->p, FA_BLOCK_N, 0);
  int partial = fa_score_tile(head, m0, rows, n0, columns, t->p, t->softcap);
  ops->gemm(rows, FA_BLOCK_N, p->dim_v, t->dout, fa_pad(p->dim_v), 1, t->vt, FA_BLOCK_N, t->ds, FA_BLOCK_N, 0);
  for (int r = 0; r < rows; r++) gradient_row(head, t, r, m0 + r, n0, delta[r]);
  return partial;
}
