/* forward_tile.c: see forward_tile.h. */
#include "forward_tile.h"

#include <math.h>
#include <string.h>

#define LN_2 0.69314718055994530942

fa_forward_tile fa_carve_forward_tile(const fa_problem *p, const fa_tile_ops *ops, const fa_forward_plan *plan, fa_arena *arena,
                                      const fa_forward_tile *with) {
  size_t real = (size_t)ops->real_bytes, rows = (size_t)plan->block_m * (size_t)plan->stack;
  size_t ld_qk = (size_t)fa_tile_ld(p->dim_qk), ld_v = (size_t)fa_tile_ld(p->dim_v);
  size_t transposed = (size_t)p->dim_qk * FA_BLOCK_LD, as_rows = FA_BLOCK_N * ld_qk,
         key_elements = transposed > as_rows ? transposed : as_rows;
  fa_forward_tile t = {0};
  t.heads = fa_take(arena, (size_t)plan->stack * sizeof(fa_head));
  t.q = fa_take(arena, rows * ld_qk * real);
  t.o = fa_take(arena, rows * ld_v * real);
  t.shift = fa_take(arena, rows * sizeof(double));
  t.sum = fa_take(arena, rows * sizeof(double));
  t.out_scale = fa_take(arena, rows * sizeof(double));
  t.kt = with ? with->kt : fa_take(arena, key_elements * real);
  t.v = with ? with->v : fa_take(arena, FA_BLOCK_N * ld_v * real);
  t.s = fa_take(arena, (rows < FA_PATCH_ROWS ? rows : FA_PATCH_ROWS) * FA_BLOCK_LD * real);
  t.dropout = with ? with->dropout : fa_take(arena, FA_BLOCK_N * real);
  return t;
}

void fa_begin_forward(const fa_forward_tile *t) {
  const fa_head *head = t->heads;
  const fa_problem *p = head->problem;
  int rows = t->rows * t->count, ld_qk = fa_tile_ld(p->dim_qk), ld_v = fa_tile_ld(p->dim_v);
  for (int g = 0; g < t->count; g++)
    fa_load_query_rows(head + g, &p->q, t->m0, t->rows, p->dim_qk, fa_at(head->ops, t->q, (int64_t)g * t->rows * ld_qk), ld_qk);
  memset(t->o, 0, (size_t)rows * (size_t)ld_v * (size_t)head->ops->real_bytes);
  for (int r = 0; r < rows; r++) {
    t->shift[r] = -INFINITY;
    t->sum[r] = 0;
  }
}

static void drop(const fa_forward_tile *t, int row, int n0, void *s, int columns) {
  const fa_head *head = t->heads + row / t->rows;
  fa_dropout_row dropout = fa_dropout_of(head, t->m0 + row % t->rows, n0);
  head->ops->dropout_row(&dropout, t->dropout, columns);
  head->ops->multiply_row(s, s, t->dropout, columns);
}

int fa_weigh_products(const fa_forward_tile *t, int n0, const fa_patch *patch) {
  const fa_tile_ops *ops = t->heads->ops;
  int columns = fa_min(FA_BLOCK_N, t->heads->seq.len_k - n0), ld_v = fa_tile_ld(t->heads->problem->dim_v), partial = 0;
  int rows = patch->rows * t->count, count = patch->hi - patch->lo;
  int64_t row = patch->row;
  for (int g = 0; g < t->count; g++)
    partial |= fa_score_patch(t->heads + g, t->m0, n0, columns, patch, fa_at(ops, t->s, (int64_t)g * t->rows * FA_BLOCK_LD), NULL);
  ops->softmax_tile(rows, count, t->s, t->heads->to_log2, t->shift + row, t->sum + row, fa_at(ops, t->o, row * ld_v), ld_v);
  for (int r = 0; r < rows && t->heads->problem->dropout.p > 0; r++)
    drop(t, (int)row + r, n0 + patch->lo, fa_at(ops, t->s, (int64_t)r * FA_BLOCK_LD), count);
  return partial;
}

void fa_add_values(const fa_forward_tile *t, const fa_patch *patch, int columns, int partial) {
  const fa_problem *p = t->heads->problem;
  const fa_tile_ops *ops = t->heads->ops;
  int ld_v = fa_tile_ld(p->dim_v), dim_v = fa_pad(p->dim_v), rows = patch->rows * t->count, seen = fa_min(patch->hi, columns) - patch->lo;
  void *o = fa_at(ops, t->o, (int64_t)patch->row * ld_v), *v = fa_at(ops, t->v, (int64_t)patch->lo * ld_v);
  if (partial && !ops->all_finite(v, (int64_t)seen * ld_v))
    ops->gemm_skipping_zeros(rows, dim_v, seen, t->s, FA_BLOCK_LD, 1, v, ld_v, o, ld_v);
  else
    ops->gemm(rows, dim_v, seen, t->s, FA_BLOCK_LD, 1, v, ld_v, o, ld_v, 1);
}

static void attend_patch(const fa_forward_tile *t, int n0, int columns, const fa_patch *patch) {
  const fa_tile_ops *ops = t->heads->ops;
  int dim_qk = t->heads->problem->dim_qk, ld_qk = fa_tile_ld(dim_qk);
  ops->gemm(patch->rows * t->count, patch->hi - patch->lo, dim_qk, fa_at(ops, t->q, (int64_t)patch->row * ld_qk), ld_qk, 1,
            fa_at(ops, t->kt, patch->lo), FA_BLOCK_LD, t->s, FA_BLOCK_LD, 0);
  fa_add_values(t, patch, columns, fa_weigh_products(t, n0, patch));
}

void fa_attend_keys(const fa_forward_tile *t, int n0) {
  const fa_head *head = t->heads;
  const fa_problem *p = head->problem;
  int columns = fa_min(FA_BLOCK_N, head->seq.len_k - n0);
  fa_patch patch = {0, t->rows, 0, fa_pad(columns)};
  if (!fa_tile_in_block_mask(head, t->m0, n0)) return;
  fa_load_keys_transposed(head, &p->k, n0, columns, p->dim_qk, t->kt);
  fa_load_key_rows(head, &p->v, n0, columns, p->dim_v, t->v, fa_tile_ld(p->dim_v));
  if (t->count > 1) {
    attend_patch(t, n0, columns, &patch);
    return;
  }
  patch.rows = 0;
  while (fa_next_patch(head, t->m0, t->rows, n0, columns, &patch)) attend_patch(t, n0, columns, &patch);
}

void fa_ask_for_next_keys(const fa_forward_tile *t, int n0, int end) {
  const fa_problem *p = t->heads->problem;
  int rows = fa_min(FA_BLOCK_N, end - n0);
  fa_ask_for_keys(t->heads, &p->k, n0, rows, p->dim_qk);
  fa_ask_for_keys(t->heads, &p->v, n0, rows, p->dim_v);
}

/* l -> 1 / l and the log-sum-exp, the sink's logit joining the denominator. */
static void finish_row(const fa_forward_tile *t, int row) {
  const fa_head *head = t->heads + row / t->rows;
  double m = t->shift[row] * LN_2, l = t->sum[row], scale = 1;
  const fa_per_head *sinks = &head->problem->score.sinks;
  if (sinks->data) {
    double sink = fa_per_head_value(sinks, head->ops, head->b, head->h);
    double top = sink > m ? sink : m;
    if (top > -INFINITY) {
      scale = exp(m - top);
      l = l * scale + exp(sink - top);
      m = top;
    }
  }
  t->out_scale[row] = l == 0 ? 0 : scale / l;
  if (head->problem->lse.data) fa_set_statistic(head, &head->problem->lse, t->m0 + row % t->rows, l == 0 ? -INFINITY : m + log(l));
}

void fa_finish_forward(const fa_forward_tile *t) {
  const fa_problem *p = t->heads->problem;
  const fa_tile_ops *ops = t->heads->ops;
  int ld_v = fa_tile_ld(p->dim_v);
  for (int row = 0; row < t->rows * t->count; row++) finish_row(t, row);
  for (int g = 0; g < t->count; g++)
    ops->store(fa_query_row(t->heads + g, &p->out, t->m0), p->dtype, p->out.s, p->out.d, fa_at(ops, t->o, (int64_t)g * t->rows * ld_v),
               ld_v, t->rows, p->dim_v, t->out_scale + g * t->rows);
}
