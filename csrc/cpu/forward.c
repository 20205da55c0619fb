/* forward.c: the paper's Algorithm 1 on a CPU. A task is one tile of query rows:
 *
 *     for each visited tile of 64 keys:   S = Q K^T          (gemm; K transposed on load)
 *                                         P = 2^(S - m)      (m: running row maximum; O and l shrink when it has grown)
 *                                         O += P V           (gemm)
 *     out = O / l,  lse = m + log l
 *
 * A tile holds rows of one head, or, where sequences of queries are short, the rows of several heads of a group, which then read
 * their keys once. Where that makes too few tasks, each tile is attended in several ranges of keys, whose (O, m, l) are combined in order.
 * Nothing else larger than a tile is kept. Tasks share nothing, so the result does not depend on the number of threads. Tiles of few rows
 * read their keys another way: forward_few.c. */
#include <math.h>

#include "../core/error.h"
#include "engine.h"
#include "forward_few.h"
#include "forward_tile.h"
#include "padding.h"
#include "workspace.h"

/* What one range of keys leaves of a tile. */
typedef struct {
  void *o;
  double *shift, *sum;
} partial_tile;

typedef struct {
  fa_forward_plan plan;
  int64_t units; /* tiles at one place of all sequences: (batch, key head, stack) */
  int tiles_m;
  char *partials; /* NULL where keys are not split */
  size_t partial_bytes;
} forward_shared;

static partial_tile carve_partial(const fa_problem *p, const fa_tile_ops *ops, const fa_forward_plan *plan, fa_arena *arena) {
  size_t rows = (size_t)plan->block_m * (size_t)plan->stack;
  partial_tile t;
  t.o = fa_take(arena, rows * (size_t)fa_tile_ld(p->dim_v) * (size_t)ops->real_bytes);
  t.shift = fa_take(arena, rows * sizeof(double));
  t.sum = fa_take(arena, rows * sizeof(double));
  return t;
}

static partial_tile partial_at(const fa_job *job, int64_t tile, int split) {
  const forward_shared *shared = job->extra;
  int64_t index = tile * shared->plan.splits + split;
  fa_arena arena = {shared->partials + (size_t)index * shared->partial_bytes, 0};
  return carve_partial(job->problem, job->ops, &shared->plan, &arena);
}

static fa_forward_tile carve(const fa_job *job, int worker) {
  const forward_shared *shared = job->extra;
  fa_arena arena = fa_job_scratch(job, worker);
  return fa_carve_forward_tile(job->problem, job->ops, &shared->plan, &arena, NULL);
}

/* Finds the heads and rows of a tile: query tiles run slowest, last (under causal masks: longest) first. Returns 1 if rows are used. */
static int place_tile(const fa_job *job, int64_t tile, fa_forward_tile *t) {
  const fa_problem *p = job->problem;
  const forward_shared *shared = job->extra;
  const fa_forward_plan *plan = &shared->plan;
  int64_t unit = tile % shared->units, bh = unit / plan->stacks;
  int first = (int)(unit % plan->stacks) * plan->stack, h = (int)(bh % p->heads_k) * p->group + first;
  t->count = fa_min(plan->stack, p->group - first);
  for (int g = 0; g < t->count; g++) t->heads[g] = fa_head_of(p, job->ops, (int)(bh / p->heads_k), h + g);
  t->m0 = (shared->tiles_m - 1 - (int)(tile / shared->units)) * plan->block_m;
  t->rows = fa_min(plan->block_m, t->heads->seq.len_q - t->m0);
  return t->rows > 0;
}

static void pad_tile(const fa_job *job, const fa_forward_tile *t) {
  const forward_shared *shared = job->extra;
  int used = t->heads->seq.len_q, end = fa_min(t->m0 + shared->plan.block_m, t->heads->seq.slot_q);
  for (int g = 0; g < t->count; g++) fa_write_padding(t->heads + g, fa_max(t->m0, used), end);
}

/* Takes `count` tiles of one batch entry, at the same rows of other heads, through their keys. */
static void attend_range(const fa_forward_tile *tiles, int count, fa_range keys) {
  int few = tiles->rows * tiles->count <= FA_FEW_ROWS;
  for (int n0 = keys.lo; n0 < keys.hi; n0 += FA_BLOCK_N) {
    if (!few) fa_ask_for_next_keys(tiles, n0 + FA_BLOCK_N, keys.hi);
    if (!few)
      fa_attend_keys(tiles, n0);
    else if (fa_tile_in_block_mask(tiles->heads, tiles->m0, n0))
      fa_attend_few(tiles, count, n0);
  }
}

static void forward_task(int64_t item, int worker, void *context) {
  fa_forward_tile t = carve(context, worker);
  if (place_tile(context, item, &t)) {
    fa_begin_forward(&t);
    attend_range(&t, 1, fa_key_tiles(t.heads, t.m0, t.rows));
    fa_finish_forward(&t);
  }
  pad_tile(context, &t);
}

/* One range of keys for `together` units that follow each other. */
static void split_task(int64_t item, int worker, void *context) {
  const fa_job *job = context;
  const forward_shared *shared = job->extra;
  const fa_forward_plan *plan = &shared->plan;
  fa_arena arena = fa_job_scratch(job, worker);
  fa_forward_tile tiles[FA_MAX_TOGETHER];
  int64_t runs = shared->units / plan->together, run = item % runs, place = item / runs / plan->splits;
  int split = (int)(item / runs % plan->splits), from = split * plan->split_columns, count = 0;
  for (int i = 0; i < plan->together; i++) {
    int64_t tile = place * shared->units + run * plan->together + i;
    tiles[i] = fa_carve_forward_tile(job->problem, job->ops, plan, &arena, i ? tiles : NULL);
    if (!place_tile(job, tile, tiles + i)) continue; /* then none of them has rows */
    partial_tile part = partial_at(job, tile, split);
    tiles[i].o = part.o;
    tiles[i].shift = part.shift;
    tiles[i].sum = part.sum;
    fa_begin_forward(tiles + i);
    count++;
  }
  if (count == 0) return;
  fa_range keys = fa_key_tiles(tiles->heads, tiles->m0, tiles->rows);
  attend_range(tiles, count, (fa_range){fa_max(keys.lo, from), fa_min(keys.hi, from + plan->split_columns)});
}

/* all += part, both relative to the larger of their shifts. A range without a visible key has shift -inf and sum 0. */
static void add_partial(const fa_tile_ops *ops, const partial_tile *all, const partial_tile *part, int rows, int ld) {
  for (int row = 0; row < rows; row++) {
    double top = part->shift[row] > all->shift[row] ? part->shift[row] : all->shift[row];
    if (part->sum[row] == 0) continue;
    double mine = exp2(all->shift[row] - top), its = exp2(part->shift[row] - top);
    void *o = fa_at(ops, all->o, (int64_t)row * ld), *add = fa_at(ops, part->o, (int64_t)row * ld);
    ops->scale_row(o, ld, mine);
    ops->scale_row(add, ld, its);
    ops->add_row(o, add, ld);
    all->sum[row] = all->sum[row] * mine + part->sum[row] * its;
    all->shift[row] = top;
  }
}

/* The first range takes up the others, in order. */
static void combine_task(int64_t item, int worker, void *context) {
  const fa_job *job = context;
  const forward_shared *shared = job->extra;
  fa_forward_tile t = carve(job, worker);
  if (place_tile(job, item, &t)) {
    partial_tile all = partial_at(job, item, 0);
    for (int split = 1; split < shared->plan.splits; split++) {
      partial_tile part = partial_at(job, item, split);
      add_partial(job->ops, &all, &part, t.rows * t.count, fa_tile_ld(job->problem->dim_v));
    }
    t.o = all.o;
    t.shift = all.shift;
    t.sum = all.sum;
    fa_finish_forward(&t);
  }
  pad_tile(job, &t);
}

static forward_shared share(const fa_problem *p, const fa_tile_ops *ops) {
  forward_shared shared = {.plan = fa_forward_plan_of(p)};
  fa_arena one = {NULL, 0};
  carve_partial(p, ops, &shared.plan, &one);
  shared.partial_bytes = one.used;
  shared.units = (int64_t)p->batch * p->heads_k * shared.plan.stacks;
  shared.tiles_m = fa_ceil_div(p->seqlen_q, shared.plan.block_m);
  return shared;
}

size_t fa_cpu_forward_workspace(const fa_problem *p, const fa_tile_ops *ops) {
  forward_shared shared = share(p, ops);
  return shared.plan.splits == 1 ? 0 : (size_t)(shared.units * shared.tiles_m * shared.plan.splits) * shared.partial_bytes;
}

static fa_code run_split(fa_job *job, forward_shared *shared, fa_error *error) {
  int64_t tiles = shared->units * shared->tiles_m;
  size_t bytes = fa_cpu_forward_workspace(job->problem, job->ops);
  fa_arena count = {NULL, 0};
  for (int i = 0; i < shared->plan.together; i++) fa_carve_forward_tile(job->problem, job->ops, &shared->plan, &count, NULL);
  shared->partials = fa_workspace_take(bytes);
  if (!shared->partials) return fa_fail(error, FA_ERR_MEMORY, "cannot allocate %zu bytes of workspace", bytes);
  fa_code code = fa_job_run(job, count.used, tiles / shared->plan.together * shared->plan.splits, split_task, error);
  if (code == FA_OK) code = fa_job_run(job, count.used, tiles, combine_task, error);
  fa_workspace_give(shared->partials);
  return code;
}

fa_code fa_cpu_forward(const fa_problem *p, fa_error *error) {
  fa_job job;
  fa_code code = fa_job_init(&job, p, error);
  if (code != FA_OK) return code;
  forward_shared shared = share(p, job.ops);
  fa_arena count = {NULL, 0};
  job.extra = &shared;
  fa_carve_forward_tile(p, job.ops, &shared.plan, &count, NULL);
  code = shared.plan.splits > 1 ? run_split(&job, &shared, error)
                                : fa_job_run(&job, count.used, shared.units * shared.tiles_m, forward_task, error);
  if (code != FA_OK) return code;
  fa_write_slack(p, job.ops);
  return p->probs.data ? fa_cpu_probs(p, error) : FA_OK;
}
