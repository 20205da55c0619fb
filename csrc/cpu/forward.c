/* forward.c: the paper's Algorithm 1 on a CPU. A task is one tile of query rows of one head:
 *
 *     for each visited tile of 64 keys:   S = Q K^T        (gemm; K transposed on load)
 *                                         P = exp(S - m)   (m: running row maximum; O and l shrink when it grows)
 *                                         O += P V         (gemm)
 *     out = O / l,  lse = m + log l
 *
 * Nothing larger than a tile is kept. Tasks share nothing, so the result does not depend on the number of threads. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "engine.h"
#include "job.h"

typedef struct {
  void *q, *kt, *v, *s, *o, *dropout; /* [m][dim_qk], [dim_qk][64], [64][dim_v], [m][64], [m][dim_v], [64] */
  double *m, *l, *out_scale;          /* [m] */
} forward_tiles;

static forward_tiles carve(const fa_problem *p, const fa_tile_ops *ops, int block_m, fa_arena *arena) {
  size_t real = (size_t)ops->real_bytes, rows = (size_t)block_m, dim_qk = (size_t)fa_pad(p->dim_qk), dim_v = (size_t)fa_pad(p->dim_v);
  forward_tiles t;
  t.q = fa_take(arena, rows * dim_qk * real);
  t.kt = fa_take(arena, (size_t)p->dim_qk * FA_BLOCK_N * real);
  t.v = fa_take(arena, FA_BLOCK_N * dim_v * real);
  t.s = fa_take(arena, rows * FA_BLOCK_N * real);
  t.o = fa_take(arena, rows * dim_v * real);
  t.dropout = fa_take(arena, FA_BLOCK_N * real);
  t.m = fa_take(arena, rows * sizeof(double));
  t.l = fa_take(arena, rows * sizeof(double));
  t.out_scale = fa_take(arena, rows * sizeof(double));
  return t;
}

/* Rows that are there but not used: out 0, lse -inf. */
static void write_padding(const fa_head *head, int start, int end) {
  const fa_problem *p = head->problem;
  static const double zeros[FA_MAX_HEAD_DIM];
  for (int i = start; i < end; i++) {
    head->ops->store(fa_query_row(head, &p->out, i), p->dtype, 0, p->out.d, zeros, 0, 1, p->dim_v, NULL);
    fa_set_statistic(head, &p->lse, i, -INFINITY);
  }
}

/* Scores of a row -> exponentials, with the row's maximum, sum and output kept in step. */
static void softmax_row(const fa_head *head, forward_tiles *t, int r, int m0, int n0, int columns) {
  const fa_tile_ops *ops = head->ops;
  int dim_v = fa_pad(head->problem->dim_v);
  void *s = fa_at(ops, t->s, (int64_t)r * FA_BLOCK_N);
  double largest = ops->row_max(s, columns);
  if (largest > t->m[r]) {
    double shrink = exp(t->m[r] - largest); /* 0 at the first visible key */
    t->l[r] *= shrink;
    ops->scale_row(fa_at(ops, t->o, (int64_t)r * dim_v), dim_v, shrink);
    t->m[r] = largest;
  }
  /* A row that has seen nothing yet has only -inf scores: any finite shift makes them 0. */
  t->l[r] += ops->exp_row(s, columns, t->m[r] == -INFINITY ? 0 : t->m[r]);
  if (head->problem->dropout.p > 0) {
    fa_dropout_row row = fa_dropout_of(head, m0 + r, n0);
    ops->dropout_row(&row, t->dropout, columns);
    ops->multiply_row(s, s, t->dropout, columns);
  }
}

/* l -> 1 / l and the log-sum-exp, the sink's logit joining the denominator. */
static void finish_row(const fa_head *head, forward_tiles *t, int r, int m0) {
  double m = t->m[r], l = t->l[r], scale = 1;
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
  t->out_scale[r] = l == 0 ? 0 : scale / l;
  if (head->problem->lse.data) fa_set_statistic(head, &head->problem->lse, m0 + r, l == 0 ? -INFINITY : m + log(l));
}

static void forward_tile(const fa_head *head, forward_tiles *t, int m0, int rows) {
  const fa_problem *p = head->problem;
  const fa_tile_ops *ops = head->ops;
  int dim_qk = fa_pad(p->dim_qk), dim_v = fa_pad(p->dim_v);
  fa_load_queries(head, &p->q, m0, rows, p->dim_qk, t->q);
  memset(t->o, 0, (size_t)rows * (size_t)dim_v * (size_t)ops->real_bytes);
  for (int r = 0; r < rows; r++) {
    t->m[r] = -INFINITY;
    t->l[r] = 0;
  }
  fa_range keys = fa_key_tiles(head, m0, rows);
  for (int n0 = keys.lo; n0 < keys.hi; n0 += FA_BLOCK_N) {
    if (!fa_tile_in_block_mask(head, m0, n0)) continue;
    int columns = fa_min(FA_BLOCK_N, head->seq.len_k - n0), padded = fa_pad(columns);
    fa_load_keys_transposed(head, &p->k, n0, columns, p->dim_qk, t->kt);
    ops->gemm(rows, FA_BLOCK_N, p->dim_qk, t->q, dim_qk, 1, t->kt, FA_BLOCK_N, t->s, FA_BLOCK_N, 0);
    int partial = fa_score_tile(head, m0, rows, n0, columns, t->s, NULL);
    for (int r = 0; r < rows; r++) softmax_row(head, t, r, m0, n0, padded);
    fa_load_keys(head, &p->v, n0, columns, p->dim_v, t->v);
    if (partial && !ops->all_finite(t->v, (int64_t)columns * dim_v))
      ops->gemm_skipping_zeros(rows, dim_v, columns, t->s, FA_BLOCK_N, 1, t->v, dim_v, t->o, dim_v);
    else
      ops->gemm(rows, dim_v, columns, t->s, FA_BLOCK_N, 1, t->v, dim_v, t->o, dim_v, 1);
  }
  for (int r = 0; r < rows; r++) finish_row(head, t, r, m0);
  ops->store(fa_query_row(head, &p->out, m0), p->dtype, p->out.s, p->out.d, t->o, dim_v, rows, p->dim_v, t->out_scale);
}

/* Tasks run over query tiles, last (under causal masks: longest) first, then over heads. */
static void forward_task(int64_t item, int worker, void *context) {
  const fa_job *job = context;
  const fa_problem *p = job->problem;
  fa_arena arena = fa_job_scratch(job, worker);
  forward_tiles tiles = carve(p, job->ops, job->block_m, &arena);
  int64_t heads = (int64_t)p->batch * p->heads_q, bh = item % heads;
  int m0 = (job->tiles_m - 1 - (int)(item / heads)) * job->block_m;
  fa_head head = fa_head_of(p, job->ops, (int)(bh / p->heads_q), (int)(bh % p->heads_q));
  int end = fa_min(m0 + job->block_m, head.seq.slot_q), rows = fa_min(end, head.seq.len_q) - m0;
  if (rows > 0) forward_tile(&head, &tiles, m0, rows);
  write_padding(&head, fa_max(m0, head.seq.len_q), end);
}

/* Tokens behind the last sequence of a packed batch belong to nobody, and are written all the same. */
static void write_slack(const fa_problem *p, const fa_tile_ops *ops) {
  if (!p->lengths.packed) return;
  int64_t end = p->lengths.cu_q.data[p->batch * p->lengths.cu_q.stride];
  for (int h = 0; h < p->heads_q && end < p->total_q; h++) {
    fa_head head = {.problem = p, .ops = ops, .h = h};
    head.seq.q_start = end;
    write_padding(&head, 0, (int)(p->total_q - end));
  }
}

fa_code fa_cpu_forward(const fa_problem *p, fa_error *error) {
  fa_job job;
  fa_code code = fa_job_init(&job, p, error);
  if (code != FA_OK) return code;
  fa_arena count = {NULL, 0};
  carve(p, job.ops, job.block_m, &count);
  code = fa_job_run(&job, count.used, (int64_t)p->batch * p->heads_q * job.tiles_m, forward_task, error);
  if (code != FA_OK) return code;
  write_slack(p, job.ops);
  return p->probs.data ? fa_cpu_probs(p, error) : FA_OK;
}
