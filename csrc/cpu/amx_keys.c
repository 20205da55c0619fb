/* amx_keys.c: the pass over keys of the AMX backward. A block of 128 keys stays; queries pass in blocks of up to 128. Per cell of
 * 64 keys x 32 queries, all transposed as in amx_forward.c:
 *
 *     S^T = K Q^T      dP^T = V dO^T      P^T = 2^(S^T * factor - lse)      dS^T = P^T * (dP^T - delta)
 *
 * and per block, summing over all its queries or keys at once:
 *
 *     dV += P^T dO     dK += dS^T Q       dQ^T += K^T dS^T
 *
 * in a pipeline: while vectors make one cell's P^T and dS^T (amx_gradient.h), the tile unit makes the products of the next cell and, share by
 * share, those of the previous block. */
#include "amx.h"
#ifdef FA_HAS_AMX
#include <math.h>
#include <string.h>

#include "../core/numeric.h"
#include "amx_backward.h"
#include "amx_gradient.h"

AMX_BEGIN

enum { KEY_STRIPS = FA_AMX_BLOCK_KEYS / STRIP, BLOCK_TILES = FA_AMX_BLOCK_KEYS / FA_BLOCK_N, CELLS = BLOCK_TILES * QUERY_STRIPS };

/* The weights of a block, and the sums they are to enter. */
typedef struct {
  uint16_t *p, *ds, *ds_pairs;        /* [key strip][query strip] twice, [query strip][key strip] */
  const uint16_t *q_rows, *dout_rows; /* of the first query strip */
  float *dq[QUERY_STRIPS];
  int dq_made[QUERY_STRIPS];
  int strips, done, total; /* query strips; products of 32 x 32 made and to be made */
} block_sums;

/* 64 keys x 32 queries. */
typedef struct {
  int tile, strip; /* in the block */
  int n0;
  int64_t at; /* the strip's place in fa_amx_backward_shared */
  query_lanes lanes;
} cell;

typedef struct {
  const fa_amx_backward_shared *shared;
  fa_head *head;
  int copy, score_terms, strips_qk, strips_v;
  int n0, tiles; /* of the block of keys */
  int k_finite[BLOCK_TILES];
  uint16_t *k_scores, *k_rows, *v_scores; /* FA_AMX_DIMS_LEFT, FA_AMX_ROWS_LEFT, FA_AMX_DIMS_LEFT */
  float *dk, *dv;                         /* [key][dims] */
  float *s[2], *dp[2];                    /* [64][32], of this cell and the next */
  float *rows, *softcap, *softcap_rows, *dropout;
  float *load_tile; /* [64][dim] */
  fa_amx_rows *packing;
  block_sums gathering, pending;
  cell cells[CELLS];
  int cell_count;
} keys_state;

static void carve(const fa_problem *p, keys_state *t, fa_arena *arena) {
  size_t parts = (size_t)fa_amx_parts(p->dtype), cell_bytes = BLOCK_FLOATS * sizeof(float);
  size_t weights = KEY_STRIPS * QUERY_STRIPS * STRIP_HALVES(parts) * sizeof(uint16_t);
  size_t qk_bytes = KEY_STRIPS * (size_t)fa_amx_halves(p->dim_qk, (int)parts) * sizeof(uint16_t);
  size_t v_bytes = KEY_STRIPS * (size_t)fa_amx_halves(p->dim_v, (int)parts) * sizeof(uint16_t);
  t->k_scores = fa_take(arena, qk_bytes);
  t->k_rows = fa_take(arena, qk_bytes);
  t->v_scores = fa_take(arena, v_bytes);
  t->dk = fa_take(arena, (size_t)FA_AMX_BLOCK_KEYS * (size_t)fa_amx_strips(p->dim_qk) * STRIP * sizeof(float));
  t->dv = fa_take(arena, (size_t)FA_AMX_BLOCK_KEYS * (size_t)fa_amx_strips(p->dim_v) * STRIP * sizeof(float));
  for (int i = 0; i < 2; i++) {
    block_sums *sums = i ? &t->pending : &t->gathering;
    t->s[i] = fa_take(arena, cell_bytes);
    t->dp[i] = fa_take(arena, cell_bytes);
    sums->p = fa_take(arena, weights);
    sums->ds = fa_take(arena, weights);
    sums->ds_pairs = fa_take(arena, weights);
  }
  t->rows = fa_take(arena, cell_bytes);
  t->softcap = fa_take(arena, p->score.softcap > 0 ? cell_bytes : 0);
  t->softcap_rows = fa_take(arena, p->score.softcap > 0 ? cell_bytes : 0);
  t->dropout = fa_take(arena, p->dropout.p > 0 ? cell_bytes : 0);
  t->load_tile = fa_take(arena, (size_t)FA_BLOCK_N * (size_t)fa_pad(fa_max(p->dim_qk, p->dim_v)) * sizeof(float));
  t->packing = fa_take(arena, sizeof(fa_amx_rows));
  if (p->score.softcap <= 0) t->softcap = NULL;
}

size_t fa_amx_keys_scratch(const fa_problem *p) {
  fa_arena arena = {NULL, 0};
  keys_state count;
  carve(p, &count, &arena);
  return arena.used;
}

AMX_INLINE void cell_products(const keys_state *t, const cell *c, float *s, float *dp, const int parts, const tick_fn tick, void *work,
                              const int density) {
  const int64_t step = STRIP_HALVES(parts), q = t->shared->q_halves, v = t->shared->v_halves;
  for (int i = 0; i < 2; i++) {
    product_32x32(t->k_scores + (c->tile * 2 + i) * q, step, t->shared->q_scores + c->at * q, step, t->strips_qk, parts,
                  s + i * STRIP * STRIP, STRIP, 0, tick, work, density);
    product_32x32(t->v_scores + (c->tile * 2 + i) * v, step, t->shared->dout_scores + c->at * v, step, t->strips_v, parts,
                  dp + i * STRIP * STRIP, STRIP, 0, tick, work, density);
  }
}

/* Product number `nth` of a block: first those of dV, then of dK, then of dQ. */
AMX_INLINE void block_product(const keys_state *t, const block_sums *b, int nth, const int parts, const tick_fn tick, void *work,
                              const int density) {
  const fa_problem *p = t->head->problem;
  const int64_t step = STRIP_HALVES(parts), q = t->shared->q_halves, v = t->shared->v_halves;
  const int key_strips = t->tiles * 2, of_dv = p->grad.dv.data ? key_strips * t->strips_v : 0;
  const int of_dk = p->grad.dk.data ? key_strips * t->strips_qk : 0;
  if (nth < of_dv) {
    int i = nth / t->strips_v, d = nth % t->strips_v;
    product_32x32(b->p + i * QUERY_STRIPS * step, step, b->dout_rows + d * step, v, b->strips, parts,
                  t->dv + (i * STRIP * t->strips_v + d) * STRIP, t->strips_v * STRIP, 1, tick, work, density);
  } else if ((nth -= of_dv) < of_dk) {
    int i = nth / t->strips_qk, d = nth % t->strips_qk;
    product_32x32(b->ds + i * QUERY_STRIPS * step, step, b->q_rows + d * step, q, b->strips, parts,
                  t->dk + (i * STRIP * t->strips_qk + d) * STRIP, t->strips_qk * STRIP, 1, tick, work, density);
  } else {
    nth -= of_dk;
    int j = nth / t->strips_qk, d = nth % t->strips_qk;
    product_32x32(t->k_rows + d * step, q, b->ds_pairs + j * KEY_STRIPS * step, step, key_strips, parts, b->dq[j] + d * STRIP * STRIP,
                  STRIP, b->dq_made[j], tick, work, density);
  }
}

/* Makes the pending products up to number `end`. */
AMX_INLINE void block_products(keys_state *t, int end, const int parts, const tick_fn tick, void *work, const int density) {
  for (; t->pending.done < end; t->pending.done++) block_product(t, &t->pending, t->pending.done, parts, tick, work, density);
}

/* Masks or completes a cell's scores, and sets up the work that makes its weights. */
AMX_INLINE void prepare_cell(keys_state *t, const cell *c, float *s, float *dp, gradient_work *w, const int parts) {
  const fa_strip_statistics *statistics = t->shared->statistics + c->at;
  const f32x16 zero = f32_splat(0);
  if (t->score_terms)
    score_block(t->head, &c->lanes, c->n0, s, t->rows, t->softcap, t->softcap_rows);
  else if (needs_mask(&c->lanes, c->n0))
    mask_block(&c->lanes, c->n0, s);
  const f32x16 shift_0 = f32_load(statistics->shift), shift_1 = f32_load(statistics->shift + 16);
  /* Scores may be as low as a float goes: lse comes off before log2 units would overflow. */
  for (float *at = s; at < s + BLOCK_FLOATS && t->score_terms; at += STRIP) {
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
    dropout_block(t->head, &c->lanes, c->n0, t->dropout, t->rows);
    w->dropout = t->dropout;
  }
  int64_t left = (int64_t)(c->tile * 2 * QUERY_STRIPS + c->strip) * STRIP_HALVES(parts);
  w->p = t->gathering.p + left;
  w->ds = t->gathering.ds + left;
  w->ds_pairs = t->gathering.ds_pairs + (int64_t)(c->strip * KEY_STRIPS + c->tile * 2) * STRIP_HALVES(parts);
  w->factor = f32_splat(t->shared->factor);
  w->left = FA_BLOCK_N / 2;
  w->row = 0;
}

/* A cell without visible pairs still takes part in the block's sums. */
static void clear_cell(keys_state *t, int tile, int strip) {
  int64_t step = STRIP_HALVES(t->shared->dtype_parts), left = (int64_t)(tile * 2 * QUERY_STRIPS + strip) * step;
  for (int i = 0; i < 2; i++) {
    memset(t->gathering.p + left + i * QUERY_STRIPS * step, 0, (size_t)step * sizeof(uint16_t));
    memset(t->gathering.ds + left + i * QUERY_STRIPS * step, 0, (size_t)step * sizeof(uint16_t));
  }
  memset(t->gathering.ds_pairs + (int64_t)(strip * KEY_STRIPS + tile * 2) * step, 0, (size_t)(2 * step) * sizeof(uint16_t));
}

/* sum[dim] += weight * row[dim], where weight 0 means that the pair does not exist. */
static void add_weighted(float *sum, int64_t step, float weight, const float *row, int dim) {
  for (int d = 0; d < dim && weight != 0; d++) sum[d * step] += weight * row[d];
}

/* The sums of a cell with a NaN or infinity in K, Q or dO, which must not leak through a weight of 0; then the cell leaves the block. */
static void add_cell_skipping_zeros(keys_state *t, const cell *c) {
  const fa_problem *p = t->head->problem;
  const int parts = t->shared->dtype_parts, columns = fa_min(FA_BLOCK_N, t->head->seq.len_k - c->n0);
  const int ld_qk = fa_pad(p->dim_qk), ld_v = fa_pad(p->dim_v), first = c->tile * FA_BLOCK_N;
  float weight[2][FA_BLOCK_N][STRIP];
  for (int j = 0; j < FA_BLOCK_N; j++)
    for (int i = 0; i < STRIP; i++)
      for (int which = 0; which < 2; which++) {
        const uint16_t *at = (which ? t->gathering.ds : t->gathering.p) + j % STRIP * 32 + i +
                             (int64_t)((c->tile * 2 + j / STRIP) * QUERY_STRIPS + c->strip) * STRIP_HALVES(parts);
        weight[which][j][i] = fa_from_bf16(at[0]) + (parts == 2 ? fa_from_bf16(at[2 * TILE_HALVES]) : 0);
      }
  fa_load_queries(t->head, &p->grad.dout, c->lanes.m0, c->lanes.rows, p->dim_v, t->load_tile);
  for (int j = 0; j < columns; j++)
    for (int i = 0; i < c->lanes.rows; i++)
      add_weighted(t->dv + (int64_t)(first + j) * t->strips_v * STRIP, 1, weight[0][j][i], t->load_tile + i * ld_v, p->dim_v);
  fa_load_queries(t->head, &p->q, c->lanes.m0, c->lanes.rows, p->dim_qk, t->load_tile);
  for (int j = 0; j < columns; j++)
    for (int i = 0; i < c->lanes.rows; i++)
      add_weighted(t->dk + (int64_t)(first + j) * t->strips_qk * STRIP, 1, weight[1][j][i], t->load_tile + i * ld_qk, p->dim_qk);
  if (p->grad.dq.data) {
    fa_load_keys(t->head, &p->k, c->n0, columns, p->dim_qk, t->load_tile);
    float *dq = t->gathering.dq[c->strip];
    if (!t->gathering.dq_made[c->strip]) memset(dq, 0, (size_t)t->strips_qk * STRIP * STRIP * sizeof(float));
    t->gathering.dq_made[c->strip] = 1;
    for (int j = 0; j < columns; j++)
      for (int i = 0; i < c->lanes.rows; i++) add_weighted(dq + i, STRIP, weight[1][j][i], t->load_tile + j * ld_qk, p->dim_qk);
  }
  clear_cell(t, c->tile, c->strip);
}

/* The visible cells of the block of keys and query rows [m0, m0 + 32 * strips); the others are cleared. */
static void list_cells(keys_state *t, int m0, int strips) {
  const fa_problem *p = t->head->problem;
  t->cell_count = 0;
  for (int tile = 0; tile < t->tiles; tile++) {
    int n0 = t->n0 + tile * FA_BLOCK_N, columns = fa_min(FA_BLOCK_N, t->head->seq.len_k - n0);
    fa_range rows = fa_visiting_rows(p->visibility.rule, t->head->seq.len_q, t->head->seq.len_k, n0, n0 + columns);
    for (int strip = 0; strip < strips; strip++) {
      int m = m0 + strip * STRIP;
      if (m >= rows.hi || m + STRIP <= rows.lo || !fa_tile_in_block_mask(t->head, m, n0)) {
        clear_cell(t, tile, strip);
        continue;
      }
      cell *c = &t->cells[t->cell_count++];
      c->tile = tile;
      c->strip = strip;
      c->n0 = n0;
      c->at = fa_strip_at(t->shared, t->head, m / STRIP);
      set_lanes(t->head, &c->lanes, m);
    }
  }
}

static void start_block(keys_state *t, int m0, int strips) {
  const fa_problem *p = t->head->problem;
  const fa_amx_backward_shared *shared = t->shared;
  int64_t at = fa_strip_at(shared, t->head, m0 / STRIP);
  block_sums *b = &t->gathering;
  b->q_rows = shared->q_rows + at * shared->q_halves;
  b->dout_rows = shared->dout_rows + at * shared->v_halves;
  b->strips = strips;
  b->done = 0;
  b->total = (p->grad.dv.data ? t->tiles * 2 * t->strips_v : 0) + (p->grad.dk.data ? t->tiles * 2 * t->strips_qk : 0);
  if (!p->grad.dq.data) return;
  b->total += strips * t->strips_qk;
  for (int j = 0; j < strips; j++) {
    int64_t place = t->copy * shared->strips + at + j;
    b->dq[j] = shared->dq + place * t->strips_qk * STRIP * STRIP;
    b->dq_made[j] = shared->dq_made[place];
    shared->dq_made[place] = 1;
  }
}

AMX_INLINE void run_block(keys_state *t, int m0, int strips, const int parts, const tick_fn tick, const int density) {
  list_cells(t, m0, strips);
  if (t->cell_count == 0) return;
  start_block(t, m0, strips);
  cell_products(t, &t->cells[0], t->s[0], t->dp[0], parts, no_tick, NULL, 0);
  for (int i = 0; i < t->cell_count; i++) {
    const cell *c = &t->cells[i];
    gradient_work w;
    prepare_cell(t, c, t->s[i % 2], t->dp[i % 2], &w, parts);
    if (i + 1 < t->cell_count) cell_products(t, c + 1, t->s[1 - i % 2], t->dp[1 - i % 2], parts, tick, &w, density);
    block_products(t, t->pending.total * (i + 1) / t->cell_count, parts, tick, &w, density);
    while (w.left > 0) tick(&w);
    if (!t->k_finite[c->tile] || !t->shared->finite[c->at]) add_cell_skipping_zeros(t, c);
  }
  block_sums finished = t->pending;
  t->pending = t->gathering;
  t->gathering = finished;
}

/* Vector work is 32 calls of tick a cell; tile products are 4 * (dims of Q and V) / 32 for scores and sums alike, times 3 for fp16. */
static void run_block_bf16(keys_state *t, int m0, int strips) { run_block(t, m0, strips, 1, gradient_tick_1, 1); }
static void run_block_bf16_narrow(keys_state *t, int m0, int strips) { run_block(t, m0, strips, 1, gradient_tick_1, 2); }
static void run_block_fp16(keys_state *t, int m0, int strips) { run_block(t, m0, strips, 2, gradient_tick_2, 1); }

static void finish_blocks(keys_state *t) {
  if (t->shared->dtype_parts == 2)
    block_products(t, t->pending.total, 2, no_tick, NULL, 0);
  else
    block_products(t, t->pending.total, 1, no_tick, NULL, 0);
  t->pending.total = t->pending.done = 0;
}

static void load_keys(keys_state *t) {
  const fa_problem *p = t->head->problem;
  const int64_t q = t->shared->q_halves, v = t->shared->v_halves;
  for (int block = 0; block < 2 * t->tiles; block++) {
    int n0 = t->n0 + block * STRIP, rows = t->head->seq.len_k - n0;
    fa_amx_take_keys(t->packing, t->head, &p->v, n0, rows, p->dim_v);
    fa_amx_put(t->packing, FA_AMX_DIMS_LEFT, t->v_scores + block * v);
    fa_amx_take_keys(t->packing, t->head, &p->k, n0, rows, p->dim_qk);
    fa_amx_put(t->packing, FA_AMX_DIMS_LEFT, t->k_scores + block * q);
    fa_amx_put(t->packing, FA_AMX_ROWS_LEFT, t->k_rows + block * q);
    int finite = fa_amx_finite(t->packing);
    t->k_finite[block / 2] = block % 2 ? t->k_finite[block / 2] && finite : finite;
  }
  /* Sums over a tile that is not finite are made apart (add_cell_skipping_zeros), and must find nothing here. */
  for (int tile = 0; tile < t->tiles; tile++)
    if (!t->k_finite[tile]) memset(t->k_rows + tile * 2 * q, 0, (size_t)(2 * q) * sizeof(uint16_t));
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
  int slot = fa_min(FA_AMX_BLOCK_KEYS, t->head->seq.slot_k - t->n0), columns = fa_min(slot, t->head->seq.len_k - t->n0);
  memset(t->dk, 0, (size_t)FA_AMX_BLOCK_KEYS * (size_t)t->strips_qk * STRIP * sizeof(float));
  memset(t->dv, 0, (size_t)FA_AMX_BLOCK_KEYS * (size_t)t->strips_v * STRIP * sizeof(float));
  if (columns > 0) {
    fa_range rows = fa_visiting_rows(p->visibility.rule, t->head->seq.len_q, t->head->seq.len_k, t->n0, t->n0 + columns);
    const int block = QUERY_STRIPS * STRIP, narrow = t->strips_qk + t->strips_v <= 2;
    t->tiles = fa_ceil_div(columns, FA_BLOCK_N);
    load_keys(t);
    tiles_begin();
    for (int g = 0; g < p->group; g++) {
      *t->head = fa_head_of(p, t->head->ops, t->head->b, t->head->h_k * p->group + g);
      for (int m0 = rows.lo / block * block; m0 < rows.hi; m0 += block) {
        int strips = fa_ceil_div(fa_min(block, t->head->seq.len_q - m0), STRIP);
        (t->shared->dtype_parts == 2 ? run_block_fp16 : narrow ? run_block_bf16_narrow : run_block_bf16)(t, m0, strips);
      }
    }
    finish_blocks(t);
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
