/* amx_keys.c: the pass over keys of the AMX backward. A block of keys stays while the queries pass in blocks of up to 256. Per cell of
 * 32 keys x 32 queries, all transposed as in amx_forward.c:
 *
 *     S^T = K Q^T      dP^T = V dO^T      P^T = 2^(S^T * factor - lse)      dS^T = P^T * (dP^T - delta)
 *
 * in a pipeline: while vectors make one cell's P^T and dS^T (amx_gradient.h), the tile unit makes the products of the next. Then, per block
 * of queries, summing over all its queries or keys at once, so that the sums are read and written once for each:
 *
 *     dV += P^T dO     dK += dS^T Q       dQ^T += K^T dS^T
 *
 * Cells are small so that what they touch stays in L1; the blocks' weights, operands and sums stay in L2. */
#include "amx.h"
#ifdef FA_HAS_AMX
#include <math.h>
#include <string.h>

#include "../core/numeric.h"
#include "amx_backward.h"
#include "amx_gradient.h"

AMX_BEGIN

enum { KEY_STRIPS = FA_AMX_BLOCK_KEYS / STRIP, QUERY_STRIPS = 8, CELL_FLOATS = STRIP * STRIP };

/* 32 query rows of the block. */
typedef struct {
  int64_t at; /* the place in fa_amx_backward_shared */
  float *dq;
  int dq_made;
  query_lanes lanes;
} query_strip;

/* 32 keys x 32 queries of the block, some of them visible. */
typedef struct {
  int key, query; /* strips */
} cell;

typedef struct {
  const fa_amx_backward_shared *shared;
  fa_head *head;
  int copy, score_terms, strips_qk, strips_v;
  int n0, key_strips, query_strips; /* of the block */
  int k_finite[KEY_STRIPS];
  uint16_t *k_scores, *k_rows, *v_scores; /* FA_AMX_DIMS_LEFT, FA_AMX_ROWS_LEFT, FA_AMX_DIMS_LEFT */
  float *dk, *dv;                         /* [key][dims] */
  float *s[2], *dp[2];                    /* [32][32], of this cell and the next */
  float *rows, *softcap, *softcap_rows, *dropout;
  float *load_tile; /* [32][dim] */
  fa_amx_rows *packing;
  uint16_t *p, *ds, *ds_pairs;                      /* weights: [key strip][query strip] twice, [query strip][key strip] */
  fa_range queries[KEY_STRIPS], keys[QUERY_STRIPS]; /* strips that a strip of keys, of queries has weights with */
  query_strip strips[QUERY_STRIPS];
  cell cells[KEY_STRIPS * QUERY_STRIPS];
  int cell_count;
} keys_state;

static void carve(const fa_problem *p, keys_state *t, fa_arena *arena) {
  size_t parts = (size_t)fa_amx_parts(p->dtype), cell_bytes = CELL_FLOATS * sizeof(float);
  size_t weights = KEY_STRIPS * QUERY_STRIPS * STRIP_HALVES(parts) * sizeof(uint16_t);
  size_t qk_bytes = KEY_STRIPS * (size_t)fa_amx_halves(p->dim_qk, (int)parts) * sizeof(uint16_t);
  size_t v_bytes = KEY_STRIPS * (size_t)fa_amx_halves(p->dim_v, (int)parts) * sizeof(uint16_t);
  t->k_scores = fa_take(arena, qk_bytes);
  t->k_rows = fa_take(arena, qk_bytes);
  t->v_scores = fa_take(arena, v_bytes);
  t->dk = fa_take(arena, (size_t)FA_AMX_BLOCK_KEYS * (size_t)fa_amx_strips(p->dim_qk) * STRIP * sizeof(float));
  t->dv = fa_take(arena, (size_t)FA_AMX_BLOCK_KEYS * (size_t)fa_amx_strips(p->dim_v) * STRIP * sizeof(float));
  for (int i = 0; i < 2; i++) {
    t->s[i] = fa_take(arena, cell_bytes);
    t->dp[i] = fa_take(arena, cell_bytes);
  }
  t->p = fa_take(arena, weights);
  t->ds = fa_take(arena, weights);
  t->ds_pairs = fa_take(arena, weights);
  t->rows = fa_take(arena, BLOCK_FLOATS * sizeof(float));
  t->softcap = fa_take(arena, p->score.softcap > 0 ? cell_bytes : 0);
  t->softcap_rows = fa_take(arena, p->score.softcap > 0 ? BLOCK_FLOATS * sizeof(float) : 0);
  t->dropout = fa_take(arena, p->dropout.p > 0 ? cell_bytes : 0);
  t->load_tile = fa_take(arena, (size_t)STRIP * (size_t)fa_pad(fa_max(p->dim_qk, p->dim_v)) * sizeof(float));
  t->packing = fa_take(arena, sizeof(fa_amx_rows));
  if (p->score.softcap <= 0) t->softcap = NULL;
}

size_t fa_amx_keys_scratch(const fa_problem *p) {
  fa_arena arena = {NULL, 0};
  keys_state count;
  carve(p, &count, &arena);
  return arena.used;
}

/* Where a cell's weights lie in p and ds, and in ds_pairs. */
static int64_t weights_at(const keys_state *t, int key, int query) {
  return (int64_t)(key * QUERY_STRIPS + query) * STRIP_HALVES(t->shared->dtype_parts);
}
static int64_t pairs_at(const keys_state *t, int key, int query) {
  return (int64_t)(query * KEY_STRIPS + key) * STRIP_HALVES(t->shared->dtype_parts);
}

AMX_INLINE void cell_products(const keys_state *t, const cell *c, float *s, float *dp, const int parts, const tick_fn tick, void *work,
                              const int density) {
  const int64_t step = STRIP_HALVES(parts), q = t->shared->q_halves, v = t->shared->v_halves, at = t->strips[c->query].at;
  product_32x32(t->k_scores + c->key * q, step, t->shared->q_scores + at * q, step, t->strips_qk, parts, s, STRIP, 0, tick, work, density);
  product_32x32(t->v_scores + c->key * v, step, t->shared->dout_scores + at * v, step, t->strips_v, parts, dp, STRIP, 0, tick, work,
                density);
}

/* sums[key][dims] += weights^T rows: dV of P and dO, dK of dS and Q. */
AMX_INLINE void sum_over_queries(const keys_state *t, const uint16_t *weights, const uint16_t *rows, int strips, float *sums,
                                 const int parts) {
  const int64_t step = STRIP_HALVES(parts), row_halves = strips * step;
  for (int d = 0; d < strips; d++)
    for (int i = 0; i < t->key_strips; i++) {
      const fa_range over = t->queries[i];
      if (over.lo == over.hi) continue;
      product_32x32(weights + weights_at(t, i, over.lo), step, rows + over.lo * row_halves + d * step, row_halves, over.hi - over.lo, parts,
                    sums + (i * STRIP * strips + d) * STRIP, strips * STRIP, 1, no_tick, NULL, 0);
    }
}

/* dQ^T[dims][32] += K^T dS^T */
AMX_INLINE void sum_over_keys(const keys_state *t, const int parts) {
  const int64_t step = STRIP_HALVES(parts), q = t->shared->q_halves;
  for (int d = 0; d < t->strips_qk; d++)
    for (int j = 0; j < t->query_strips; j++) {
      const fa_range over = t->keys[j];
      if (over.lo == over.hi) continue;
      product_32x32(t->k_rows + over.lo * q + d * step, q, t->ds_pairs + pairs_at(t, over.lo, j), step, over.hi - over.lo, parts,
                    t->strips[j].dq + d * STRIP * STRIP, STRIP, t->strips[j].dq_made, no_tick, NULL, 0);
    }
}

AMX_INLINE void block_sums(const keys_state *t, const int parts) {
  const fa_problem *p = t->head->problem;
  const fa_amx_backward_shared *shared = t->shared;
  const int64_t at = t->strips[0].at;
  if (p->grad.dv.data) sum_over_queries(t, t->p, shared->dout_rows + at * shared->v_halves, t->strips_v, t->dv, parts);
  if (p->grad.dk.data) sum_over_queries(t, t->ds, shared->q_rows + at * shared->q_halves, t->strips_qk, t->dk, parts);
  if (p->grad.dq.data) sum_over_keys(t, parts);
}

/* Masks or completes a cell's scores, and sets up the work that makes its weights. */
AMX_INLINE void prepare_cell(keys_state *t, const cell *c, float *s, float *dp, gradient_work *w) {
  const query_strip *strip = &t->strips[c->query];
  const fa_strip_statistics *statistics = t->shared->statistics + strip->at;
  const f32x16 zero = f32_splat(0);
  const int n0 = t->n0 + c->key * STRIP;
  if (t->score_terms)
    score_block(t->head, &strip->lanes, n0, STRIP, s, t->rows, t->softcap, t->softcap_rows);
  else if (needs_mask(&strip->lanes, n0, STRIP))
    mask_block(&strip->lanes, n0, STRIP, s);
  const f32x16 shift_0 = f32_load(statistics->shift), shift_1 = f32_load(statistics->shift + 16);
  /* Scores may be as low as a float goes: lse comes off before log2 units would overflow. */
  for (float *at = s; at < s + CELL_FLOATS && t->score_terms; at += STRIP) {
    f32_store(at, f32_sub(f32_load(at), shift_0));
    f32_store(at + 16, f32_sub(f32_load(at + 16), shift_1));
  }
  w->shift_0 = t->score_terms ? zero : f32_sub(zero, shift_0);
  w->shift_1 = t->score_terms ? zero : f32_sub(zero, shift_1);
  w->delta_0 = f32_load(statistics->delta);
  w->delta_1 = f32_load(statistics->delta + 16);
  w->s = s;
  w->dp = dp;
  w->softcap = t->softcap;
  w->dropout = NULL;
  if (t->head->problem->dropout.p > 0) {
    dropout_block(t->head, &strip->lanes, n0, STRIP, t->dropout, t->rows);
    w->dropout = t->dropout;
  }
  w->p = t->p + weights_at(t, c->key, c->query);
  w->ds = t->ds + weights_at(t, c->key, c->query);
  w->ds_pairs = t->ds_pairs + pairs_at(t, c->key, c->query);
  w->factor = f32_splat(t->shared->factor);
  w->left = STRIP / 2;
}

/* A cell without weights may still lie among those that a product sums over. */
static void clear_weights(keys_state *t, const cell *c) {
  const size_t bytes = STRIP_HALVES((size_t)t->shared->dtype_parts) * sizeof(uint16_t);
  memset(t->p + weights_at(t, c->key, c->query), 0, bytes);
  memset(t->ds + weights_at(t, c->key, c->query), 0, bytes);
  memset(t->ds_pairs + pairs_at(t, c->key, c->query), 0, bytes);
}

/* sum[dim] += weight * row[dim], where weight 0 means that the pair does not exist. */
static void add_weighted(float *sum, int64_t step, float weight, const float *row, int dim) {
  for (int d = 0; d < dim && weight != 0; d++) sum[d * step] += weight * row[d];
}

/* weight[key][query] of a cell. */
static void read_weights(const keys_state *t, const cell *c, const uint16_t *weights, float weight[STRIP][STRIP]) {
  const uint16_t *at = weights + weights_at(t, c->key, c->query);
  for (int j = 0; j < STRIP; j++)
    for (int i = 0; i < STRIP; i++, at++)
      weight[j][i] = fa_from_bf16(at[0]) + (t->shared->dtype_parts == 2 ? fa_from_bf16(at[2 * TILE_HALVES]) : 0);
}

/* The sums of a cell with a NaN or infinity in K, Q or dO, which must not leak through a weight of 0; then the cell leaves the block. */
static void add_cell_skipping_zeros(keys_state *t, const cell *c) {
  const fa_problem *p = t->head->problem;
  query_strip *strip = &t->strips[c->query];
  const int first = c->key * STRIP, n0 = t->n0 + first, columns = fa_min(STRIP, t->head->seq.len_k - n0);
  const int ld_qk = fa_pad(p->dim_qk), ld_v = fa_pad(p->dim_v), m0 = strip->lanes.m0, rows = strip->lanes.rows;
  float weight[STRIP][STRIP], gradient[STRIP][STRIP];
  read_weights(t, c, t->p, weight);
  read_weights(t, c, t->ds, gradient);
  fa_load_queries(t->head, &p->grad.dout, m0, rows, p->dim_v, t->load_tile);
  for (int j = 0; j < columns; j++)
    for (int i = 0; i < rows; i++)
      add_weighted(t->dv + (int64_t)(first + j) * t->strips_v * STRIP, 1, weight[j][i], t->load_tile + i * ld_v, p->dim_v);
  fa_load_queries(t->head, &p->q, m0, rows, p->dim_qk, t->load_tile);
  for (int j = 0; j < columns; j++)
    for (int i = 0; i < rows; i++)
      add_weighted(t->dk + (int64_t)(first + j) * t->strips_qk * STRIP, 1, gradient[j][i], t->load_tile + i * ld_qk, p->dim_qk);
  if (p->grad.dq.data) {
    fa_load_keys(t->head, &p->k, n0, columns, p->dim_qk, t->load_tile);
    if (!strip->dq_made) memset(strip->dq, 0, (size_t)t->strips_qk * CELL_FLOATS * sizeof(float));
    strip->dq_made = 1;
    for (int j = 0; j < columns; j++)
      for (int i = 0; i < rows; i++) add_weighted(strip->dq + i, STRIP, gradient[j][i], t->load_tile + j * ld_qk, p->dim_qk);
  }
  clear_weights(t, c);
}

static void widen(fa_range *range, int to) {
  *range = range->hi == 0 ? (fa_range){to, to + 1} : (fa_range){fa_min(range->lo, to), fa_max(range->hi, to + 1)};
}

/* The cells of the block that hold a visible pair; the others have no weights. */
static void list_cells(keys_state *t) {
  const fa_sequence seq = t->head->seq;
  t->cell_count = 0;
  memset(t->queries, 0, sizeof t->queries);
  memset(t->keys, 0, sizeof t->keys);
  for (int key = 0; key < t->key_strips; key++) {
    const int n = t->n0 + key * STRIP;
    const fa_range rows = fa_visiting_rows(t->head->problem->visibility.rule, seq.len_q, seq.len_k, n, fa_min(n + STRIP, seq.len_k));
    for (int query = 0; query < t->query_strips; query++) {
      const int m = t->strips[query].lanes.m0;
      cell *c = &t->cells[t->cell_count];
      *c = (cell){key, query};
      if (m >= rows.hi || m + STRIP <= rows.lo || !fa_tile_in_block_mask(t->head, m, n)) {
        clear_weights(t, c);
        continue;
      }
      t->cell_count++;
      widen(&t->queries[key], query);
      widen(&t->keys[query], key);
    }
  }
}

/* Query rows [m0, end). */
static void start_block(keys_state *t, int m0, int end) {
  const fa_amx_backward_shared *shared = t->shared;
  t->query_strips = fa_ceil_div(end - m0, STRIP);
  for (int j = 0; j < t->query_strips; j++) {
    t->strips[j].at = fa_strip_at(shared, t->head, m0 / STRIP + j);
    set_lanes(t->head, &t->strips[j].lanes, m0 + j * STRIP);
  }
  list_cells(t);
  for (int j = 0; j < t->query_strips && t->head->problem->grad.dq.data; j++) {
    if (t->keys[j].hi == 0) continue;
    int64_t place = t->copy * shared->strips + t->strips[j].at;
    t->strips[j].dq = shared->dq + place * t->strips_qk * CELL_FLOATS;
    t->strips[j].dq_made = shared->dq_made[place];
    shared->dq_made[place] = 1;
  }
}

AMX_INLINE void run_block(keys_state *t, const int parts, const tick_fn tick, const int density) {
  if (t->cell_count == 0) return;
  cell_products(t, &t->cells[0], t->s[0], t->dp[0], parts, no_tick, NULL, 0);
  for (int i = 0; i < t->cell_count; i++) {
    const cell *c = &t->cells[i];
    gradient_work w;
    prepare_cell(t, c, t->s[i % 2], t->dp[i % 2], &w);
    if (i + 1 < t->cell_count) cell_products(t, c + 1, t->s[1 - i % 2], t->dp[1 - i % 2], parts, tick, &w, density);
    while (w.left > 0) tick(&w);
    if (!t->k_finite[c->key] || !t->shared->finite[t->strips[c->query].at]) add_cell_skipping_zeros(t, c);
  }
  block_sums(t, parts);
}

/* Vector work is 16 calls of tick a cell; tile products are 4 a strip of dims, times 3 for fp16. */
static void run_block_bf16(keys_state *t) { run_block(t, 1, gradient_tick_1, 1); }
static void run_block_bf16_narrow(keys_state *t) { run_block(t, 1, gradient_tick_1, 2); }
static void run_block_fp16(keys_state *t) { run_block(t, 2, gradient_tick_2, 1); }

static void load_keys(keys_state *t) {
  const fa_problem *p = t->head->problem;
  const int64_t q = t->shared->q_halves, v = t->shared->v_halves;
  for (int key = 0; key < t->key_strips; key++) {
    int n0 = t->n0 + key * STRIP, rows = t->head->seq.len_k - n0;
    fa_amx_take_keys(t->packing, t->head, &p->v, n0, rows, p->dim_v);
    fa_amx_put(t->packing, FA_AMX_DIMS_LEFT, t->v_scores + key * v);
    fa_amx_take_keys(t->packing, t->head, &p->k, n0, rows, p->dim_qk);
    fa_amx_put(t->packing, FA_AMX_DIMS_LEFT, t->k_scores + key * q);
    fa_amx_put(t->packing, FA_AMX_ROWS_LEFT, t->k_rows + key * q);
    t->k_finite[key] = fa_amx_finite(t->packing);
    /* Sums over keys that are not finite are made apart (add_cell_skipping_zeros), and must find nothing here. */
    if (!t->k_finite[key]) memset(t->k_rows + key * q, 0, (size_t)q * sizeof(uint16_t));
  }
}

static void store_keys(const keys_state *t, const fa_view *view, const float *sums, int rows, int dim, double scale) {
  double factors[FA_AMX_BLOCK_KEYS];
  if (!view->data) return;
  for (int i = 0; i < rows; i++) factors[i] = scale;
  t->head->ops->store(fa_key_row(t->head, view, t->n0), t->head->problem->dtype, view->s, view->d, sums, fa_amx_strips(dim) * STRIP, rows,
                      dim, factors);
}

/* One block of keys: all query heads of its group, all query blocks that see it. */
static void block_of_keys(keys_state *t) {
  const fa_problem *p = t->head->problem;
  const int slot = fa_min(FA_AMX_BLOCK_KEYS, t->head->seq.slot_k - t->n0), columns = fa_min(slot, t->head->seq.len_k - t->n0);
  memset(t->dk, 0, (size_t)fa_ceil_div(slot, STRIP) * (size_t)t->strips_qk * CELL_FLOATS * sizeof(float));
  memset(t->dv, 0, (size_t)fa_ceil_div(slot, STRIP) * (size_t)t->strips_v * CELL_FLOATS * sizeof(float));
  if (columns > 0) {
    const fa_range rows = fa_visiting_rows(p->visibility.rule, t->head->seq.len_q, t->head->seq.len_k, t->n0, t->n0 + columns);
    const int block = QUERY_STRIPS * STRIP, narrow = t->strips_qk + t->strips_v <= 4;
    t->key_strips = fa_ceil_div(columns, STRIP);
    load_keys(t);
    tiles_begin();
    for (int g = 0; g < p->group; g++) {
      *t->head = fa_head_of(p, t->head->ops, t->head->b, t->head->h_k * p->group + g);
      for (int m0 = rows.lo / STRIP * STRIP; m0 < rows.hi; m0 += block) {
        start_block(t, m0, fa_min(m0 + block, t->head->seq.len_q));
        (t->shared->dtype_parts == 2 ? run_block_fp16 : narrow ? run_block_bf16_narrow : run_block_bf16)(t);
      }
    }
    tiles_end();
  }
  store_keys(t, &p->grad.dk, t->dk, slot, p->dim_qk, p->score.scale);
  store_keys(t, &p->grad.dv, t->dv, slot, p->dim_v, 1);
}

void fa_amx_keys_of_head(const fa_amx_backward_shared *shared, fa_head head, int copy, fa_arena arena) {
  const fa_problem *p = head.problem;
  keys_state t = {.shared = shared, .head = &head, .copy = copy, .score_terms = has_score_terms(p)};
  t.strips_qk = fa_amx_strips(p->dim_qk);
  t.strips_v = fa_amx_strips(p->dim_v);
  carve(p, &t, &arena);
  for (t.n0 = copy * FA_AMX_BLOCK_KEYS; t.n0 < head.seq.slot_k; t.n0 += shared->copies * FA_AMX_BLOCK_KEYS) block_of_keys(&t);
}

AMX_END
#endif
