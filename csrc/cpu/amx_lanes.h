/* amx_lanes.h: a block of up to 64 keys x 32 queries between its products and its softmax. Scores lie transposed, [key][query], so that a vector
 * is one key with 16 queries, and the statistics of 16 queries are one vector: no sum or maximum runs along a vector. */
#ifndef FA_AMX_LANES_H
#define FA_AMX_LANES_H

#include "amx_tile.h"
#include "head.h"

enum { BLOCK_FLOATS = FA_BLOCK_N * STRIP };

/* 32 query rows of a head: where they lie, and which keys each of them may see. */
typedef struct {
  int m0, rows;              /* rows past the sequence's end are there, hold zeros, see nothing and are never stored */
  int mask_below, mask_from; /* keys outside [mask_below, mask_from) are invisible to some row */
  int end;                   /* keys from here on are invisible to every row */
  _Alignas(64) int32_t lo[STRIP], hi[STRIP];
} query_lanes;

AMX_BEGIN

AMX_INLINE void set_lanes(const fa_head *head, query_lanes *lanes, int m0) {
  const fa_rule rule = head->problem->visibility.rule;
  const int len_q = head->seq.len_q, len_k = head->seq.len_k;
  lanes->m0 = m0;
  lanes->rows = fa_min(STRIP, len_q - m0);
  lanes->mask_below = 0;
  lanes->mask_from = len_k;
  lanes->end = 0;
  for (int r = 0; r < STRIP; r++) {
    lanes->lo[r] = r < lanes->rows ? fa_row_lo(rule, len_q, len_k, m0 + r) : 0;
    lanes->hi[r] = r < lanes->rows ? fa_row_hi(rule, len_q, len_k, m0 + r) : 0;
    lanes->mask_below = fa_max(lanes->mask_below, lanes->lo[r]);
    lanes->end = fa_max(lanes->end, lanes->hi[r]);
    if (r < lanes->rows) lanes->mask_from = fa_min(lanes->mask_from, lanes->hi[r]);
  }
}

AMX_INLINE int needs_mask(const query_lanes *lanes, int n0, int keys) { return n0 < lanes->mask_below || n0 + keys > lanes->mask_from; }

/* s[keys][32]: -inf where the pair is not visible. */
AMX_INLINE void mask_block(const query_lanes *lanes, int n0, int keys, float *s) {
  for (int j = 0; j < keys; j++)
    for (int t = 0; t < STRIP; t += 16) {
      float *at = s + j * STRIP + t;
      f32_store(at, f32_where_inside(f32_load(at), lanes->lo + t, lanes->hi + t, n0 + j));
    }
}

/* Products s[keys][32] -> scores by the rules of head.h, through rows[32][64]. */
AMX_INLINE void score_block(const fa_head *head, const query_lanes *lanes, int n0, int keys, float *s, float *rows, float *factor,
                            float *factor_rows) {
  int columns = fa_min(keys, head->seq.len_k - n0);
  flip(s, STRIP, keys, STRIP, rows, FA_BLOCK_N);
  fa_score_tile(head, lanes->m0, lanes->rows, n0, columns, rows, factor ? factor_rows : NULL);
  for (int i = lanes->rows * FA_BLOCK_N; i < BLOCK_FLOATS; i++) rows[i] = -INFINITY;
  flip(rows, FA_BLOCK_N, STRIP, keys, s, STRIP);
  if (factor) flip(factor_rows, FA_BLOCK_N, STRIP, keys, factor, STRIP);
}

/* Dropout's multipliers as multiplier[keys][32]. */
AMX_INLINE void dropout_block(const fa_head *head, const query_lanes *lanes, int n0, int keys, float *multiplier, float *rows) {
  for (int r = 0; r < lanes->rows; r++) {
    fa_dropout_row row = fa_dropout_of(head, lanes->m0 + r, n0);
    head->ops->dropout_row(&row, rows + r * FA_BLOCK_N, keys);
  }
  for (int i = lanes->rows * FA_BLOCK_N; i < BLOCK_FLOATS; i++) rows[i] = 0;
  flip(rows, FA_BLOCK_N, STRIP, keys, multiplier, STRIP);
}

AMX_END

/* Scores that fa_score_tile must make; else they are products times scale under an interval of keys a row. */
static inline int has_score_terms(const fa_problem *p) {
  return p->score.softcap > 0 || p->score.bias.data || p->score.alibi.data || p->visibility.mask.data || p->score.scale == 0;
}

/* The first key tile at or after n that the block mask leaves; end if none. */
static inline int next_tile(const fa_head *head, int m0, int n, int end) {
  while (n < end && !fa_tile_in_block_mask(head, m0, n)) n += FA_BLOCK_N;
  return fa_min(n, end);
}

#endif
