/* head.c: see head.h. */
#include "head.h"

#define LOG2_E 1.4426950408889634074

enum { SLICE_ROWS = 24 }; /* rows of a patch: blocks of gemm in every tier, few enough to follow a diagonal */

double fa_per_head_value(const fa_per_head *t, const fa_tile_ops *ops, int b, int h) {
  double as_f64 = 0;
  float as_f32 = 0;
  if (!t->data) return 0;
  const void *at = (const char *)t->data + (b * t->b + h * t->h) * fa_dtype_bytes(t->dtype);
  ops->load(ops->real_bytes == 8 ? (void *)&as_f64 : (void *)&as_f32, 1, at, t->dtype, 0, 1, 1, 1);
  return ops->real_bytes == 8 ? as_f64 : (double)as_f32;
}

fa_head fa_head_of(const fa_problem *problem, const fa_tile_ops *ops, int b, int h) {
  fa_head head = {.problem = problem, .ops = ops, .b = b, .h = h, .h_k = h / problem->group, .seq = fa_sequence_of(problem, b)};
  head.slope = fa_per_head_value(&problem->score.alibi, ops, b, h);
  head.plain = problem->score.scale > 0 && problem->score.softcap == 0 && !problem->score.alibi.data && !problem->score.bias.data &&
               !problem->visibility.mask.data; /* a mask gives bitwise what a bias of -inf gives */
  head.to_log2 = LOG2_E * (head.plain ? problem->score.scale : 1);
  if (problem->dropout.p > 0) {
    uint64_t seed = problem->dropout.seed, offset = problem->dropout.offset;
    if (problem->dropout.state) {
      seed = (uint64_t)problem->dropout.state[0];
      offset = (uint64_t)problem->dropout.state[problem->dropout.state_stride];
    }
    head.dropout_key = fa_dropout_key(seed, offset);
    head.dropout_threshold = fa_dropout_threshold(problem->dropout.p);
  }
  return head;
}

static void *element(const fa_view *view, fa_dtype dtype, int64_t b, int64_t h, int64_t row) {
  return (char *)view->data + (b * view->b + h * view->h + row * view->s) * fa_dtype_bytes(dtype);
}

void *fa_query_row(const fa_head *head, const fa_view *view, int row) {
  return element(view, head->problem->dtype, head->b, head->h, head->seq.q_start + row);
}

void *fa_key_row(const fa_head *head, const fa_view *view, int row) {
  return element(view, head->problem->dtype, head->b, head->h_k, head->seq.k_start + row);
}

static fa_dtype statistic_dtype(const fa_head *head) { return head->problem->dtype == FA_F64 ? FA_F64 : FA_F32; }

double fa_statistic(const fa_head *head, const fa_view *view, int row) {
  const void *at = element(view, statistic_dtype(head), head->b, head->h, head->seq.q_start + row);
  return statistic_dtype(head) == FA_F64 ? *(const double *)at : (double)*(const float *)at;
}

void fa_set_statistic(const fa_head *head, const fa_view *view, int row, double value) {
  if (!view->data) return;
  void *at = element(view, statistic_dtype(head), head->b, head->h, head->seq.q_start + row);
  if (statistic_dtype(head) == FA_F64)
    *(double *)at = value;
  else
    *(float *)at = (float)value;
}

void fa_load_query_rows(const fa_head *head, const fa_view *view, int start, int rows, int dim, void *tile, int ld) {
  head->ops->load(tile, ld, fa_query_row(head, view, start), head->problem->dtype, view->s, view->d, rows, dim);
}

void fa_load_key_rows(const fa_head *head, const fa_view *view, int start, int rows, int dim, void *tile, int ld) {
  head->ops->load(tile, ld, fa_key_row(head, view, start), head->problem->dtype, view->s, view->d, rows, dim);
}

static void ask_for_rows(const fa_head *head, const fa_view *view, const char *first, int rows, int dim) {
  int64_t element = fa_dtype_bytes(head->problem->dtype);
  for (int r = 0; r < rows && view->d == 1; r++)
    for (int64_t at = 0; at < dim * element; at += 64) __builtin_prefetch(first + r * view->s * element + at, 0, 2);
}

void fa_ask_for_queries(const fa_head *head, const fa_view *view, int start, int rows, int dim) {
  ask_for_rows(head, view, fa_query_row(head, view, start), fa_min(rows, head->seq.len_q - start), dim);
}

void fa_ask_for_keys(const fa_head *head, const fa_view *view, int start, int rows, int dim) {
  ask_for_rows(head, view, fa_key_row(head, view, start), fa_min(rows, head->seq.len_k - start), dim);
}

void fa_load_queries(const fa_head *head, const fa_view *view, int start, int rows, int dim, void *tile) {
  fa_load_query_rows(head, view, start, rows, dim, tile, fa_pad(dim));
}

void fa_load_keys(const fa_head *head, const fa_view *view, int start, int rows, int dim, void *tile) {
  fa_load_key_rows(head, view, start, rows, dim, tile, fa_pad(dim));
}

void fa_load_keys_transposed(const fa_head *head, const fa_view *view, int start, int rows, int dim, void *tile) {
  head->ops->load_transposed(tile, FA_BLOCK_LD, fa_key_row(head, view, start), head->problem->dtype, view->s, view->d, rows, dim);
}

fa_range fa_key_tiles(const fa_head *head, int m0, int rows) {
  fa_range r = fa_visited_keys(head->problem->visibility.rule, head->seq.len_q, head->seq.len_k, m0, m0 + rows);
  r.lo = r.lo / FA_BLOCK_N * FA_BLOCK_N;
  return r;
}

int fa_tile_in_block_mask(const fa_head *head, int m0, int n0) {
  const fa_grid *grid = &head->problem->visibility.block_mask;
  int size = head->problem->visibility.block_size;
  if (!size) return 1;
  return ((const uint8_t *)grid->data)[head->b * grid->b + head->h * grid->h + m0 / size * grid->m + n0 / size * grid->n] != 0;
}

static const void *grid_at(const fa_head *head, const fa_grid *grid, int m, int n) {
  if (!grid->data) return NULL;
  return (const char *)grid->data + (head->b * grid->b + head->h * grid->h + m * grid->m + n * grid->n) * fa_dtype_bytes(grid->dtype);
}

/* `count` columns of a tile's rows from key n0 on, of which `columns` are there; products have still to be multiplied by scale. */
static int score_rows(const fa_head *head, double scale, int m0, int rows, int n0, int columns, int count, int ld, void *s,
                      void *softcap_factor) {
  const fa_problem *p = head->problem;
  const fa_rule rule = p->visibility.rule;
  const fa_grid *bias = &p->score.bias, *mask = &p->visibility.mask;
  fa_score_row row = {.scale = scale, .softcap = p->score.softcap, .slope = head->slope};
  int partial = bias->data || mask->data;
  row.bias_dtype = bias->dtype;
  row.bias_stride = bias->n;
  row.mask_stride = mask->n;
  for (int r = 0; r < rows; r++) {
    int i = m0 + r;
    row.lo = fa_max(fa_row_lo(rule, head->seq.len_q, head->seq.len_k, i) - n0, 0);
    row.hi = fa_min(fa_row_hi(rule, head->seq.len_q, head->seq.len_k, i) - n0, columns);
    row.diagonal = fa_diagonal(head, i) - n0;
    row.bias = grid_at(head, bias, i, n0);
    row.mask = grid_at(head, mask, i, n0);
    partial |= row.lo > 0 || row.hi < columns;
    head->ops->score_row(&row, fa_at(head->ops, s, (int64_t)r * ld), count,
                         softcap_factor ? fa_at(head->ops, softcap_factor, (int64_t)r * ld) : NULL);
  }
  return partial;
}

int fa_score_tile(const fa_head *head, int m0, int rows, int n0, int columns, void *s, void *softcap_factor) {
  return score_rows(head, head->problem->score.scale, m0, rows, n0, columns, FA_BLOCK_N, FA_BLOCK_N, s, softcap_factor);
}

/* True when every pair of rows [m0, m0 + rows) and keys [n0, n0 + count) is visible by position. */
static int all_visible(const fa_head *head, int m0, int rows, int n0, int count) {
  fa_range keys = fa_unmasked_keys(head->problem->visibility.rule, head->seq.len_q, head->seq.len_k, m0, m0 + rows);
  return keys.lo <= n0 && keys.hi >= n0 + count;
}

int fa_next_patch(const fa_head *head, int m0, int rows, int n0, int columns, fa_patch *patch) {
  for (int row = patch->row + patch->rows, step; row < rows; row += step) {
    step = fa_min(FA_PATCH_ROWS, rows - row);
    *patch = (fa_patch){row, step, 0, fa_pad(columns)};
    if (all_visible(head, m0 + row, step, n0, columns)) return 1;
    step = patch->rows = fa_min(SLICE_ROWS, rows - row);
    fa_range keys = fa_visited_keys(head->problem->visibility.rule, head->seq.len_q, head->seq.len_k, m0 + row, m0 + row + step);
    patch->lo = fa_max(keys.lo - n0, 0) / FA_TILE_PAD * FA_TILE_PAD;
    patch->hi = fa_pad(fa_min(keys.hi - n0, columns));
    if (patch->lo < patch->hi) return 1;
  }
  return 0;
}

int fa_score_patch(const fa_head *head, int m0, int n0, int columns, const fa_patch *patch, void *s, void *softcap_factor) {
  int m = m0 + patch->row, n = n0 + patch->lo, count = patch->hi - patch->lo, there = columns - patch->lo;
  if (head->plain && count <= there && all_visible(head, m, patch->rows, n, count)) return 0;
  return score_rows(head, head->plain ? 1 : head->problem->score.scale, m, patch->rows, n, there, count, FA_BLOCK_LD, s, softcap_factor);
}

fa_dropout_row fa_dropout_of(const fa_head *head, int m, int n0) {
  return (fa_dropout_row){head->dropout_key, head->dropout_threshold, 1.0 / (1.0 - head->problem->dropout.p), head->b, head->h, m, n0};
}

int fa_block_m(const fa_problem *problem) {
  int size = problem->visibility.block_size, rows = problem->seqlen_q;
  if (rows <= 64 || (size && size % FA_MAX_BLOCK_M != 0)) return fa_max(fa_min(rows, 64), 1);
  return FA_MAX_BLOCK_M;
}
