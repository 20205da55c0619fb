/* probs.c: exp(score - row max) of every pair, for those who ask for it (return_attn_probs). The only quadratic output there is; the sign
 * bit marks a dropped pair, and everything invisible or beyond the sequences is 0. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "engine.h"
#include "job.h"

typedef struct {
  void *q, *kt, *s, *multiplier;
  double *m;
} probs_tiles;

static probs_tiles carve(const fa_problem *p, const fa_tile_ops *ops, int block_m, fa_arena *arena) {
  size_t real = (size_t)ops->real_bytes, rows = (size_t)block_m;
  probs_tiles t;
  t.q = fa_take(arena, rows * (size_t)fa_pad(p->dim_qk) * real);
  t.kt = fa_take(arena, (size_t)p->dim_qk * FA_BLOCK_LD * real);
  t.s = fa_take(arena, rows * FA_BLOCK_LD * real);
  t.multiplier = fa_take(arena, FA_BLOCK_N * real);
  t.m = fa_take(arena, rows * sizeof(double));
  return t;
}

static void score_tile(const fa_head *head, probs_tiles *t, int m0, int rows, int n0, int columns) {
  const fa_problem *p = head->problem;
  fa_load_keys_transposed(head, &p->k, n0, columns, p->dim_qk, t->kt);
  head->ops->gemm(rows, FA_BLOCK_N, p->dim_qk, t->q, fa_pad(p->dim_qk), 1, t->kt, FA_BLOCK_LD, t->s, FA_BLOCK_LD, 0);
  fa_score_patch(head, m0, n0, columns, &(fa_patch){0, rows, 0, FA_BLOCK_N}, t->s, NULL);
}

static void *probs_at(const fa_head *head, int64_t m, int64_t n) {
  const fa_view *v = &head->problem->probs;
  return (char *)v->data + (head->b * v->b + head->h * v->h + m * v->s + n * v->d) * fa_dtype_bytes(head->problem->dtype);
}

static void write_row(const fa_head *head, probs_tiles *t, int r, int m0, int n0, int columns) {
  const fa_tile_ops *ops = head->ops;
  const fa_problem *p = head->problem;
  void *s = fa_at(ops, t->s, (int64_t)r * FA_BLOCK_LD);
  double shift = t->m[r] == -INFINITY ? INFINITY : t->m[r] * head->to_log2;
  ops->weights_tile(1, FA_BLOCK_N, s, head->to_log2, &shift, NULL);
  if (p->dropout.p > 0) {
    fa_dropout_row row = fa_dropout_of(head, m0 + r, n0);
    ops->dropout_row(&row, t->multiplier, FA_BLOCK_N);
    ops->signs_row(s, t->multiplier, FA_BLOCK_N);
  }
  ops->store(probs_at(head, m0 + r, n0), p->dtype, 0, p->probs.d, s, 0, 1, columns, NULL);
}

static void probs_task(int64_t item, int worker, void *context) {
  const fa_job *job = context;
  const fa_problem *p = job->problem;
  fa_arena arena = fa_job_scratch(job, worker);
  probs_tiles t = carve(p, job->ops, job->block_m, &arena);
  int64_t bh = item / job->tiles_m;
  int m0 = (int)(item % job->tiles_m) * job->block_m;
  fa_head head = fa_head_of(p, job->ops, (int)(bh / p->heads_q), (int)(bh % p->heads_q));
  int rows = fa_min(job->block_m, head.seq.len_q - m0);
  if (rows <= 0) return;
  fa_range keys = fa_key_tiles(&head, m0, rows);
  fa_load_queries(&head, &p->q, m0, rows, p->dim_qk, t.q);
  for (int r = 0; r < rows; r++) t.m[r] = -INFINITY;
  for (int pass = 0; pass < 2; pass++)
    for (int n0 = keys.lo; n0 < keys.hi; n0 += FA_BLOCK_N) {
      int columns = fa_min(FA_BLOCK_N, head.seq.len_k - n0);
      if (!fa_tile_in_block_mask(&head, m0, n0)) continue;
      score_tile(&head, &t, m0, rows, n0, columns);
      for (int r = 0; r < rows; r++) {
        if (pass == 0)
          t.m[r] = fmax(t.m[r], job->ops->row_max(fa_at(job->ops, t.s, (int64_t)r * FA_BLOCK_LD), FA_BLOCK_N));
        else
          write_row(&head, &t, r, m0, n0, columns);
      }
    }
}

static void clear(const fa_problem *p) {
  int64_t rows = (p->seqlen_q + 127ll) / 128 * 128, columns = (p->seqlen_k + 127ll) / 128 * 128;
  size_t bytes = (size_t)fa_dtype_bytes(p->dtype);
  for (int64_t bh = 0; bh < (int64_t)p->batch * p->heads_q; bh++)
    for (int64_t m = 0; m < rows; m++) {
      char *row = (char *)p->probs.data + (bh / p->heads_q * p->probs.b + bh % p->heads_q * p->probs.h + m * p->probs.s) * (int64_t)bytes;
      for (int64_t n = 0; n < columns; n++) memset(row + n * p->probs.d * (int64_t)bytes, 0, bytes);
    }
}

fa_code fa_cpu_probs(const fa_problem *p, fa_error *error) {
  fa_job job;
  fa_code code = fa_job_init(&job, p, error);
  if (code != FA_OK) return code;
  fa_arena count = {NULL, 0};
  carve(p, job.ops, job.block_m, &count);
  clear(p);
  return fa_job_run(&job, count.used, (int64_t)p->batch * p->heads_q * job.tiles_m, probs_task, error);
}
