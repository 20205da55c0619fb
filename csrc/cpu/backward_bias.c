/* backward_bias.c: dbias, reduced over the dimensions that bias broadcasts. A task owns one tile of dbias and walks every
 * (batch, head, query tile, key tile) that adds to it, in order: no atomics, no second copy, bitwise stable. Costs two of the five
 * products of the main pass once more. */
#include <string.h>

#include "backward.h"

typedef struct {
  fa_gradient_tiles tiles;
  void *sum; /* [m][64]; one row or one column where bias broadcasts */
} bias_tiles;

static bias_tiles carve(const fa_job *job, fa_arena *arena) {
  bias_tiles t;
  t.tiles = fa_carve_gradient_tiles(job, arena);
  t.sum = fa_take(arena, (size_t)job->block_m * FA_BLOCK_N * (size_t)job->ops->real_bytes);
  return t;
}

/* ds[m][64] joins the sum: whole rows, all rows into the first, and each row's total into its first column. */
static void add_tile(const fa_job *job, const fa_grid *dbias, bias_tiles *t, int rows) {
  const fa_tile_ops *ops = job->ops;
  for (int r = 0; r < rows; r++) {
    void *ds = fa_at(ops, t->tiles.ds, (int64_t)r * FA_BLOCK_LD);
    if (dbias->columns == 1) {
      double total = ops->row_sum(ds, FA_BLOCK_N);
      ops->scale_row(ds, FA_BLOCK_N, 0);
      if (ops->real_bytes == 8)
        *(double *)ds = total;
      else
        *(float *)ds = (float)total;
    }
    ops->add_row(fa_at(ops, t->sum, dbias->rows == 1 ? 0 : (int64_t)r * FA_BLOCK_N), ds, FA_BLOCK_N);
  }
}

/* Adds one (batch, head)'s share of the dbias tile at query tile m0, keys [n0, n1). */
static void add_head(const fa_job *job, bias_tiles *t, const fa_head *head, int m0, int n0, int n1) {
  int rows = fa_min(job->block_m, head->seq.len_q - m0);
  if (rows <= 0) return;
  fa_range keys = fa_key_tiles(head, m0, rows);
  int loaded = 0;
  for (int n = fa_max(n0, keys.lo); n < fa_min(n1, keys.hi); n += FA_BLOCK_N) {
    if (!fa_tile_in_block_mask(head, m0, n)) continue;
    int columns = fa_min(FA_BLOCK_N, head->seq.len_k - n);
    if (!loaded) fa_load_query_side(head, &t->tiles, m0, rows);
    loaded = 1;
    fa_load_key_side(head, &t->tiles, n, columns);
    fa_gradient_tile(head, &t->tiles, fa_delta_of(job->extra, head, m0), m0, rows, n, columns);
    add_tile(job, &job->problem->grad.dbias, t, rows);
  }
}

static void bias_task(int64_t item, int worker, void *context) {
  const fa_job *job = context;
  const fa_problem *p = job->problem;
  const fa_grid *g = &p->grad.dbias;
  fa_arena arena = fa_job_scratch(job, worker);
  bias_tiles t = carve(job, &arena);
  int tiles_n = fa_ceil_div(g->columns, FA_BLOCK_N), tiles_m = g->rows == 1 ? 1 : job->tiles_m;
  int n0 = (int)(item % tiles_n) * FA_BLOCK_N, n1 = g->columns == 1 ? p->seqlen_k : n0 + FA_BLOCK_N;
  int m0 = (int)(item / tiles_n % tiles_m) * job->block_m, m1 = g->rows == 1 ? p->seqlen_q : m0 + 1;
  int64_t bh = item / tiles_n / tiles_m;
  int b0 = (int)(bh / g->heads), h0 = (int)(bh % g->heads);
  memset(t.sum, 0, (size_t)job->block_m * FA_BLOCK_N * (size_t)job->ops->real_bytes);
  for (int b = b0; b < (g->batch == 1 ? p->batch : b0 + 1); b++)
    for (int h = h0; h < (g->heads == 1 ? p->heads_q : h0 + 1); h++) {
      fa_head head = fa_head_of(p, job->ops, b, h);
      for (int m = m0; m < m1; m += job->block_m) add_head(job, &t, &head, m, n0, n1);
    }
  char *at = (char *)g->data + (b0 * g->b + h0 * g->h + m0 * g->m + n0 * g->n) * fa_dtype_bytes(g->dtype);
  job->ops->store(at, g->dtype, g->m, g->n, t.sum, FA_BLOCK_N, fa_min(job->block_m, g->rows - m0), fa_min(FA_BLOCK_N, g->columns - n0),
                  NULL);
}

fa_code fa_cpu_bias_gradient(fa_job *job, fa_error *error) {
  const fa_grid *g = &job->problem->grad.dbias;
  fa_arena count = {NULL, 0};
  carve(job, &count);
  int64_t tiles = (int64_t)(g->rows == 1 ? 1 : job->tiles_m) * fa_ceil_div(g->columns, FA_BLOCK_N);
  return fa_job_run(job, count.used, tiles * g->batch * g->heads, bias_task, error);
}
