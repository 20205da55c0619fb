/* amx_forward.c: forward.c's passes on AMX tiles:
 *
 *     keys       K and V of every key head packed once, for all strips and query heads that share them    a task: 256 keys
 *     queries    amx_queries.c                                                                            a task: some strips of 32 rows */
#include "amx.h"
#ifdef FA_HAS_AMX
#include <math.h>
#include <stdlib.h>

#include "../core/error.h"
#include "amx_forward.h"
#include "threads.h"

AMX_BEGIN

enum { PACK_TILES = 4 /* of one packing task */, TASK_STRIPS = 8 /* at most */ };

static const float LOG2_E = 1.44269504f;

void fa_amx_write_padding(const fa_head *head, int start, int end) {
  const fa_problem *p = head->problem;
  static const float zeros[FA_MAX_HEAD_DIM];
  for (int i = start; i < end; i++) {
    head->ops->store(fa_query_row(head, &p->out, i), p->dtype, 0, p->out.d, zeros, 0, 1, p->dim_v, NULL);
    fa_set_statistic(head, &p->lse, i, -INFINITY);
  }
}

typedef struct {
  float *tile;
  fa_amx_rows *rows;
} pack_scratch;

static pack_scratch carve_pack(const fa_problem *p, fa_arena *arena) {
  pack_scratch s;
  s.tile = fa_take(arena, (size_t)FA_BLOCK_N * (size_t)fa_pad(fa_max(p->dim_qk, p->dim_v)) * sizeof(float));
  s.rows = fa_take(arena, sizeof(fa_amx_rows));
  return s;
}

static void pack_view(const fa_head *head, const fa_view *view, int dim, int n0, fa_amx_form form, pack_scratch *s, uint16_t *to) {
  int columns = fa_min(FA_BLOCK_N, head->seq.len_k - n0), parts = fa_amx_parts(head->problem->dtype);
  fa_load_keys(head, view, n0, columns, dim, s->tile);
  for (int i = 0; i < 2; i++) {
    fa_amx_take_rows(s->rows, s->tile + i * STRIP * fa_pad(dim), fa_pad(dim), fa_max(columns - i * STRIP, 0), dim, parts, 0);
    fa_amx_put(s->rows, form, to + i * fa_amx_halves(dim, parts));
  }
}

static void pack_task(int64_t item, int worker, void *context) {
  const fa_job *job = context;
  const fa_problem *p = job->problem;
  const fa_amx_forward_shared *shared = job->extra;
  fa_arena arena = fa_job_scratch(job, worker);
  pack_scratch s = carve_pack(p, &arena);
  int chunks = fa_ceil_div(shared->index.longest, PACK_TILES);
  int64_t bh = item / chunks;
  fa_head head = fa_head_of(p, job->ops, (int)(bh / p->heads_k), (int)(bh % p->heads_k) * p->group);
  int first = (int)(item % chunks) * PACK_TILES, end = fa_min(first + PACK_TILES, fa_ceil_div(head.seq.len_k, FA_BLOCK_N));
  for (int n = first; n < end; n++) {
    int64_t tile = fa_tile_at(&shared->index, head.b, head.h_k, n);
    int columns = fa_min(FA_BLOCK_N, head.seq.len_k - n * FA_BLOCK_N);
    float ignored;
    pack_view(&head, &p->k, p->dim_qk, n * FA_BLOCK_N, FA_AMX_DIMS_LEFT, &s, shared->k + tile * 2 * shared->k_halves);
    fa_amx_row_sizes(s.tile, columns, fa_pad(p->dim_qk), shared->k_norm + tile, &ignored);
    pack_view(&head, &p->v, p->dim_v, n * FA_BLOCK_N, FA_AMX_ROWS_LEFT, &s, shared->v + tile * 2 * shared->v_halves);
    fa_amx_row_sizes(s.tile, columns, fa_pad(p->dim_v), &ignored, shared->v_top + tile);
    shared->v_finite[tile] = (uint8_t)job->ops->all_finite(s.tile, (int64_t)columns * fa_pad(p->dim_v));
  }
}

/* Strips of a task: fewer when there would be too few tasks to share out evenly. */
static int strips_of_a_task(const fa_problem *p, int longest_rows) {
  int strips = TASK_STRIPS;
  while (strips > 2 && (int64_t)p->batch * p->heads_q * fa_ceil_div(longest_rows, strips * STRIP) < 6 * (int64_t)fa_thread_count())
    strips /= 2;
  return strips;
}

static void carve_shared(const fa_problem *p, fa_amx_forward_shared *shared, fa_arena *arena) {
  shared->parts = fa_amx_parts(p->dtype);
  shared->k_halves = fa_amx_halves(p->dim_qk, shared->parts);
  shared->v_halves = fa_amx_halves(p->dim_v, shared->parts);
  shared->factor = has_score_terms(p) ? LOG2_E : (float)fabs(p->score.scale) * LOG2_E;
  int64_t tiles = fa_tile_count(&shared->index, p->batch);
  shared->k = fa_take(arena, (size_t)(tiles * 2 * shared->k_halves) * sizeof(uint16_t));
  shared->v = fa_take(arena, (size_t)(tiles * 2 * shared->v_halves) * sizeof(uint16_t));
  shared->v_finite = fa_take(arena, (size_t)tiles);
  shared->k_norm = fa_take(arena, (size_t)tiles * sizeof(float));
  shared->v_top = fa_take(arena, (size_t)tiles * sizeof(float));
}

static fa_code run_passes(fa_job *job, fa_amx_forward_shared *shared, int longest_slot, fa_error *error) {
  const fa_problem *p = job->problem;
  fa_arena pack = {NULL, 0};
  carve_pack(p, &pack);
  job->extra = shared;
  job->tiles_m = fa_ceil_div(longest_slot, shared->strips * STRIP);
  int64_t pack_tasks = (int64_t)p->batch * p->heads_k * fa_ceil_div(shared->index.longest, PACK_TILES);
  fa_code code = fa_job_run(job, pack.used, pack_tasks, pack_task, error);
  if (code != FA_OK) return code;
  return fa_job_run(job, fa_amx_queries_scratch(p, shared), (int64_t)p->batch * p->heads_q * job->tiles_m, fa_amx_queries_task, error);
}

static int longest_slot_of(const fa_problem *p) {
  int longest = 0;
  for (int b = 0; b < p->batch; b++) longest = fa_max(longest, fa_sequence_of(p, b).slot_q);
  return longest;
}

/* Tokens behind the last sequence of a packed batch belong to nobody, and are written all the same. */
static void write_slack(const fa_problem *p, const fa_tile_ops *ops) {
  if (!p->lengths.packed) return;
  int64_t end = p->lengths.cu_q.data[p->batch * p->lengths.cu_q.stride];
  for (int h = 0; h < p->heads_q && end < p->total_q; h++) {
    fa_head head = {.problem = p, .ops = ops, .h = h};
    head.seq.q_start = end;
    fa_amx_write_padding(&head, 0, (int)(p->total_q - end));
  }
}

fa_code fa_cpu_forward_amx(const fa_problem *p, fa_error *error) {
  fa_job job;
  fa_code code = fa_job_init(&job, p, error);
  if (code != FA_OK) return code;
  int64_t *start = malloc(fa_tile_index_bytes(p));
  if (!start) return fa_fail(error, FA_ERR_MEMORY, "cannot allocate an index of %d sequences", p->batch);
  fa_amx_forward_shared shared = {.index = fa_index_tiles(p, 1, FA_BLOCK_N, start)};
  fa_arena arena = {NULL, 0};
  int longest_slot = longest_slot_of(p);
  carve_shared(p, &shared, &arena);
  shared.strips = strips_of_a_task(p, longest_slot);
  char *workspace = aligned_alloc(64, arena.used + 64);
  if (workspace) {
    arena = (fa_arena){workspace, 0};
    carve_shared(p, &shared, &arena);
    code = run_passes(&job, &shared, longest_slot, error);
    if (code == FA_OK) write_slack(p, job.ops);
  } else {
    code = fa_fail(error, FA_ERR_MEMORY, "cannot allocate %zu bytes of workspace", arena.used);
  }
  free(workspace);
  free(start);
  return code;
}

AMX_END
#endif
