/* backward.c: the paper's Algorithm 4 on a CPU, deterministic always. Four passes:
 *
 *     rows      delta = rowsum(dout * out) - dlse                       a task: a tile of query rows
 *     keys      for each tile of 64 keys: K, V stay; Q, dO pass         a task: one key head, every parts-th tile of keys
 *                 dV += P^T dO    dK += dS^T Q    dQ[part] += dS K
 *     queries   dq = sum of dQ over parts, in order                     a task: a tile of query rows
 *     bias      backward_bias.c, only if its gradient is wanted
 *
 * Every sum belongs to one task or is taken in a fixed order, and the number of parts comes from the shapes: the result depends neither
 * on the number of threads nor on chance. Workspace: delta and `parts` copies of dQ, linear in the number of rows. */
#include "backward.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "../core/error.h"
#include "engine.h"

/* Enough tasks for many cores, few enough copies of dQ. */
int fa_cpu_backward_parts(const fa_problem *p) {
  int64_t heads = (int64_t)p->batch * p->heads_k, wanted = heads > 0 ? (16 + heads - 1) / heads : 1;
  int tiles = fa_max(fa_ceil_div(p->seqlen_k, FA_BLOCK_N), 1);
  return fa_min(fa_min((int)wanted, 8), tiles);
}

static void carve_shared(fa_backward_shared *s, const fa_problem *p, const fa_tile_ops *ops, fa_arena *arena) {
  size_t rows = (size_t)p->heads_q * (size_t)p->total_q, real = (size_t)ops->real_bytes;
  s->parts = fa_cpu_backward_parts(p);
  s->delta = fa_take(arena, rows * sizeof(double));
  s->dq = fa_take(arena, p->grad.dq.data ? rows * (size_t)s->parts * (size_t)fa_pad(p->dim_qk) * real : 0);
  size_t tiles = (size_t)p->batch * (size_t)p->heads_q * (size_t)fa_ceil_div(p->seqlen_q, fa_block_m(p));
  s->dalibi = fa_take(arena, p->grad.dalibi.data ? tiles * sizeof(double) : 0);
}

/* Row numbers count all tokens of a head, packed or not. */
static int64_t row_index(const fa_head *head, int m) {
  const fa_problem *p = head->problem;
  int64_t start = p->lengths.packed ? head->seq.q_start : (int64_t)head->b * p->seqlen_q;
  return (int64_t)head->h * p->total_q + start + m;
}

const double *fa_delta_of(const fa_backward_shared *s, const fa_head *head, int m) { return s->delta + row_index(head, m); }

static void *dq_rows(const fa_backward_shared *s, const fa_head *head, int part, int m) {
  const fa_problem *p = head->problem;
  int64_t row = (int64_t)part * p->heads_q * p->total_q + row_index(head, m);
  return fa_at(head->ops, s->dq, row * fa_pad(p->dim_qk));
}

static fa_head query_head(const fa_job *job, int64_t item, int *m0) {
  const fa_problem *p = job->problem;
  int64_t bh = item / job->tiles_m;
  *m0 = (int)(item % job->tiles_m) * job->block_m;
  return fa_head_of(p, job->ops, (int)(bh / p->heads_q), (int)(bh % p->heads_q));
}

/* rowsum(dout * out) from the saved output, which is rounded to its dtype: good enough where dS is multiplied by something centred. */
static void delta_from_output(const fa_job *job, const fa_head *head, fa_arena arena, int m0, int rows, double *delta) {
  const fa_problem *p = job->problem;
  int dim_v = fa_pad(p->dim_v);
  void *out = fa_take(&arena, (size_t)job->block_m * (size_t)dim_v * (size_t)job->ops->real_bytes);
  void *dout = fa_take(&arena, (size_t)job->block_m * (size_t)dim_v * (size_t)job->ops->real_bytes);
  fa_load_queries(head, &p->out, m0, rows, p->dim_v, out);
  fa_load_queries(head, &p->grad.dout, m0, rows, p->dim_v, dout);
  for (int r = 0; r < rows; r++)
    delta[r] = job->ops->dot_row(fa_at(job->ops, out, (int64_t)r * dim_v), fa_at(job->ops, dout, (int64_t)r * dim_v), dim_v);
}

/* What a sweep over the keys finds out about a tile of rows: sums over j of P, P dP, P dist and P dP dist. */
typedef struct {
  double p[FA_MAX_BLOCK_M], p_dp[FA_MAX_BLOCK_M], p_dist[FA_MAX_BLOCK_M], p_dp_dist[FA_MAX_BLOCK_M];
} row_sums;

static void sweep_keys(const fa_job *job, const fa_head *head, fa_arena arena, int m0, int rows, row_sums *sums) {
  static const double zeros[FA_MAX_BLOCK_M];
  fa_gradient_tiles t = fa_carve_gradient_tiles(job, &arena);
  fa_range keys = fa_key_tiles(head, m0, rows);
  fa_load_query_side(head, &t, m0, rows);
  for (int n0 = keys.lo; n0 < keys.hi; n0 += FA_BLOCK_N) {
    int columns = fa_min(FA_BLOCK_N, head->seq.len_k - n0);
    if (!fa_tile_in_block_mask(head, m0, n0)) continue;
    fa_load_key_side(head, &t, n0, columns);
    fa_gradient_tile(head, &t, zeros, m0, rows, n0, columns);
    for (int r = 0; r < rows; r++) {
      const void *p_dp = fa_at(job->ops, t.ds, (int64_t)r * FA_BLOCK_N);
      sums->p[r] += t.p_sum[r];
      sums->p_dp[r] += job->ops->row_sum(p_dp, FA_BLOCK_N);
      if (!job->problem->grad.dalibi.data) continue;
      sums->p_dist[r] += t.distances[r];
      sums->p_dp_dist[r] += job->ops->distance_sum(p_dp, FA_BLOCK_N, fa_diagonal(head, m0 + r) - n0);
    }
  }
}

/* delta as rowsum(P * dP) / rowsum(P), for two gradients that a rounded output would spoil. A sink's is made of deltas alone. A slope's,
 * - sum of P (dP - delta + dlse) dist, weighs distances of up to the sequence's length against each other, so it is finished here. The
 * division takes out what lse was rounded by. A row that sees nothing gets exactly 0, whatever its dout holds. */
static void delta_from_scores(const fa_job *job, const fa_head *head, fa_arena arena, int m0, int rows, double *delta) {
  const fa_problem *p = job->problem;
  const fa_backward_shared *shared = job->extra;
  row_sums sums = {{0}, {0}, {0}, {0}};
  double dslope = 0, sink = fa_per_head_value(&p->score.sinks, head->ops, head->b, head->h);
  sweep_keys(job, head, arena, m0, rows, &sums);
  for (int r = 0; r < rows; r++) {
    double lse = fa_statistic(head, &p->lse, m0 + r), dlse = p->grad.dlse.data ? fa_statistic(head, &p->grad.dlse, m0 + r) : 0;
    double total = sums.p[r] + (p->score.sinks.data && lse > -INFINITY ? exp(sink - lse) : 0);
    delta[r] = total == 0 ? 0 : sums.p_dp[r] / total;
    if (sums.p[r] != 0) dslope -= (sums.p_dp_dist[r] - (delta[r] - dlse) * sums.p_dist[r]) / total;
  }
  if (p->grad.dalibi.data) shared->dalibi[((int64_t)head->b * p->heads_q + head->h) * job->tiles_m + m0 / job->block_m] = dslope;
}

static void rows_task(int64_t item, int worker, void *context) {
  const fa_job *job = context;
  const fa_problem *p = job->problem;
  const fa_backward_shared *shared = job->extra;
  int m0;
  fa_head head = query_head(job, item, &m0);
  int rows = fa_min(job->block_m, head.seq.len_q - m0), exact = p->grad.dalibi.data || p->grad.dsinks.data;
  if (p->grad.dalibi.data) shared->dalibi[item] = 0;
  if (rows <= 0) return;
  double *delta = shared->delta + row_index(&head, m0);
  (exact ? delta_from_scores : delta_from_output)(job, &head, fa_job_scratch(job, worker), m0, rows, delta);
  for (int r = 0; r < rows && p->grad.dlse.data; r++) delta[r] -= fa_statistic(&head, &p->grad.dlse, m0 + r);
}

typedef struct {
  fa_gradient_tiles tiles;
  void *dk, *dv; /* [64][dim] */
} keys_tiles;

static keys_tiles carve_keys(const fa_job *job, fa_arena *arena) {
  const fa_problem *p = job->problem;
  keys_tiles t;
  t.tiles = fa_carve_gradient_tiles(job, arena);
  t.dk = fa_take(arena, FA_BLOCK_N * (size_t)fa_pad(p->dim_qk) * (size_t)job->ops->real_bytes);
  t.dv = fa_take(arena, FA_BLOCK_N * (size_t)fa_pad(p->dim_v) * (size_t)job->ops->real_bytes);
  return t;
}

/* c += a b, where a zero of a says "no such pair" once the tile has invisible pairs and b something that must not leak through 0 * b. */
static void accumulate(const fa_tile_ops *ops, int partial, int m, int n, int k, const void *a, ptrdiff_t a_row, ptrdiff_t a_col,
                       const void *b, void *c) {
  if (partial && !ops->all_finite(b, (int64_t)k * n))
    ops->gemm_skipping_zeros(m, n, k, a, a_row, a_col, b, n, c, n);
  else
    ops->gemm(m, n, k, a, a_row, a_col, b, n, c, n, 1);
}

/* One tile of queries against the keys at hand. */
static void keys_step(const fa_head *head, const fa_backward_shared *shared, keys_tiles *t, int part, int m0, int rows, int n0,
                      int columns) {
  const fa_problem *p = head->problem;
  const fa_tile_ops *ops = head->ops;
  fa_gradient_tiles *g = &t->tiles;
  int dim_qk = fa_pad(p->dim_qk), dim_v = fa_pad(p->dim_v);
  fa_load_query_side(head, g, m0, rows);
  int partial = fa_gradient_tile(head, g, fa_delta_of(shared, head, m0), m0, rows, n0, columns);
  if (p->grad.dv.data) accumulate(ops, partial, columns, dim_v, rows, g->p, 1, FA_BLOCK_N, g->dout, t->dv);
  if (p->score.softcap > 0) ops->multiply_row(g->ds, g->ds, g->softcap, rows * FA_BLOCK_N);
  if (p->grad.dk.data) accumulate(ops, partial, columns, dim_qk, rows, g->ds, 1, FA_BLOCK_N, g->q, t->dk);
  if (p->grad.dq.data) accumulate(ops, partial, rows, dim_qk, columns, g->ds, FA_BLOCK_N, 1, g->k, dq_rows(shared, head, part, m0));
}

static void store_keys(const fa_head *head, const fa_view *view, const void *tile, int n0, int rows, int dim, double scale) {
  double factors[FA_BLOCK_N];
  if (!view->data) return;
  for (int i = 0; i < rows; i++) factors[i] = scale;
  head->ops->store(fa_key_row(head, view, n0), head->problem->dtype, view->s, view->d, tile, fa_pad(dim), rows, dim, factors);
}

/* Keys [n0, n0 + 64) of a key head: all query heads of its group, all query tiles that see them. */
static void keys_tile(const fa_job *job, fa_head *head, keys_tiles *t, int part, int n0) {
  const fa_problem *p = job->problem;
  const fa_backward_shared *shared = job->extra;
  int slot = fa_min(FA_BLOCK_N, head->seq.slot_k - n0), columns = fa_min(slot, head->seq.len_k - n0);
  memset(t->dk, 0, FA_BLOCK_N * (size_t)fa_pad(p->dim_qk) * (size_t)job->ops->real_bytes);
  memset(t->dv, 0, FA_BLOCK_N * (size_t)fa_pad(p->dim_v) * (size_t)job->ops->real_bytes);
  if (columns > 0) {
    fa_range rows = fa_visiting_rows(p->visibility.rule, head->seq.len_q, head->seq.len_k, n0, n0 + columns);
    fa_load_key_side(head, &t->tiles, n0, columns);
    for (int g = 0; g < p->group; g++) {
      *head = fa_head_of(p, job->ops, head->b, head->h_k * p->group + g);
      for (int m0 = rows.lo / job->block_m * job->block_m; m0 < rows.hi; m0 += job->block_m)
        if (fa_tile_in_block_mask(head, m0, n0))
          keys_step(head, shared, t, part, m0, fa_min(job->block_m, head->seq.len_q - m0), n0, columns);
    }
  }
  store_keys(head, &p->grad.dk, t->dk, n0, slot, p->dim_qk, p->score.scale);
  store_keys(head, &p->grad.dv, t->dv, n0, slot, p->dim_v, 1);
}

static void keys_task(int64_t item, int worker, void *context) {
  const fa_job *job = context;
  const fa_problem *p = job->problem;
  const fa_backward_shared *shared = job->extra;
  fa_arena arena = fa_job_scratch(job, worker);
  keys_tiles t = carve_keys(job, &arena);
  int part = (int)(item % shared->parts);
  int64_t bh = item / shared->parts;
  int b = (int)(bh / p->heads_k), first = (int)(bh % p->heads_k) * p->group;
  fa_head head = fa_head_of(p, job->ops, b, first);
  for (int g = 0; g < p->group; g++) {
    fa_head one = fa_head_of(p, job->ops, b, first + g);
    if (p->grad.dq.data && head.seq.len_q > 0)
      memset(dq_rows(shared, &one, part, 0), 0, (size_t)head.seq.len_q * (size_t)fa_pad(p->dim_qk) * (size_t)job->ops->real_bytes);
  }
  for (int n0 = part * FA_BLOCK_N; n0 < head.seq.slot_k; n0 += shared->parts * FA_BLOCK_N) keys_tile(job, &head, &t, part, n0);
}

static void queries_task(int64_t item, int worker, void *context) {
  const fa_job *job = context;
  const fa_problem *p = job->problem;
  const fa_backward_shared *shared = job->extra;
  static const double zeros[FA_MAX_HEAD_DIM];
  int m0, dim = fa_pad(p->dim_qk);
  fa_head head = query_head(job, item, &m0);
  int end = fa_min(m0 + job->block_m, head.seq.slot_q);
  (void)worker;
  for (int m = m0; m < end; m++) {
    void *sum = dq_rows(shared, &head, 0, m);
    int used = m < head.seq.len_q;
    for (int part = 1; part < shared->parts && used; part++) job->ops->add_row(sum, dq_rows(shared, &head, part, m), dim);
    job->ops->store(fa_query_row(&head, &p->grad.dq, m), p->dtype, 0, p->grad.dq.d, used ? sum : zeros, dim, 1, p->dim_qk, &p->score.scale);
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

/* Tokens behind the last sequence of a packed batch get gradient 0. */
static void clear_slack(const fa_problem *p, const fa_tile_ops *ops, const fa_view *view, fa_ints cu, int64_t total, int heads, int dim) {
  static const double zeros[FA_MAX_HEAD_DIM];
  if (!view->data || !p->lengths.packed) return;
  for (int h = 0; h < heads; h++)
    for (int64_t row = cu.data[p->batch * cu.stride]; row < total; row++)
      ops->store((char *)view->data + (h * view->h + row * view->s) * fa_dtype_bytes(p->dtype), p->dtype, 0, view->d, zeros, 0, 1, dim,
                 NULL);
}

size_t fa_cpu_backward_workspace(const fa_problem *p, const fa_tile_ops *ops) {
  fa_backward_shared shared;
  fa_arena arena = {NULL, 0};
  carve_shared(&shared, p, ops, &arena);
  return arena.used;
}

static fa_code run_passes(fa_job *job, fa_error *error) {
  const fa_problem *p = job->problem;
  const fa_backward_shared *shared = job->extra;
  int64_t query_tiles = (int64_t)p->batch * p->heads_q * job->tiles_m;
  fa_job first = *job; /* ALiBi's gradient is a small difference of large sums: for it, float32 inputs are taken up in double */
  if (p->grad.dalibi.data && p->dtype == FA_F32) first.ops = job->ops_f64;
  fa_arena rows = {NULL, 0}, keys = {NULL, 0};
  carve_keys(&first, &rows);
  carve_keys(job, &keys);
  fa_code code = fa_job_run(&first, rows.used, query_tiles, rows_task, error);
  if (code == FA_OK && (p->grad.dq.data || p->grad.dk.data || p->grad.dv.data))
    code = fa_job_run(job, keys.used, (int64_t)p->batch * p->heads_k * shared->parts, keys_task, error);
  if (code == FA_OK && p->grad.dq.data) code = fa_job_run(job, 64, query_tiles, queries_task, error);
  if (code == FA_OK && p->grad.dbias.data) code = fa_cpu_bias_gradient(job, error);
  return code;
}

fa_code fa_cpu_backward(const fa_problem *p, fa_error *error) {
  fa_job job;
  fa_backward_shared shared;
  fa_arena arena = {NULL, 0};
  fa_code code = fa_job_init(&job, p, error);
  if (code != FA_OK) return code;
  carve_shared(&shared, p, job.ops, &arena);
  char *workspace = aligned_alloc(64, arena.used + 64);
  if (!workspace) return fa_fail(error, FA_ERR_MEMORY, "cannot allocate %zu bytes of workspace", arena.used);
  arena = (fa_arena){workspace, 0};
  carve_shared(&shared, p, job.ops, &arena);
  job.extra = &shared;
  code = run_passes(&job, error);
  if (code == FA_OK) {
    per_head_gradients(&job);
    clear_slack(p, job.ops, &p->grad.dq, p->lengths.cu_q, p->total_q, p->heads_q, p->dim_qk);
    clear_slack(p, job.ops, &p->grad.dk, p->lengths.cu_k, p->total_k, p->heads_k, p->dim_qk);
    clear_slack(p, job.ops, &p->grad.dv, p->lengths.cu_k, p->total_k, p->heads_k, p->dim_v);
  }
  free(workspace);
  return code;
}
