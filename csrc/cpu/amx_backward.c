/* amx_backward.c: backward.c's passes on AMX tiles, deterministic always:
 *
 *     rows      delta, and Q and dO packed for both kinds of products       a task: some strips of 32 query rows
 *     keys      amx_keys.c                                                  a task: one key head, every copies-th block of keys
 *     queries   dq = sum of dQ over copies, in order                        a task: some strips of 32 query rows
 *
 * With key heads enough for one copy, a task takes its head through all three, in buffers that the next task uses again. Gradients of
 * bias, sinks and slopes are left to backward.c. */
#include "amx.h"
#ifdef FA_HAS_AMX
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "../core/error.h"
#include "amx_backward.h"
#include "padding.h"
#include "workspace.h"

AMX_BEGIN

enum { TASK_STRIPS = 4, WANTED_TASKS = 32, MOST_COPIES = 8 };

static const double LOG2_E = 1.44269504088896340736;

const char *fa_amx_unsuited(const fa_problem *p, fa_direction direction) {
  if (p->seqlen_q < 16) return "fewer than 16 query rows fill no tile";
  if (direction == FA_FORWARD) return NULL;
  if (p->grad.dbias.data) return "gradient of bias";
  if (p->grad.dalibi.data) return "gradient of alibi_slopes";
  if (p->grad.dsinks.data) return "gradient of sinks";
  return NULL;
}

/* Enough tasks for many cores, few enough copies of dQ. */
int fa_amx_backward_parts(const fa_problem *p) {
  int64_t heads = (int64_t)p->batch * p->heads_k, wanted = heads > 0 ? (WANTED_TASKS + heads - 1) / heads : 1;
  return fa_min(fa_min((int)wanted, MOST_COPIES), fa_max(fa_ceil_div(p->seqlen_k, FA_AMX_BLOCK_KEYS), 1));
}

static void describe_shared(fa_amx_backward_shared *s, const fa_problem *p) {
  s->dtype_parts = fa_amx_parts(p->dtype);
  s->copies = fa_amx_backward_parts(p);
  s->factor = (float)(has_score_terms(p) ? LOG2_E : fabs(p->score.scale) * LOG2_E);
  s->q_halves = fa_amx_halves(p->dim_qk, s->dtype_parts);
  s->v_halves = fa_amx_halves(p->dim_v, s->dtype_parts);
}

static void carve_strips(fa_amx_backward_shared *s, const fa_problem *p, int64_t strips, fa_arena *arena) {
  s->strips = strips;
  size_t q_bytes = (size_t)(strips * s->q_halves) * sizeof(uint16_t), v_bytes = (size_t)(strips * s->v_halves) * sizeof(uint16_t);
  size_t copies = p->grad.dq.data ? (size_t)s->copies * (size_t)strips : 0;
  s->q_scores = fa_take(arena, q_bytes);
  s->q_rows = fa_take(arena, q_bytes);
  s->dout_scores = fa_take(arena, v_bytes);
  s->dout_rows = fa_take(arena, v_bytes);
  s->statistics = fa_take(arena, (size_t)strips * sizeof(fa_strip_statistics));
  s->finite = fa_take(arena, (size_t)strips);
  s->dq_made = fa_take(arena, copies);
  s->dq = fa_take(arena, copies * (size_t)fa_amx_strips(p->dim_qk) * STRIP * STRIP * sizeof(float));
}

typedef struct {
  float *sum, *dq; /* [dims][32], [32][dims] */
  fa_amx_rows *rows, *out;
} rows_scratch;

static rows_scratch carve_rows(const fa_problem *p, fa_arena *arena) {
  size_t bytes = STRIP * (size_t)fa_amx_strips(p->dim_qk) * STRIP * sizeof(float);
  rows_scratch s;
  s.sum = fa_take(arena, bytes);
  s.dq = fa_take(arena, bytes);
  s.rows = fa_take(arena, sizeof(fa_amx_rows));
  s.out = fa_take(arena, sizeof(fa_amx_rows));
  return s;
}

/* Strips [first, end) of one head's slots, at most TASK_STRIPS. */
static fa_head strips_of_item(const fa_job *job, int64_t item, int *first, int *end) {
  const fa_problem *p = job->problem;
  int64_t bh = item / job->tiles_m;
  fa_head head = fa_head_of(p, job->ops, (int)(bh / p->heads_q), (int)(bh % p->heads_q));
  *first = (int)(item % job->tiles_m) * TASK_STRIPS;
  *end = fa_min(*first + TASK_STRIPS, fa_ceil_div(head.seq.slot_q, STRIP));
  return head;
}

/* s->rows holds dout, s->out the output. */
static void strip_statistics(const fa_head *head, const rows_scratch *s, int m0, int rows, fa_strip_statistics *to) {
  const fa_problem *p = head->problem;
  const double unit = has_score_terms(p) ? 1 : LOG2_E;
  fa_amx_dot_rows(s->out, s->rows, to->delta);
  for (int r = 0; r < STRIP; r++) {
    double lse = r < rows ? fa_statistic(head, &p->lse, m0 + r) : -INFINITY;
    if (r < rows && p->grad.dlse.data) to->delta[r] -= (float)fa_statistic(head, &p->grad.dlse, m0 + r);
    to->shift[r] = lse == -INFINITY ? INFINITY : (float)(lse * unit);
  }
}

static void start_strip(const fa_head *head, const fa_amx_backward_shared *shared, const rows_scratch *s, int strip) {
  const fa_problem *p = head->problem;
  const int m0 = strip * STRIP, rows = fa_min(STRIP, head->seq.len_q - m0);
  const int64_t at = fa_strip_at(shared, head, strip);
  for (int copy = 0; copy < shared->copies && p->grad.dq.data; copy++) shared->dq_made[copy * shared->strips + at] = 0;
  fa_amx_take_queries(s->rows, head, &p->grad.dout, m0, rows, p->dim_v, 0);
  fa_amx_take_queries(s->out, head, &p->out, m0, rows, p->dim_v, 0);
  strip_statistics(head, s, m0, rows, shared->statistics + at);
  fa_amx_put(s->rows, FA_AMX_ROWS_RIGHT, shared->dout_rows + at * shared->v_halves);
  fa_amx_put(s->rows, FA_AMX_DIMS_RIGHT, shared->dout_scores + at * shared->v_halves);
  int finite = fa_amx_finite(s->rows);
  fa_amx_take_queries(s->rows, head, &p->q, m0, rows, p->dim_qk, 0);
  fa_amx_put(s->rows, FA_AMX_ROWS_RIGHT, shared->q_rows + at * shared->q_halves);
  finite = fa_amx_finite(s->rows) && finite;
  /* A negative scale turns the queries around here, so that an invisible score is -inf in log2 units too. */
  if (p->score.scale < 0 && !has_score_terms(p)) fa_amx_take_queries(s->rows, head, &p->q, m0, rows, p->dim_qk, 1);
  fa_amx_put(s->rows, FA_AMX_DIMS_RIGHT, shared->q_scores + at * shared->q_halves);
  shared->finite[at] = (uint8_t)finite;
  if (finite) return; /* else sums over this strip are made apart (amx_keys.c), and must find nothing here */
  memset(shared->q_rows + at * shared->q_halves, 0, (size_t)shared->q_halves * sizeof(uint16_t));
  memset(shared->dout_rows + at * shared->v_halves, 0, (size_t)shared->v_halves * sizeof(uint16_t));
}

static void rows_task(int64_t item, int worker, void *context) {
  const fa_job *job = context;
  const fa_problem *p = job->problem;
  const fa_amx_backward_shared *shared = job->extra;
  fa_arena arena = fa_job_scratch(job, worker);
  rows_scratch s = carve_rows(p, &arena);
  int first, end;
  fa_head head = strips_of_item(job, item, &first, &end);
  for (int strip = first; strip < end && strip * STRIP < head.seq.len_q; strip++) start_strip(&head, shared, &s, strip);
}

/* dq's 32 rows: the copies' sums, in order, turned back into rows. */
static void sum_copies(const fa_amx_backward_shared *shared, int64_t at, int dims, const rows_scratch *s) {
  memset(s->sum, 0, (size_t)dims * STRIP * sizeof(float));
  for (int copy = 0; copy < shared->copies; copy++) {
    int64_t place = copy * shared->strips + at;
    const float *part = shared->dq + place * dims * STRIP;
    for (int i = 0; i < dims * STRIP && shared->dq_made[place]; i += 16)
      f32_store(s->sum + i, f32_add(f32_load(s->sum + i), f32_load(part + i)));
  }
  flip(s->sum, STRIP, dims, STRIP, s->dq, dims);
}

static void finish_strip(const fa_head *head, const fa_amx_backward_shared *shared, const rows_scratch *s, int strip) {
  const fa_problem *p = head->problem;
  const int dims = fa_amx_strips(p->dim_qk) * STRIP, m0 = strip * STRIP, rows = fa_min(STRIP, head->seq.slot_q - m0);
  const int used = fa_max(fa_min(rows, head->seq.len_q - m0), 0);
  double scale[STRIP];
  for (int r = 0; r < STRIP; r++) scale[r] = p->score.scale;
  if (used > 0) sum_copies(shared, fa_strip_at(shared, head, strip), dims, s);
  memset(s->dq + used * dims, 0, (size_t)(rows - used) * (size_t)dims * sizeof(float));
  head->ops->store(fa_query_row(head, &p->grad.dq, m0), p->dtype, p->grad.dq.s, p->grad.dq.d, s->dq, dims, rows, p->dim_qk, scale);
}

static void queries_task(int64_t item, int worker, void *context) {
  const fa_job *job = context;
  fa_arena arena = fa_job_scratch(job, worker);
  rows_scratch s = carve_rows(job->problem, &arena);
  int first, end;
  fa_head head = strips_of_item(job, item, &first, &end);
  for (int strip = first; strip < end; strip++) finish_strip(&head, job->extra, &s, strip);
}

static void keys_task(int64_t item, int worker, void *context) {
  const fa_job *job = context;
  const fa_problem *p = job->problem;
  const fa_amx_backward_shared *shared = job->extra;
  int64_t bh = item / shared->copies;
  fa_head head = fa_head_of(p, job->ops, (int)(bh / p->heads_k), (int)(bh % p->heads_k) * p->group);
  fa_amx_keys_of_head(shared, head, (int)(item % shared->copies), fa_job_scratch(job, worker));
}

/* All passes for one key head. */
static void head_task(int64_t item, int worker, void *context) {
  const fa_job *job = context;
  const fa_problem *p = job->problem;
  fa_amx_backward_shared own = *(const fa_amx_backward_shared *)job->extra;
  int b = (int)(item / p->heads_k), first = (int)(item % p->heads_k) * p->group;
  fa_head head = fa_head_of(p, job->ops, b, first);
  fa_arena arena = fa_job_scratch(job, worker);
  rows_scratch s = carve_rows(p, &arena);
  own.origin = fa_tile_at(&own.index, b, first, 0);
  carve_strips(&own, p, (int64_t)p->group * own.index.longest, &arena);
  for (int g = 0; g < p->group; g++) {
    head = fa_head_of(p, job->ops, b, first + g);
    for (int strip = 0; strip * STRIP < head.seq.len_q; strip++) start_strip(&head, &own, &s, strip);
  }
  fa_amx_keys_of_head(&own, fa_head_of(p, job->ops, b, first), 0, (fa_arena){arena.base + arena.used, 0});
  for (int g = 0; g < p->group && p->grad.dq.data; g++) {
    head = fa_head_of(p, job->ops, b, first + g);
    for (int strip = 0; strip * STRIP < head.seq.slot_q; strip++) finish_strip(&head, &own, &s, strip);
  }
}

static fa_code run_heads(fa_job *job, const fa_amx_backward_shared *shared, fa_error *error) {
  const fa_problem *p = job->problem;
  fa_amx_backward_shared count = *shared;
  fa_arena arena = {NULL, 0};
  carve_rows(p, &arena);
  carve_strips(&count, p, (int64_t)p->group * shared->index.longest, &arena);
  return fa_job_run(job, arena.used + fa_amx_keys_scratch(p), (int64_t)p->batch * p->heads_k, head_task, error);
}

static fa_code run_passes(fa_job *job, fa_amx_backward_shared *shared, fa_error *error) {
  const fa_problem *p = job->problem;
  const int64_t strips = fa_tile_count(&shared->index, p->batch);
  fa_arena arena = {NULL, 0}, rows = {NULL, 0};
  carve_strips(shared, p, strips, &arena);
  carve_rows(p, &rows);
  char *workspace = fa_workspace_take(arena.used);
  if (!workspace) return fa_fail(error, FA_ERR_MEMORY, "cannot allocate %zu bytes of workspace", arena.used);
  arena = (fa_arena){workspace, 0};
  carve_strips(shared, p, strips, &arena);
  int longest = 0;
  for (int b = 0; b < p->batch; b++) longest = fa_max(longest, fa_sequence_of(p, b).slot_q);
  job->tiles_m = fa_ceil_div(longest, TASK_STRIPS * STRIP);
  int64_t row_tasks = (int64_t)p->batch * p->heads_q * job->tiles_m;
  fa_code code = fa_job_run(job, rows.used, row_tasks, rows_task, error);
  if (code == FA_OK) code = fa_job_run(job, fa_amx_keys_scratch(p), (int64_t)p->batch * p->heads_k * shared->copies, keys_task, error);
  if (code == FA_OK && p->grad.dq.data) code = fa_job_run(job, rows.used, row_tasks, queries_task, error);
  fa_workspace_give(workspace);
  return code;
}

size_t fa_amx_workspace(const fa_problem *p, fa_direction direction) {
  fa_amx_backward_shared shared;
  fa_arena arena = {NULL, 0};
  if (direction == FA_FORWARD) return 0;
  describe_shared(&shared, p);
  carve_strips(&shared, p, (int64_t)p->heads_q * p->batch * fa_ceil_div(p->seqlen_q, STRIP), &arena);
  return arena.used;
}

fa_code fa_cpu_backward_amx(const fa_problem *p, fa_error *error) {
  fa_job job;
  fa_code code = fa_job_init(&job, p, error);
  if (code != FA_OK) return code;
  int64_t *start = malloc(fa_tile_index_bytes(p));
  if (!start) return fa_fail(error, FA_ERR_MEMORY, "cannot allocate an index of %d sequences", p->batch);
  fa_amx_backward_shared shared = {.index = fa_index_tiles(p, 0, STRIP, start)};
  describe_shared(&shared, p);
  job.extra = &shared;
  code = shared.copies == 1 && (int64_t)p->batch * p->heads_k > 1 ? run_heads(&job, &shared, error) : run_passes(&job, &shared, error);
  if (code == FA_OK) {
    fa_clear_slack(p, job.ops, &p->grad.dq, p->lengths.cu_q, p->total_q, p->heads_q, p->dim_qk);
    fa_clear_slack(p, job.ops, &p->grad.dk, p->lengths.cu_k, p->total_k, p->heads_k, p->dim_qk);
    fa_clear_slack(p, job.ops, &p->grad.dv, p->lengths.cu_k, p->total_k, p->heads_k, p->dim_v);
  }
  free(start);
  return code;
}

AMX_END
#endif
