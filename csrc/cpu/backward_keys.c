/* backward_keys.c: the pass over keys. A task owns some tiles of 64 keys of one key head: K and V stay, and for every query head of the
 * group all tiles of queries that see these keys pass by:
 *
 *     dV += P^T dO        dK += dS^T Q        both in the task's own tiles, stored at its end
 *     dQ += dS K          in a sum that all tasks of the head share
 *
 * The shared sum is added to in the order of the keys, so it needs neither atomics nor copies and comes out the same with any number
 * of threads: a task takes its steps (query head, query tile) in rising order, and takes one only when the task of the keys before has
 * done so. Keys that see a query tile are neighbours (mask.h), so that this one wait covers all tasks before. Tasks start in the order of
 * the keys, hence the one waited for is always running or done. */
#include <string.h>

#include "backward.h"
#include "threads.h"

enum { MOST_KEY_TILES = 4, WANTED_TASKS = 64 };

/* Tiles of keys that a task owns, so that Q and dO are loaded once for all of them; fewer where that would leave too few tasks. */
static int key_tiles(const fa_problem *p) {
  int tiles = MOST_KEY_TILES;
  while (tiles > 1 && (int64_t)p->batch * p->heads_k * fa_ceil_div(p->seqlen_k, tiles * FA_BLOCK_N) < WANTED_TASKS) tiles /= 2;
  return tiles;
}

typedef struct {
  int count;
  fa_gradient_tiles tiles[MOST_KEY_TILES];       /* they share all but their keys */
  void *dk[MOST_KEY_TILES], *dv[MOST_KEY_TILES]; /* [64][dim] */
  int columns[MOST_KEY_TILES];                   /* keys of each that are there */
} keys_tiles;

static keys_tiles carve(const fa_job *job, fa_arena *arena) {
  const fa_problem *p = job->problem;
  size_t real = (size_t)job->ops->real_bytes, ld_qk = (size_t)fa_tile_ld(p->dim_qk), ld_v = (size_t)fa_tile_ld(p->dim_v);
  keys_tiles t = {.count = key_tiles(p)};
  t.tiles[0] = fa_carve_gradient_tiles(job, arena);
  for (int i = 0; i < t.count; i++) {
    t.tiles[i] = t.tiles[0];
    if (i > 0) fa_carve_key_side(job, &t.tiles[i], arena);
    t.dk[i] = fa_take(arena, FA_BLOCK_N * ld_qk * real);
    t.dv[i] = fa_take(arena, FA_BLOCK_N * ld_v * real);
  }
  return t;
}

/* c += a b, where a zero of a says "no such pair" once the tile has invisible pairs and b something that must not leak through 0 * b. b has
 * the rows of a tile of `dim` columns. */
static void accumulate(const fa_tile_ops *ops, int partial, int m, int dim, int k, const void *a, ptrdiff_t a_row, ptrdiff_t a_col,
                       const void *b, void *c, ptrdiff_t c_row) {
  int n = fa_pad(dim), ld = fa_tile_ld(dim);
  if (partial && !ops->all_finite(b, (int64_t)k * ld))
    ops->gemm_skipping_zeros(m, n, k, a, a_row, a_col, b, ld, c, c_row);
  else
    ops->gemm(m, n, k, a, a_row, a_col, b, ld, c, c_row, 1);
}

/* One patch of a tile of queries against the keys at hand. */
static void patch_step(const fa_head *head, const fa_backward_shared *shared, keys_tiles *t, int i, int m0, int n0, const fa_patch *patch) {
  const fa_problem *p = head->problem;
  const fa_tile_ops *ops = head->ops;
  fa_gradient_tiles *g = t->tiles + i;
  int ld_qk = fa_tile_ld(p->dim_qk), ld_v = fa_tile_ld(p->dim_v), rows = patch->rows, seen = fa_min(patch->hi, t->columns[i]) - patch->lo;
  int64_t row = patch->row, first = row * FA_BLOCK_LD + patch->lo;
  void *weights = fa_at(ops, g->p, first), *ds = fa_at(ops, g->ds, first);
  int partial = fa_gradient_patch(head, g, fa_delta_of(shared, head, m0), m0, n0, t->columns[i], patch);
  if (p->grad.dv.data)
    accumulate(ops, partial, seen, p->dim_v, rows, weights, 1, FA_BLOCK_LD, fa_at(ops, g->dout, row * ld_v),
               fa_at(ops, t->dv[i], (int64_t)patch->lo * ld_v), ld_v);
  for (int r = 0; r < rows && p->score.softcap > 0; r++) {
    void *ds_row = fa_at(ops, ds, (int64_t)r * FA_BLOCK_LD);
    ops->multiply_row(ds_row, ds_row, fa_at(ops, g->softcap, first + (int64_t)r * FA_BLOCK_LD), patch->hi - patch->lo);
  }
  if (p->grad.dk.data)
    accumulate(ops, partial, seen, p->dim_qk, rows, ds, 1, FA_BLOCK_LD, fa_at(ops, g->q, row * ld_qk),
               fa_at(ops, t->dk[i], (int64_t)patch->lo * ld_qk), ld_qk);
  if (p->grad.dq.data) {
    ptrdiff_t dq_row;
    void *dq = fa_dq_sums(shared, head, m0 + patch->row, &dq_row);
    accumulate(ops, partial, rows, p->dim_qk, seen, ds, FA_BLOCK_LD, 1, fa_at(ops, g->k, (int64_t)patch->lo * ld_qk), dq, dq_row);
  }
}

static void store_keys(const fa_head *head, const fa_view *view, const void *tile, int n0, int rows, int dim, double scale) {
  double factors[FA_BLOCK_N];
  if (!view->data) return;
  for (int i = 0; i < rows; i++) factors[i] = scale;
  head->ops->store(fa_key_row(head, view, n0), head->problem->dtype, view->s, view->d, tile, fa_tile_ld(dim), rows, dim, factors);
}

/* One tile of queries against the keys at hand. */
static void tile_step(const fa_job *job, const fa_head *head, keys_tiles *t, int m0, int n0) {
  const fa_problem *p = job->problem;
  int rows = fa_min(job->block_m, head->seq.len_q - m0), wanted = 0;
  for (int i = 0; i < t->count; i++) wanted |= t->columns[i] > 0 && fa_tile_in_block_mask(head, m0, n0 + i * FA_BLOCK_N);
  if (!wanted) return;
  fa_load_query_side(head, t->tiles, m0, rows);
  fa_ask_for_queries(head, &p->q, m0 + rows, job->block_m, p->dim_qk);
  fa_ask_for_queries(head, &p->grad.dout, m0 + rows, job->block_m, p->dim_v);
  for (int i = 0; i < t->count; i++) {
    fa_patch patch = {0, 0, 0, 0};
    int n = n0 + i * FA_BLOCK_N;
    if (t->columns[i] <= 0 || !fa_tile_in_block_mask(head, m0, n)) continue;
    while (fa_next_patch(head, m0, rows, n, t->columns[i], &patch)) patch_step(head, job->extra, t, i, m0, n, &patch);
  }
}

/* All rows of one query head that see the keys at hand. before: steps of the task before, NULL for the first; done: our own. */
static void head_steps(const fa_job *job, const fa_head *head, keys_tiles *t, int n0, int n1, atomic_int *before, atomic_int *done) {
  const fa_problem *p = job->problem;
  fa_range range = fa_visiting_rows(p->visibility.rule, head->seq.len_q, head->seq.len_k, n0, n1);
  int first_step = head->h % p->group * job->tiles_m;
  for (int m0 = range.lo / job->block_m * job->block_m; m0 < range.hi; m0 += job->block_m) {
    int step = first_step + m0 / job->block_m;
    if (before) fa_wait_above(before, step);
    tile_step(job, head, t, m0, n0);
    atomic_store_explicit(done, step + 1, memory_order_release);
  }
  atomic_store_explicit(done, first_step + job->tiles_m, memory_order_release);
}

static void start_keys(const fa_job *job, const fa_head *head, keys_tiles *t, int n0) {
  size_t real = (size_t)job->ops->real_bytes;
  for (int i = 0; i < t->count; i++) {
    int n = n0 + i * FA_BLOCK_N;
    t->columns[i] = fa_min(FA_BLOCK_N, head->seq.len_k - n);
    memset(t->dk[i], 0, FA_BLOCK_N * (size_t)fa_tile_ld(job->problem->dim_qk) * real);
    memset(t->dv[i], 0, FA_BLOCK_N * (size_t)fa_tile_ld(job->problem->dim_v) * real);
    if (t->columns[i] > 0) fa_load_key_side(head, t->tiles + i, n, t->columns[i]);
  }
}

/* Tasks run over keys, first (under causal masks: longest) first, then over heads. */
static void keys_task(int64_t item, int worker, void *context) {
  const fa_job *job = context;
  const fa_problem *p = job->problem;
  const fa_backward_shared *shared = job->extra;
  fa_arena arena = fa_job_scratch(job, worker);
  keys_tiles t = carve(job, &arena);
  int64_t heads = (int64_t)p->batch * p->heads_k, bh = item % heads;
  int turn = (int)(item / heads), keys = t.count * FA_BLOCK_N, n0 = turn * keys, b = (int)(bh / p->heads_k),
      first = (int)(bh % p->heads_k) * p->group;
  atomic_int *done = shared->steps + bh * fa_ceil_div(p->seqlen_k, keys) + turn;
  fa_head head = fa_head_of(p, job->ops, b, first);
  start_keys(job, &head, &t, n0);
  for (int g = 0; g < p->group && n0 < head.seq.len_k; g++) {
    head = fa_head_of(p, job->ops, b, first + g);
    head_steps(job, &head, &t, n0, fa_min(n0 + keys, head.seq.len_k), turn > 0 ? done - 1 : NULL, done);
  }
  for (int i = 0; i < t.count; i++) {
    int n = n0 + i * FA_BLOCK_N, slot = fa_min(FA_BLOCK_N, head.seq.slot_k - n);
    if (slot <= 0) break;
    store_keys(&head, &p->grad.dk, t.dk[i], n, slot, p->dim_qk, p->score.scale);
    store_keys(&head, &p->grad.dv, t.dv[i], n, slot, p->dim_v, 1);
  }
}

int64_t fa_backward_keys_tasks(const fa_problem *p) {
  return (int64_t)p->batch * p->heads_k * fa_ceil_div(p->seqlen_k, key_tiles(p) * FA_BLOCK_N);
}

fa_code fa_cpu_backward_keys(fa_job *job, fa_error *error) {
  const fa_backward_shared *shared = job->extra;
  int64_t tasks = fa_backward_keys_tasks(job->problem);
  fa_arena count = {NULL, 0};
  carve(job, &count);
  for (int64_t i = 0; i < tasks; i++) atomic_init(shared->steps + i, 0);
  return fa_job_run(job, count.used, tasks, keys_task, error);
}
