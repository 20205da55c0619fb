/* backward_rows.c: delta = rowsum(dout * out) - dlse of every row, the sums of dq cleared, and, where a sink's or a slope's gradient
 * is wanted, the exact row sums that those are made of. */
#include <math.h>
#include <string.h>

#include "backward.h"

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
      const void *p_dp = fa_at(job->ops, t.ds, (int64_t)r * FA_BLOCK_LD);
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

static void clear_dq(const fa_backward_shared *shared, const fa_head *head, int m0, int rows) {
  const fa_problem *p = head->problem;
  size_t bytes = (size_t)fa_pad(p->dim_qk) * (p->dtype == FA_F64 ? sizeof(double) : sizeof(float));
  ptrdiff_t ld;
  for (int r = 0; r < rows && p->grad.dq.data; r++) memset(fa_dq_sums(shared, head, m0 + r, &ld), 0, bytes);
}

static void rows_task(int64_t item, int worker, void *context) {
  const fa_job *job = context;
  const fa_problem *p = job->problem;
  const fa_backward_shared *shared = job->extra;
  int m0;
  fa_head head = fa_query_tile(job, item, &m0);
  int rows = fa_min(job->block_m, head.seq.len_q - m0), exact = p->grad.dalibi.data || p->grad.dsinks.data;
  if (p->grad.dalibi.data) shared->dalibi[item] = 0;
  if (rows <= 0) return;
  double *delta = fa_delta_of(shared, &head, m0);
  clear_dq(shared, &head, m0, rows);
  (exact ? delta_from_scores : delta_from_output)(job, &head, fa_job_scratch(job, worker), m0, rows, delta);
  for (int r = 0; r < rows && p->grad.dlse.data; r++) delta[r] -= fa_statistic(&head, &p->grad.dlse, m0 + r);
}

fa_code fa_cpu_backward_rows(fa_job *job, fa_error *error) {
  const fa_problem *p = job->problem;
  fa_job pass = *job; /* ALiBi's gradient is a small difference of large sums: for it, float32 inputs are taken up in double */
  if (p->grad.dalibi.data && p->dtype == FA_F32) pass.ops = job->ops_f64;
  fa_arena count = {NULL, 0};
  fa_carve_gradient_tiles(&pass, &count);
  return fa_job_run(&pass, count.used, (int64_t)p->batch * p->heads_q * job->tiles_m, rows_task, error);
}
