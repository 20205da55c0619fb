/* amx_forward.c: forward.c's passes on AMX tiles. With heads enough to keep all threads busy, a task is a key head: it packs its K and V and
 * attends all queries of its group, from buffers that the next task uses again. With fewer heads there are two passes:
 *
 *     keys       K and V of every key head packed once, for all strips and query heads that share them    a task: 256 keys
 *     queries    amx_queries.c                                                                            a task: some strips of 32 rows */
#include "amx.h"
#ifdef FA_HAS_AMX
#include <math.h>
#include <stdlib.h>

#include "../core/error.h"
#include "amx_forward.h"
#include "padding.h"
#include "threads.h"
#include "workspace.h"

AMX_BEGIN

enum { PACK_TILES = 4 /* of one packing task */, TASK_STRIPS = 8 /* at most */, HEADS_PER_THREAD = 4 /* that keep threads busy */ };

static const float LOG2_E = 1.44269504f;

/* Blocks [first, end) of 32 keys, the last perhaps empty. */
static void pack_keys(const fa_amx_forward_shared *shared, const fa_head *head, fa_amx_keys to, int first, int end, fa_amx_rows *rows) {
  const fa_problem *p = head->problem;
  for (int n = first; n < end; n++) {
    fa_amx_take_keys(rows, head, &p->k, n * STRIP, head->seq.len_k - n * STRIP, p->dim_qk);
    fa_amx_put(rows, FA_AMX_DIMS_LEFT, to.k + n * shared->k_halves);
    fa_amx_take_keys(rows, head, &p->v, n * STRIP, head->seq.len_k - n * STRIP, p->dim_v);
    fa_amx_put(rows, FA_AMX_ROWS_LEFT, to.v + n * shared->v_halves);
    to.v_finite[n] = (uint8_t)fa_amx_finite(rows);
  }
}

static int blocks_of(const fa_head *head) { return 2 * fa_ceil_div(head->seq.len_k, FA_BLOCK_N); }

static fa_amx_keys carve_keys(const fa_amx_forward_shared *shared, int64_t blocks, fa_arena *arena) {
  fa_amx_keys keys;
  keys.k = fa_take(arena, (size_t)(blocks * shared->k_halves) * sizeof(uint16_t));
  keys.v = fa_take(arena, (size_t)(blocks * shared->v_halves) * sizeof(uint16_t));
  keys.v_finite = fa_take(arena, (size_t)blocks);
  return keys;
}

static void pack_task(int64_t item, int worker, void *context) {
  const fa_job *job = context;
  const fa_problem *p = job->problem;
  const fa_amx_forward_shared *shared = job->extra;
  fa_arena arena = fa_job_scratch(job, worker);
  fa_amx_rows *rows = fa_take(&arena, sizeof *rows);
  int chunks = fa_ceil_div(shared->index.longest, PACK_TILES), first = (int)(item % chunks) * PACK_TILES * 2;
  int64_t bh = item / chunks;
  fa_head head = fa_head_of(p, job->ops, (int)(bh / p->heads_k), (int)(bh % p->heads_k) * p->group);
  fa_amx_keys to = fa_amx_keys_from(shared, shared->keys, fa_tile_at(&shared->index, head.b, head.h_k, 0) * 2);
  pack_keys(shared, &head, to, first, fa_min(first + PACK_TILES * 2, blocks_of(&head)), rows);
}

/* Tasks run over chunks of strips, last (under causal masks: longest) first, then over heads. */
static void queries_task(int64_t item, int worker, void *context) {
  const fa_job *job = context;
  const fa_problem *p = job->problem;
  const fa_amx_forward_shared *shared = job->extra;
  int64_t heads = (int64_t)p->batch * p->heads_q, bh = item % heads;
  int m0 = (job->tiles_m - 1 - (int)(item / heads)) * shared->strips * STRIP;
  fa_head head = fa_head_of(p, job->ops, (int)(bh / p->heads_q), (int)(bh % p->heads_q));
  fa_amx_keys keys = fa_amx_keys_from(shared, shared->keys, fa_tile_at(&shared->index, head.b, head.h_k, 0) * 2);
  fa_amx_queries(shared, &head, keys, m0, fa_job_scratch(job, worker));
}

static void head_task(int64_t item, int worker, void *context) {
  const fa_job *job = context;
  const fa_problem *p = job->problem;
  const fa_amx_forward_shared *shared = job->extra;
  fa_arena arena = fa_job_scratch(job, worker);
  fa_amx_rows *rows = fa_take(&arena, sizeof *rows);
  fa_amx_keys keys = carve_keys(shared, 2 * shared->index.longest, &arena);
  int b = (int)(item / p->heads_k), first = (int)(item % p->heads_k) * p->group;
  fa_head head = fa_head_of(p, job->ops, b, first);
  pack_keys(shared, &head, keys, 0, blocks_of(&head), rows);
  for (int g = 0; g < p->group; g++) {
    head = fa_head_of(p, job->ops, b, first + g);
    for (int m0 = 0; m0 < head.seq.slot_q; m0 += shared->strips * STRIP)
      fa_amx_queries(shared, &head, keys, m0, (fa_arena){arena.base + arena.used, 0});
  }
}

/* Strips of a task: fewer when there would be too few tasks to share out evenly. */
static int strips_of_a_task(const fa_problem *p, int longest_rows) {
  int strips = TASK_STRIPS;
  while (strips > 2 && (int64_t)p->batch * p->heads_q * fa_ceil_div(longest_rows, strips * STRIP) < 6 * (int64_t)fa_thread_count())
    strips /= 2;
  return strips;
}

static void describe_shared(const fa_problem *p, fa_amx_forward_shared *shared, int longest_rows) {
  shared->parts = fa_amx_parts(p->dtype);
  shared->k_halves = fa_amx_halves(p->dim_qk, shared->parts);
  shared->v_halves = fa_amx_halves(p->dim_v, shared->parts);
  shared->factor = has_score_terms(p) ? LOG2_E : (float)fabs(p->score.scale) * LOG2_E;
  shared->strips = strips_of_a_task(p, longest_rows);
}

static fa_code run_heads(fa_job *job, const fa_amx_forward_shared *shared, fa_error *error) {
  fa_arena scratch = {NULL, 0};
  fa_take(&scratch, sizeof(fa_amx_rows));
  carve_keys(shared, 2 * shared->index.longest, &scratch);
  scratch.used += fa_amx_queries_scratch(job->problem, shared);
  return fa_job_run(job, scratch.used, (int64_t)job->problem->batch * job->problem->heads_k, head_task, error);
}

static fa_code run_passes(fa_job *job, fa_amx_forward_shared *shared, int longest_slot, fa_error *error) {
  const fa_problem *p = job->problem;
  fa_arena arena = {NULL, 0};
  int64_t blocks = 2 * fa_tile_count(&shared->index, p->batch);
  carve_keys(shared, blocks, &arena);
  char *workspace = fa_workspace_take(arena.used);
  if (!workspace) return fa_fail(error, FA_ERR_MEMORY, "cannot allocate %zu bytes of workspace", arena.used);
  arena = (fa_arena){workspace, 0};
  shared->keys = carve_keys(shared, blocks, &arena);
  job->tiles_m = fa_ceil_div(longest_slot, shared->strips * STRIP);
  int64_t pack_tasks = (int64_t)p->batch * p->heads_k * fa_ceil_div(shared->index.longest, PACK_TILES);
  fa_code code = fa_job_run(job, sizeof(fa_amx_rows), pack_tasks, pack_task, error);
  if (code == FA_OK)
    code = fa_job_run(job, fa_amx_queries_scratch(p, shared), (int64_t)p->batch * p->heads_q * job->tiles_m, queries_task, error);
  fa_workspace_give(workspace);
  return code;
}

static int longest_slot_of(const fa_problem *p) {
  int longest = 0;
  for (int b = 0; b < p->batch; b++) longest = fa_max(longest, fa_sequence_of(p, b).slot_q);
  return longest;
}

fa_code fa_cpu_forward_amx(const fa_problem *p, fa_error *error) {
  fa_job job;
  fa_code code = fa_job_init(&job, p, error);
  if (code != FA_OK) return code;
  int64_t *start = malloc(fa_tile_index_bytes(p));
  if (!start) return fa_fail(error, FA_ERR_MEMORY, "cannot allocate an index of %d sequences", p->batch);
  fa_amx_forward_shared shared = {.index = fa_index_tiles(p, 1, FA_BLOCK_N, start)};
  int longest_slot = longest_slot_of(p);
  describe_shared(p, &shared, longest_slot);
  job.extra = &shared;
  if ((int64_t)p->batch * p->heads_k >= HEADS_PER_THREAD * (int64_t)fa_thread_count())
    code = run_heads(&job, &shared, error);
  else
    code = run_passes(&job, &shared, longest_slot, error);
  if (code == FA_OK) fa_write_slack(p, job.ops);
  free(start);
  return code;
}

AMX_END
#endif
