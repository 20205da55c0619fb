/* head.c: see head.h. */
#include "head.h"

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

void fa_load_queries(const fa_head *head, const fa_view *view, int start, int rows, int dim, void *tile) {
  head->ops->load(tile, fa_pad(dim), fa_query_row(head, view, start), head->problem->dtype, view->s, view->d, rows, dim);
}

void fa_load_keys(const fa_head *head, const fa_view *view, int start, int rows, int dim, void *tile) {
  head->ops->load(tile, fa_pad(dim), fa_key_row(head, view, start), head->problem->dtype, view->s, view->d, rows, dim);
}

void fa_load_keys_transposed(const fa_head *head, const fa_view *view, int start, int rows, int dim, void *tile) {
  head->ops->load_transposed(tile, FA_BLOCK_N, fa_key_row(head, view, start), head->problem->dtype, view->s, view->d, rows, dim);
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

int fa_score_tile(const fa_head *head, int m0, int rows, int n0, int columns, void *s, void *softcap_factor) {
  const fa_problem *p = head->problem;
  const fa_rule rule = p->visibility.rule;
  const fa_grid *bias = &p->score.bias, *mask = &p->visibility.mask;
  fa_score_row row = {.scale = p->score.scale, .softcap = p->score.softcap, .slope = head->slope};
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
    head->ops->score_row(&row, fa_at(head->ops, s, (int64_t)r * FA_BLOCK_N), FA_BLOCK_N,
                         softcap_factor ? fa_at(head->ops, softcap_factor, (int64_t)r * FA_BLOCK_N) : NULL);
  }
  return partial;
}

fa_dropout_row fa_dropout_of(const fa_head *head, int m, int n0) {
  return (fa_dropout_row){head->dropout_key, head->dropout_threshold, 1.0 / (1.0 - head->problem->dropout.p), head->b, head->h, m, n0};
}

int fa_block_m(const fa_problem *problem) {
  int size = problem->visibility.block_size, rows = problem->seqlen_q;
  if (rows <= 64 || (size && size % FA_MAX_BLOCK_M != 0)) return fa_max(fa_min(rows, 64), 1);
  return FA_MAX_BLOCK_M;
}
