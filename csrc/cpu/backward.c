/* backward.c: the paper's Algorithm 4 on a CPU, deterministic always. The passes, each over tasks that share nothing but what is said:
 *
 *     rows      delta = rowsum(dout * out) - dlse                            backward_rows.c; a task: a tile of query rows
 *     keys      dV += P^T dO    dK += dS^T Q    dQ += dS K                   backward_keys.c; a task: some tiles of 64 keys
 *     queries   dq = scale * dQ                                              a task: a tile of query rows
 *     bias      its gradient, if wanted                                      backward_bias.c
 *
 * Every sum is taken in a fixed order that comes from the shapes: the result depends neither on the number of threads nor on chance.
 * Workspace: delta, and dQ in float where the result cannot hold the sums itself; linear in the number of rows. */
#include "backward.h"

#include <math.h>
#include <string.h>

#include "../core/error.h"
#include "engine.h"
#include "padding.h"
#include "workspace.h"

enum { MOST_ROW_BYTES = 96 << 10 };

/* dq can hold the sums when it has the type and the layout of a tile. */
static int sums_in_place(const fa_problem *p) {
  return (p->dtype == FA_F32 || p->dtype == FA_F64) && p->grad.dq.d == 1 && p->dim_qk % FA_TILE_PAD == 0;
}

/* Query rows of a tile: Q, dO and the next tile's rows share the second cache with 64 keys and their gradients. */
int fa_backward_block_m(const fa_problem *p) {
  int bytes = (fa_tile_ld(p->dim_qk) + fa_tile_ld(p->dim_v)) * (p->dtype == FA_F64 ? 8 : 4), rows = fa_block_m(p);
  return rows * bytes > MOST_ROW_BYTES ? fa_min(rows, 64) : rows;
}

static void carve_shared(fa_backward_shared *s, const fa_problem *p, const fa_tile_ops *ops, fa_arena *arena) {
  size_t rows = (size_t)p->heads_q * (size_t)p->total_q, row_bytes = (size_t)fa_pad(p->dim_qk) * (size_t)ops->real_bytes;
  size_t tiles_m = (size_t)p->batch * (size_t)p->heads_q * (size_t)fa_ceil_div(p->seqlen_q, fa_backward_block_m(p));
  s->delta = fa_take(arena, rows * sizeof(double));
  s->dalibi = fa_take(arena, p->grad.dalibi.data ? tiles_m * sizeof(double) : 0);
  s->steps = fa_take(arena, (size_t)fa_backward_keys_tasks(p) * sizeof(atomic_int));
  s->dq = p->grad.dq.data && !sums_in_place(p) ? fa_take(arena, rows * row_bytes) : NULL;
}

/* Row numbers count all tokens of a head, packed or not. */
static int64_t row_index(const fa_head *head, int m) {
  const fa_problem *p = head->problem;
  int64_t start = p->lengths.packed ? head->seq.q_start : (int64_t)head->b * p->seqlen_q;
  return (int64_t)head->h * p->total_q + start + m;
}

double *fa_delta_of(const fa_backward_shared *s, const fa_head *head, int m) { return s->delta + row_index(head, m); }

void *fa_dq_sums(const fa_backward_shared *s, const fa_head *head, int m, ptrdiff_t *ld) {
  const fa_problem *p = head->problem;
  *ld = s->dq ? fa_pad(p->dim_qk) : (ptrdiff_t)p->grad.dq.s;
  int64_t bytes = p->dtype == FA_F64 ? sizeof(double) : sizeof(float);
  return s->dq ? (char *)s->dq + row_index(head, m) * *ld * bytes : fa_query_row(head, &p->grad.dq, m);
}

fa_head fa_query_tile(const fa_job *job, int64_t item, int *m0) {
  const fa_problem *p = job->problem;
  int64_t bh = item / job->tiles_m;
  *m0 = (int)(item % job->tiles_m) * job->block_m;
  return fa_head_of(p, job->ops, (int)(bh / p->heads_q), (int)(bh % p->heads_q));
}

static void queries_task(int64_t item, int worker, void *context) {
  const fa_job *job = context;
  const fa_problem *p = job->problem;
  const fa_backward_shared *shared = job->extra;
  static const double zeros[FA_MAX_HEAD_DIM];
  ptrdiff_t ld;
  int m0, dim = fa_pad(p->dim_qk);
  fa_head head = fa_query_tile(job, item, &m0);
  int end = fa_min(m0 + job->block_m, head.seq.slot_q);
  (void)worker;
  for (int m = m0; m < end; m++) {
    void *sums = fa_dq_sums(shared, &head, m, &ld), *out = fa_query_row(&head, &p->grad.dq, m);
    if (m >= head.seq.len_q)
      job->ops->store(out, p->dtype, 0, p->grad.dq.d, zeros, dim, 1, p->dim_qk, NULL);
    else if (sums == out)
      job->ops->scale_row(sums, dim, p->score.scale);
    else
      job->ops->store(out, p->dtype, 0, p->grad.dq.d, sums, dim, 1, p->dim_qk, &p->score.scale);
  }
}

static void put_per_head(const fa_tile_ops *ops, const fa_per_head *t, int b, int h, double value) {
  float narrow = (float)value;
  void *at = (char *)t->data + (b * t->b + h * t->h) * fa_dtype_bytes(t->dtype);
  ops->store(at, t->dtype, 0, 1, ops->real_bytes == 8 ? (const void *)&value : (const void *)&narrow, 1, 1, 1, NULL);
}

/* d(lse)/d(sink) is the sink's own probability, and every p shrinks by it. */
static double sink_gradient(const fa_job *job, int b, int h) {
  const fa_problem *p = job->problem;
  const fa_backward_shared *shared = job->extra;
  fa_head head = fa_head_of(p, job->ops, b, h);
  double sink = fa_per_head_value(&p->score.sinks, job->ops, b, h), sum = 0;
  for (int m = 0; m < head.seq.len_q && sink > -INFINITY; m++)
    sum -= exp(sink - fa_statistic(&head, &p->lse, m)) * *fa_delta_of(shared, &head, m);
  return sum;
}

/* Gradients of what a head has one of: sums over rows and batch, in order. */
static void per_head_gradients(const fa_job *job) {
  const fa_problem *p = job->problem;
  const fa_backward_shared *shared = job->extra;
  for (int h = 0; h < p->heads_q; h++) {
    double dsink = 0, dslope = 0;
    for (int b = 0; b < p->batch; b++) {
      double slope_of_batch = 0;
      if (p->grad.dsinks.data) dsink += sink_gradient(job, b, h);
      for (int tile = 0; tile < job->tiles_m && p->grad.dalibi.data; tile++)
        slope_of_batch += shared->dalibi[((int64_t)b * p->heads_q + h) * job->tiles_m + tile];
      dslope += slope_of_batch;
      if (p->grad.dalibi.data && p->grad.dalibi.b) put_per_head(job->ops, &p->grad.dalibi, b, h, slope_of_batch);
    }
    if (p->grad.dsinks.data) put_per_head(job->ops, &p->grad.dsinks, 0, h, dsink);
    if (p->grad.dalibi.data && !p->grad.dalibi.b) put_per_head(job->ops, &p->grad.dalibi, 0, h, dslope);
  }
}

size_t fa_cpu_backward_workspace(const fa_problem *p, const fa_tile_ops *ops) {
  fa_problem asked = *p;
  fa_backward_shared shared;
  fa_arena arena = {NULL, 0};
  if (!p->grad.dq.data && !p->grad.dk.data && !p->grad.dv.data) asked.grad.dq = p->q; /* a plan without outputs: dq looks like q */
  carve_shared(&shared, &asked, ops, &arena);
  return arena.used;
}

static fa_code run_passes(fa_job *job, fa_error *error) {
  const fa_problem *p = job->problem;
  fa_code code = fa_cpu_backward_rows(job, error);
  if (code == FA_OK && (p->grad.dq.data || p->grad.dk.data || p->grad.dv.data)) code = fa_cpu_backward_keys(job, error);
  if (code == FA_OK && p->grad.dq.data) code = fa_job_run(job, 64, (int64_t)p->batch * p->heads_q * job->tiles_m, queries_task, error);
  if (code == FA_OK && p->grad.dbias.data) code = fa_cpu_bias_gradient(job, error);
  return code;
}

fa_code fa_cpu_backward(const fa_problem *p, fa_error *error) {
  fa_job job;
  fa_backward_shared shared;
  fa_arena arena = {NULL, 0};
  fa_code code = fa_job_init(&job, p, error);
  if (code != FA_OK) return code;
  job.block_m = fa_backward_block_m(p);
  job.tiles_m = fa_ceil_div(p->seqlen_q, job.block_m);
  carve_shared(&shared, p, job.ops, &arena);
  char *workspace = fa_workspace_take(arena.used);
  if (!workspace) return fa_fail(error, FA_ERR_MEMORY, "cannot allocate %zu bytes of workspace", arena.used);
  arena = (fa_arena){workspace, 0};
  carve_shared(&shared, p, job.ops, &arena);
  job.extra = &shared;
  code = run_passes(&job, error);
  if (code == FA_OK) {
    per_head_gradients(&job);
    fa_clear_slack(p, job.ops, &p->grad.dq, p->lengths.cu_q, p->total_q, p->heads_q, p->dim_qk);
    fa_clear_slack(p, job.ops, &p->grad.dk, p->lengths.cu_k, p->total_k, p->heads_k, p->dim_qk);
    fa_clear_slack(p, job.ops, &p->grad.dv, p->lengths.cu_k, p->total_k, p->heads_k, p->dim_v);
  }
  fa_workspace_give(workspace);
  return code;
}
