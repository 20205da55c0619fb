/* amx_queries.c: the pass over queries of the AMX forward: the paper's Algorithm 1, transposed, so that the softmax works on whole vectors
 * (amx_lanes.h). A task takes some strips of 32 query rows of one head and, panel of keys by panel, for each strip and tile of 64 keys:
 *
 *     S^T[64][32] = K Q^T        P^T = 2^(S^T * factor - shift), rounded to bf16        O^T[dim_v][32] += V^T P^T
 *
 * in a pipeline: while vectors turn tile n into P^T, the tile unit makes the products S^T of tile n + 1 and, for up to 256 earlier keys at a
 * time, O^T: long sums, because O^T is read and written once for each.
 *
 * shift is the row's maximum when it was last looked at: only a maximum larger by 2^8 makes it move, so that O^T is hardly ever rescaled.
 * A strip's tiles come in one order whatever strips share its task: results do not depend on threads. */
#include "amx.h"
#ifdef FA_HAS_AMX
#include <math.h>
#include <string.h>

#include "../core/numeric.h"
#include "amx_forward.h"
#include "amx_softmax.h"
#include "padding.h"

AMX_BEGIN

enum {
  PANEL_KEYS = 512, /* keys that a task's strips visit one after the other: K and V of a panel stay in L2 */
  PENDING_TILES = 4 /* most tiles of 64 keys that one product with V sums over */
};

static const float LOG2_E = 1.44269504f;
static const double LN_2 = 0.69314718055994530942;
static const float LAZY_LOG2 = 8; /* P may grow to 2^8 before shift moves */

/* Running state of 32 query rows. shift is -inf before the first visible key. */
typedef struct {
  query_lanes lanes;
  fa_range keys;
  uint16_t *q; /* FA_AMX_DIMS_RIGHT */
  float *o;    /* [dims][32] */
  _Alignas(64) float shift[STRIP], sum[STRIP];
} strip_state;

/* A product with V that is still to be made: o += v p. */
typedef struct {
  const uint16_t *v;
  uint16_t *p;
  float *o;
  int blocks, done; /* blocks of 32 keys; strips of 32 dims made so far */
} v_product;

typedef struct {
  const fa_amx_forward_shared *shared;
  const fa_head *head;
  fa_amx_keys keys;
  int strips_qk, strips_v, pending_tiles, score_terms;
  float *s[2];                        /* [64][32], of this tile and the next */
  float *rows, *dropout;              /* [32][64], [64][32] */
  v_product gathering[2], pending[2]; /* of the two strips of a pair */
  strip_state *strips;
  fa_amx_rows *packing;
  float *load_tile; /* [64][dim] */
} queries_state;

static void carve(const fa_problem *p, const fa_amx_forward_shared *shared, queries_state *t, fa_arena *arena) {
  size_t pending_bytes = (size_t)PENDING_TILES * 2 * STRIP_HALVES((size_t)shared->parts) * sizeof(uint16_t);
  for (int i = 0; i < 2; i++) t->s[i] = fa_take(arena, BLOCK_FLOATS * sizeof(float));
  for (int i = 0; i < 2; i++) {
    t->gathering[i].p = fa_take(arena, pending_bytes);
    t->pending[i].p = fa_take(arena, pending_bytes);
  }
  t->rows = fa_take(arena, BLOCK_FLOATS * sizeof(float));
  t->dropout = fa_take(arena, p->dropout.p > 0 ? BLOCK_FLOATS * sizeof(float) : 0);
  t->packing = fa_take(arena, sizeof(fa_amx_rows));
  t->load_tile = fa_take(arena, (size_t)FA_BLOCK_N * (size_t)fa_pad(fa_max(p->dim_qk, p->dim_v)) * sizeof(float));
  t->strips = fa_take(arena, (size_t)shared->strips * sizeof(strip_state));
  for (int i = 0; i < shared->strips; i++) {
    uint16_t *q = fa_take(arena, (size_t)fa_amx_halves(p->dim_qk, shared->parts) * sizeof(uint16_t));
    float *o = fa_take(arena, (size_t)fa_amx_strips(p->dim_v) * STRIP * STRIP * sizeof(float));
    if (!t->strips) continue;
    t->strips[i].q = q;
    t->strips[i].o = o;
  }
}

/* The tile's second half is left out where no row of the strip sees it, as on the diagonal. */
static int keys_of_tile(const strip_state *strip, int n0) { return strip->lanes.end - n0 > STRIP ? FA_BLOCK_N : STRIP; }

AMX_INLINE void score_products(const queries_state *t, const strip_state *strip, int n0, float *s, const int parts, const tick_fn tick,
                               void *work, const int density) {
  const uint16_t *k = t->keys.k + n0 / STRIP * t->shared->k_halves;
  const int64_t step = STRIP_HALVES(parts);
  for (int i = 0; i < keys_of_tile(strip, n0) / STRIP; i++)
    product_32x32(k + i * t->shared->k_halves, step, strip->q, step, t->strips_qk, parts, s + i * STRIP * STRIP, STRIP, 0, tick, work,
                  density);
}

/* The next strip of 32 dims of a product with V. */
AMX_INLINE void output_product(const queries_state *t, v_product *job, const int parts, const tick_fn tick, void *work, const int density) {
  product_32x32(job->v + job->done * STRIP_HALVES(parts), t->shared->v_halves, job->p, STRIP_HALVES(parts), job->blocks, parts,
                job->o + job->done * STRIP * STRIP, STRIP, 1, tick, work, density);
  if (++job->done == t->strips_v) job->blocks = job->done = 0;
}

/* `count` of them, in turn for both strips of the pair, so that the second finds V in L1. */
AMX_INLINE void output_products(queries_state *t, int count, const int parts, const tick_fn tick, void *work, const int density) {
  for (; count > 0; count--) {
    int second = t->pending[0].blocks == 0 || (t->pending[1].blocks > 0 && t->pending[1].done < t->pending[0].done);
    if (t->pending[second].blocks == 0) return;
    output_product(t, &t->pending[second], parts, tick, work, density);
  }
}

AMX_INLINE void finish_pending(queries_state *t, int which, const int parts) {
  while (t->pending[which].blocks > 0) output_product(t, &t->pending[which], parts, no_tick, NULL, 0);
}

/* What has been gathered becomes the pending product. */
AMX_INLINE void close_gathering(queries_state *t, int which, const int parts) {
  if (t->gathering[which].blocks == 0) return;
  finish_pending(t, which, parts);
  v_product empty = {.p = t->pending[which].p};
  t->pending[which] = t->gathering[which];
  t->gathering[which] = empty;
}

static void shrink_output(const queries_state *t, strip_state *strip, const f32x16 shrink[2]) {
  for (int i = 0; i < t->strips_v * STRIP; i++)
    for (int h = 0; h < 2; h++) f32_store(strip->o + i * STRIP + 16 * h, f32_mul(f32_load(strip->o + i * STRIP + 16 * h), shrink[h]));
  for (int h = 0; h < 2; h++) f32_store(strip->sum + 16 * h, f32_mul(f32_load(strip->sum + 16 * h), shrink[h]));
}

/* Moves shift up to the tile's maximum where that is much larger. Rare, so it first makes all products that are still to be made. */
AMX_INLINE void follow_maximum(queries_state *t, strip_state *strip, int which, const float *s, int keys, const int parts) {
  const f32x16 unit = f32_splat(t->score_terms ? 1 : t->shared->factor), slack = f32_splat(t->score_terms ? LAZY_LOG2 / LOG2_E : LAZY_LOG2);
  f32x16 top[8], shrink[2]; /* even: queries 0..15, odd: 16..31 */
  for (int i = 0; i < 8; i++) top[i] = f32_splat(-INFINITY);
  for (int j = 0; j < keys; j += 4)
    for (int i = 0; i < 8; i++) top[i] = f32_max(f32_load(s + j * STRIP + 16 * i), top[i]);
  int moves = 0;
  for (int h = 0; h < 2; h++) {
    top[h] = f32_mul(f32_max(f32_max(top[h + 2], top[h]), f32_max(top[h + 4], top[h + 6])), unit);
    moves |= f32_any_greater(top[h], f32_add(f32_load(strip->shift + 16 * h), slack));
  }
  if (!moves) return;
  close_gathering(t, which, parts);
  finish_pending(t, which, parts);
  for (int h = 0; h < 2; h++) {
    f32x16 old = f32_load(strip->shift + 16 * h), now = f32_where_greater(top[h], f32_add(old, slack), top[h], old);
    shrink[h] = f32_exp2(f32_mul(f32_sub(old, f32_finite_or_zero(now)), f32_splat(t->score_terms ? LOG2_E : 1)));
    f32_store(strip->shift + 16 * h, now);
  }
  shrink_output(t, strip, shrink);
}

/* Masks or completes the scores of a tile, moves shift, and sets up the work that makes its weights. */
AMX_INLINE void prepare_tile(queries_state *t, strip_state *strip, int which, int n0, float *s, softmax_work *w, const int parts) {
  const int keys = keys_of_tile(strip, n0);
  if (t->score_terms)
    score_block(t->head, &strip->lanes, n0, keys, s, t->rows, NULL, NULL);
  else if (needs_mask(&strip->lanes, n0, keys))
    mask_block(&strip->lanes, n0, keys, s);
  follow_maximum(t, strip, which, s, keys, parts);
  f32x16 zero = f32_splat(0), shift_0 = f32_finite_or_zero(f32_load(strip->shift)),
         shift_1 = f32_finite_or_zero(f32_load(strip->shift + 16));
  /* Scores may be as low as a float goes: their shift comes off before log2 units would overflow. */
  for (float *at = s; at < s + keys * STRIP && t->score_terms; at += STRIP) {
    f32_store(at, f32_sub(f32_load(at), shift_0));
    f32_store(at + 16, f32_sub(f32_load(at + 16), shift_1));
  }
  w->shift_0 = t->score_terms ? zero : f32_sub(zero, shift_0);
  w->shift_1 = t->score_terms ? zero : f32_sub(zero, shift_1);
  w->sum_0 = f32_load(strip->sum);
  w->sum_1 = f32_load(strip->sum + 16);
  w->s = s;
  w->factor = f32_splat(t->shared->factor);
  w->left = keys / 2;
  w->row = 0;
  w->dropout = NULL;
  if (t->head->problem->dropout.p > 0) {
    dropout_block(t->head, &strip->lanes, n0, keys, t->dropout, t->rows);
    w->dropout = t->dropout;
  }
}

/* o += v p for a tile with a NaN or infinity in V, which must not leak through a weight of 0, nor change through the two parts of another. */
static void output_skipping_zeros(const queries_state *t, strip_state *strip, int n0, const uint16_t *p) {
  const fa_problem *problem = t->head->problem;
  const int parts = t->shared->parts, ld = fa_pad(problem->dim_v), keys = fa_min(keys_of_tile(strip, n0), t->head->seq.len_k - n0);
  fa_load_keys(t->head, &problem->v, n0, keys, problem->dim_v, t->load_tile);
  for (int j = 0; j < keys; j++)
    for (int i = 0; i < STRIP; i++) {
      const uint16_t *at = p + j / STRIP * STRIP_HALVES(parts) + i / 16 * TILE_HALVES + j % STRIP / 2 * 32 + i % 16 * 2 + j % 2;
      float weight = fa_from_bf16(at[0]) + (parts == 2 ? fa_from_bf16(at[2 * TILE_HALVES]) : 0);
      for (int d = 0; d < problem->dim_v && weight != 0; d++) strip->o[d * STRIP + i] += weight * t->load_tile[j * ld + d];
    }
}

/* What a tile's weights become: part of a sum to be made later. */
AMX_INLINE void gather_tile(queries_state *t, strip_state *strip, int which, int n, int last, const int parts) {
  v_product *g = &t->gathering[which];
  if (g->blocks == 0) {
    g->v = t->keys.v + n / STRIP * t->shared->v_halves;
    g->o = strip->o;
  }
  const int keys = keys_of_tile(strip, n);
  g->blocks += keys / STRIP;
  if (last || keys < FA_BLOCK_N || g->blocks == t->pending_tiles * 2) close_gathering(t, which, parts);
}

/* The tiles of [n0, end) for a pair of strips (the last of a sequence may be alone), in turn, so that the second finds K in L1. */
AMX_INLINE void walk_tiles(queries_state *t, strip_state *strips, int count, int n0, int end, const int parts, const tick_fn tick,
                           const int density) {
  const int share = fa_ceil_div(t->strips_v, t->pending_tiles), m0 = strips->lanes.m0;
  int n = next_tile(t->head, m0, n0, end), now = 0;
  if (n >= end) return;
  score_products(t, strips, n, t->s[0], parts, no_tick, NULL, 0);
  for (int next; n < end; n = next) {
    const int poisoned = !t->keys.v_finite[n / STRIP] || !t->keys.v_finite[n / STRIP + 1];
    next = next_tile(t->head, m0, n + FA_BLOCK_N, end);
    for (int i = 0; i < count; i++, now = 1 - now) {
      softmax_work w;
      prepare_tile(t, &strips[i], i, n, t->s[now], &w, parts);
      if (poisoned) close_gathering(t, i, parts);
      w.p = t->gathering[i].p + t->gathering[i].blocks * STRIP_HALVES(parts);
      if (i + 1 < count)
        score_products(t, &strips[i + 1], n, t->s[1 - now], parts, tick, &w, density);
      else if (next < end)
        score_products(t, strips, next, t->s[1 - now], parts, tick, &w, density);
      output_products(t, share, parts, tick, &w, density);
      while (w.left > 0) tick(&w);
      f32_store(strips[i].sum, w.sum_0);
      f32_store(strips[i].sum + 16, w.sum_1);
      if (!poisoned) {
        gather_tile(t, &strips[i], i, n, next != n + FA_BLOCK_N || next >= end, parts);
        continue;
      }
      finish_pending(t, i, parts);
      output_skipping_zeros(t, &strips[i], n, t->gathering[i].p);
    }
  }
}

/* density: vector work is 32 calls of tick a tile; tile products are 4 a strip of dims, of K and of V, and 32 keys, times 3 for fp16. */
static void walk_bf16_wide(queries_state *t, strip_state *s, int count, int n0, int end) {
  walk_tiles(t, s, count, n0, end, 1, softmax_tick_1, 1);
}
static void walk_bf16_middle(queries_state *t, strip_state *s, int count, int n0, int end) {
  walk_tiles(t, s, count, n0, end, 1, softmax_tick_1, 2);
}
static void walk_bf16_narrow(queries_state *t, strip_state *s, int count, int n0, int end) {
  walk_tiles(t, s, count, n0, end, 1, softmax_tick_1, 4);
}
static void walk_fp16(queries_state *t, strip_state *s, int count, int n0, int end) {
  walk_tiles(t, s, count, n0, end, 2, softmax_tick_2, 1);
}
static void walk_fp16_narrow(queries_state *t, strip_state *s, int count, int n0, int end) {
  walk_tiles(t, s, count, n0, end, 2, softmax_tick_2, 2);
}

static void walk(queries_state *t, strip_state *s, int count, int n0, int end) {
  int products = t->strips_qk + t->strips_v;
  if (t->shared->parts == 2)
    (products > 2 ? walk_fp16 : walk_fp16_narrow)(t, s, count, n0, end);
  else
    (products > 6 ? walk_bf16_wide : products > 2 ? walk_bf16_middle : walk_bf16_narrow)(t, s, count, n0, end);
}

static void finish_strip(queries_state *t, strip_state *strip) {
  const fa_problem *p = t->head->problem;
  const int ld = t->strips_v * STRIP;
  _Alignas(64) float out[STRIP * FA_MAX_HEAD_DIM];
  double scale[STRIP];
  for (int r = 0; r < strip->lanes.rows; r++) {
    double sum = (double)strip->sum[r], m = sum == 0 ? -INFINITY : (double)strip->shift[r] * (t->score_terms ? 1 : LN_2);
    scale[r] = 1;
    if (p->score.sinks.data) {
      double sink = fa_per_head_value(&p->score.sinks, t->head->ops, t->head->b, t->head->h), top = sink > m ? sink : m;
      if (top > -INFINITY) {
        scale[r] = exp(m - top);
        sum = sum * scale[r] + exp(sink - top);
        m = top;
      }
    }
    scale[r] = sum == 0 ? 0 : scale[r] / sum;
    fa_set_statistic(t->head, &p->lse, strip->lanes.m0 + r, sum == 0 ? -INFINITY : m + log(sum));
  }
  flip(strip->o, STRIP, ld, STRIP, out, ld);
  t->head->ops->store(fa_query_row(t->head, &p->out, strip->lanes.m0), p->dtype, p->out.s, p->out.d, out, ld, strip->lanes.rows, p->dim_v,
                      scale);
}

static void start_strip(queries_state *t, strip_state *strip, int m0) {
  const fa_problem *p = t->head->problem;
  set_lanes(t->head, &strip->lanes, m0);
  strip->keys = fa_key_tiles(t->head, m0, strip->lanes.rows);
  /* A negative scale turns the queries around: the largest product is then the largest score. */
  fa_amx_take_queries(t->packing, t->head, &p->q, m0, strip->lanes.rows, p->dim_qk, p->score.scale < 0 && !t->score_terms);
  fa_amx_put(t->packing, FA_AMX_DIMS_RIGHT, strip->q);
  memset(strip->o, 0, (size_t)t->strips_v * STRIP * STRIP * sizeof(float));
  for (int r = 0; r < STRIP; r++) {
    strip->shift[r] = -INFINITY;
    strip->sum[r] = 0;
  }
}

/* Query rows [m0, end) of a head. */
static void forward_rows(queries_state *t, int m0, int end) {
  int count = 0, lo = INT32_MAX, hi = 0;
  for (; m0 + count * STRIP < end; count++) {
    start_strip(t, &t->strips[count], m0 + count * STRIP);
    lo = fa_min(lo, t->strips[count].keys.lo);
    hi = fa_max(hi, t->strips[count].keys.hi);
  }
  tiles_begin();
  for (int n0 = lo / PANEL_KEYS * PANEL_KEYS; n0 < hi; n0 += PANEL_KEYS)
    for (int i = 0; i < count; i += 2) {
      strip_state *pair = &t->strips[i];
      const int both = i + 1 < count;
      walk(t, pair, 1 + both, fa_max(n0, pair[0].keys.lo), fa_min(n0 + PANEL_KEYS, pair[both].keys.hi));
    }
  for (int i = 0; i < 2; i++) {
    if (t->shared->parts == 2)
      finish_pending(t, i, 2);
    else
      finish_pending(t, i, 1);
  }
  tiles_end();
  for (int i = 0; i < count; i++) finish_strip(t, &t->strips[i]);
}

size_t fa_amx_queries_scratch(const fa_problem *p, const fa_amx_forward_shared *shared) {
  fa_arena arena = {NULL, 0};
  queries_state count;
  carve(p, shared, &count, &arena);
  return arena.used;
}

void fa_amx_queries(const fa_amx_forward_shared *shared, const fa_head *head, fa_amx_keys keys, int m0, fa_arena arena) {
  const fa_problem *p = head->problem;
  queries_state t = {.shared = shared, .head = head, .keys = keys, .score_terms = has_score_terms(p)};
  t.strips_qk = fa_amx_strips(p->dim_qk);
  t.strips_v = fa_amx_strips(p->dim_v);
  t.pending_tiles = fa_max(2, fa_min(t.strips_v, PENDING_TILES)); /* one strip of dims for each new tile */
  carve(p, shared, &t, &arena);
  int end = fa_min(m0 + shared->strips * STRIP, head->seq.slot_q);
  if (m0 < head->seq.len_q) forward_rows(&t, m0, fa_min(end, head->seq.len_q));
  fa_write_padding(head, fa_max(m0, head->seq.len_q), end);
}

AMX_END
#endif
