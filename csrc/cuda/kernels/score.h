/* score.h: from the product q.k to the score, score = cap(scale * q.k) + shift(i, j), and the dropout of its weight.
 *
 * cap(x) = softcap * tanh(x / softcap). shift = bias - slope * |i + off - j|, or -infinity where a mask forbids the pair, and then whatever the
 * product was, NaN included. Expects REAL, float or double. The causal and window rules are not here (core/mask.h): they are intervals.
 */
#ifndef FA_SCORE_H
#define FA_SCORE_H

#include "../../core/philox.h"
#include "tile.h"

/* What scores need to know of one head. */
typedef struct {
  REAL scale, softcap, slope;
  int off;          /* len_k - len_q */
  const char *bias; /* at (b, h, 0, 0), or 0 */
  const char *mask;
} fa_score_head;

FA_INLINE REAL fa_load_real(const void *data, int dtype, int64_t index) {
  return sizeof(REAL) == 8 ? (REAL)fa_load_f64(data, dtype, index) : (REAL)fa_load_f32(data, dtype, index);
}

FA_INLINE int fa_arg_bytes(int dtype) { return dtype == FA_ARG_F64 ? 8 : dtype == FA_ARG_F32 ? 4 : 2; }

FA_INLINE fa_score_head fa_score_of_head(const fa_arg_problem *p, const fa_tile *tile) {
  fa_score_head head = {(REAL)p->scale, (REAL)p->softcap, 0, tile->len_k - tile->len_q, 0, 0};
  if (p->alibi.data) head.slope = fa_load_real(p->alibi.data, p->alibi.dtype, tile->b * p->alibi.b + tile->h * p->alibi.h);
  if (p->bias.data) head.bias = (const char *)p->bias.data + (tile->b * p->bias.b + tile->h * p->bias.h) * fa_arg_bytes(p->bias.dtype);
  if (p->mask.data) head.mask = (const char *)p->mask.data + tile->b * p->mask.b + tile->h * p->mask.h;
  return head;
}

FA_INLINE REAL fa_minus_infinity() { return (REAL)__int_as_float(0xff800000); }

/* Single precision: to about 5e-7 relative; near 0 by its series, since 1 - 2 / (1 + exp(2x)) cancels there. */
FA_INLINE REAL fa_tanh(REAL x) {
  if (sizeof(REAL) == 8) return (REAL)tanh((double)x);
  float y = (float)x, square = y * y;
  if (fabsf(y) < 0.2f) return y * (1.0f + square * (-1.0f / 3 + square * (2.0f / 15 + square * (-17.0f / 315))));
  return 1.0f - __fdividef(2.0f, 1.0f + ex2_approx(y * 2.885390081777927f));
}

FA_INLINE REAL fa_cap(const fa_score_head *head, REAL product) {
  REAL x = product * head->scale;
  return head->softcap == 0 ? x : head->softcap * fa_tanh(x / head->softcap);
}

/* i and j must lie inside the sequence. */
FA_INLINE REAL fa_shift(const fa_arg_problem *p, const fa_score_head *head, int i, int j) {
  REAL shift = 0;
  if (head->mask && !head->mask[i * p->mask.m + j * p->mask.n]) return fa_minus_infinity();
  if (head->bias) shift = fa_load_real(head->bias, p->bias.dtype, i * p->bias.m + j * p->bias.n);
  int distance = i + head->off - j;
  return shift - head->slope * (REAL)(distance < 0 ? -distance : distance);
}

FA_INLINE REAL fa_score_at(const fa_arg_problem *p, const fa_score_head *head, REAL product, int i, int j) {
  REAL shift = fa_shift(p, head, i, j);
  return shift == fa_minus_infinity() ? shift : fa_cap(head, product) + shift;
}

/* One logit of a head that joins the denominator; -infinity without sinks. */
FA_INLINE REAL fa_sink_of_head(const fa_arg_problem *p, int h) {
  return p->sinks.data ? fa_load_real(p->sinks.data, p->sinks.dtype, h * p->sinks.h) : fa_minus_infinity();
}

/* ---- bias and mask on accumulator fragments ----
 *
 * Row r (0 or 1) of `count` fragments is row `row` of the sequence, its elements are columns column + 8 * n and the one after; `inside` of the
 * columns from `column` on lie in the sequence. A bias of -infinity forbids the pair, as a mask does. */
FA_INLINE void fa_add_bias_row(float s[][4], int count, int r, const fa_arg_problem *p, const fa_score_head *head, int row, int column,
                               int inside) {
  int is_f32 = p->bias.dtype == FA_ARG_F32, bytes = is_f32 ? 4 : 2;
  const char *at = head->bias + (row * p->bias.m + column * p->bias.n) * bytes;
#pragma unroll
  for (int n = 0; n < count; n++) {
#pragma unroll
    for (int e = 0; e < 2; e++)
      if (8 * n + e < inside) {
        float bias = fa_load_f32(at, is_f32 ? FA_ARG_F32 : DTYPE, e * p->bias.n);
        s[n][2 * r + e] = bias == (float)fa_minus_infinity() ? bias : s[n][2 * r + e] + bias;
      }
    at += 8 * p->bias.n * bytes;
  }
}

FA_INLINE void fa_mask_row(float s[][4], int count, int r, const fa_arg_problem *p, const fa_score_head *head, int row, int column,
                           int inside) {
  const char *at = head->mask + row * p->mask.m + column * p->mask.n;
#pragma unroll
  for (int n = 0; n < count; n++) {
#pragma unroll
    for (int e = 0; e < 2; e++)
      if (8 * n + e < inside && !at[e * p->mask.n]) s[n][2 * r + e] = (float)fa_minus_infinity();
    at += 8 * p->mask.n;
  }
}

/* Scale and softcap of products, two rows. cap_slope, if not 0, receives d(cap(x))/dx. */
FA_INLINE void fa_cap_scores(float s[][4], float cap_slope[][4], int count, const fa_score_head *head) {
#pragma unroll
  for (int n = 0; n < count; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) {
      s[n][e] *= head->scale;
      if (cap_slope) cap_slope[n][e] = 1.0f;
    }
  if (head->softcap != 0.0f) {
    float inverse = 1.0f / head->softcap;
#pragma unroll
    for (int n = 0; n < count; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        float capped = fa_tanh(s[n][e] * inverse);
        s[n][e] = head->softcap * capped;
        if (cap_slope) cap_slope[n][e] = 1.0f - capped * capped;
      }
  }
}

/* ALiBi, bias and mask on row r of the fragments, which is row `row` of the sequence. One loop a feature, since all but one or two are absent. Pairs
 * outside the sequence have no bias or mask to read, and are masked later. */
FA_INLINE void fa_shift_row(float s[][4], int count, int r, const fa_arg_problem *p, const fa_score_head *head, int len_q, int len_k,
                            int row, int column) {
  int inside = row < len_q ? len_k - column : 0;
  if (head->slope != 0.0f) {
    float distance = (float)(row + head->off - column);
#pragma unroll
    for (int n = 0; n < count; n++)
#pragma unroll
      for (int e = 0; e < 2; e++) s[n][2 * r + e] -= head->slope * fabsf(distance - (float)(8 * n + e));
  }
  if (head->bias) fa_add_bias_row(s, count, r, p, head, row, column, inside);
  if (head->mask) fa_mask_row(s, count, r, p, head, row, column, inside);
}

/* Products of the rows `row` and row + 8 of the sequence become scores, in natural units; elements as above. */
FA_INLINE void fa_change_scores(float s[][4], float cap_slope[][4], int count, const fa_arg_problem *p, const fa_score_head *head,
                                int len_q, int len_k, int row, int column) {
  fa_cap_scores(s, cap_slope, count, head);
#pragma unroll
  for (int r = 0; r < 2; r++) fa_shift_row(s, count, r, p, head, len_q, len_k, row + 8 * r, column);
}

/* ---- dropout ---- */

FA_INLINE fa_philox_key fa_dropout_key_of(const fa_arg_problem *p) {
  uint64_t seed = p->seed, offset = p->offset;
  if (p->rng_state) {
    seed = (uint64_t)p->rng_state[0];
    offset = (uint64_t)p->rng_state[p->rng_stride];
  }
  return fa_dropout_key(seed, offset);
}

FA_INLINE int fa_is_dropped(const fa_arg_problem *p, fa_philox_key key, int b, int h, int i, int j) {
  fa_philox_block block = fa_dropout_words(key, b, h, i, j >> 2);
  uint32_t even = j & 2 ? block.word[2] : block.word[0], odd = j & 2 ? block.word[3] : block.word[1];
  return (j & 1 ? odd : even) < p->dropout_threshold;
}

/* The random words of the four elements of an accumulator fragment whose first column is key `column`, a multiple of 8. One Philox block has four
 * columns of one row, and a lane holds two columns of two rows: so even lanes draw for the first row, odd lanes for the second, and neighbours swap
 * halves. (h, row) is the head and the row that this lane draws for. All lanes take part. */
FA_INLINE void fa_words_of_rows(fa_philox_key key, int b, int h, int row, int column, uint32_t word[4]) {
  int lane = threadIdx.x % 32, odd = lane & 1, quad_half = (lane >> 1) & 1;
  fa_philox_block block = fa_dropout_words(key, b, h, row, (column >> 2) + quad_half);
  uint32_t other0 = __shfl_xor_sync(0xFFFFFFFFu, odd ? block.word[0] : block.word[2], 1);
  uint32_t other1 = __shfl_xor_sync(0xFFFFFFFFu, odd ? block.word[1] : block.word[3], 1);
  word[0] = odd ? other0 : block.word[0];
  word[1] = odd ? other1 : block.word[1];
  word[2] = odd ? block.word[2] : other0;
  word[3] = odd ? block.word[3] : other1;
}

/* The same where the fragment's row g is row `row` of the sequence of head h, and its other row is row + 8. */
FA_INLINE void fa_fragment_words(fa_philox_key key, int b, int h, int row, int column, uint32_t word[4]) {
  fa_words_of_rows(key, b, h, row + 8 * (int)(threadIdx.x & 1), column, word);
}

#endif
