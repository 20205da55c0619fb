/* gradient_mma.h: gradient.h for fragments: what every backward kernel on tensor cores does between its products. */
#ifndef FA_GRADIENT_MMA_H
#define FA_GRADIENT_MMA_H

#include "gradient.h"
#include "mma_bwd.h"

/* The rows g and g + 8 of this lane: lse and delta as the preparing kernel left them. */
FA_INLINE void fa_read_row_statistics(const fa_gradient_args *args, int64_t workspace_row, float lse[2], float delta[2]) {
  const float *lse_gmem = (const float *)args->lse_rows + workspace_row, *delta_gmem = (const float *)args->delta_rows + workspace_row;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    lse[r] = lse_gmem[8 * r];
    delta[r] = delta_gmem[8 * r];
  }
}

/* 1 when some product of this lane is infinite or NaN: so is then some element of the operands. */
FA_INLINE int fa_has_nonfinite(float s[][4], int count) {
  float zero = 0.0f;
#pragma unroll
  for (int n = 0; n < count; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) zero = __fmaf_rn(s[n][e], 0.0f, zero);
  return zero != 0.0f;
}

/* What a caller wants besides P and dS. */
typedef struct {
  int before_cap;            /* dS as the gradient of the bias, not of q and k */
  fa_slope_sums *slope_sums; /* of this lane's two rows, or 0 */
} fa_gradient_wish;

/* The plain form: no score changes, no dropout. Invisible pairs are cleared afterwards, in the tiles that have any. */
FA_INLINE void fa_plain_gradient(float s[][4], float dp[][4], int count, float scale, const float lse[2], const float delta[2]) {
#pragma unroll
  for (int n = 0; n < count; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) {
      s[n][e] = DTYPE == FA_ARG_F32 ? fa_weight(s[n][e] * scale, lse[e >> 1]) : ex2_approx(__fmaf_rn(s[n][e], scale * LOG2E, -lse[e >> 1]));
      dp[n][e] = s[n][e] * (dp[n][e] - delta[e >> 1]);
    }
}

FA_INLINE void fa_clear_invisible(float s[][4], float dp[][4], int count, const fa_range keys[2], int column) {
#pragma unroll
  for (int n = 0; n < count; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) {
      int j = column + 8 * n + (e & 1);
      if (j < keys[e >> 1].lo || j >= keys[e >> 1].hi) s[n][e] = dp[n][e] = 0.0f;
    }
}

FA_INLINE void fa_hide_scores(float s[][4], int count, const fa_range keys[2], int column) {
#pragma unroll
  for (int n = 0; n < count; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) {
      int j = column + 8 * n + (e & 1);
      if (j < keys[e >> 1].lo || j >= keys[e >> 1].hi) s[n][e] = MINUS_INFINITY;
    }
}

/* P dP and the rest of one tile, in f32, join the sums of row r: p are weights, kept what of dP dropout has left. */
FA_INLINE void fa_add_slope_terms(fa_slope_sums *sums, float p[][4], float kept[][4], int count, int r, int distance) {
  float p_sum = 0, p_dp = 0, p_dist = 0, p_dp_dist = 0;
#pragma unroll
  for (int n = 0; n < count; n++)
#pragma unroll
    for (int e = 2 * r; e < 2 * r + 2; e++) {
      float weighed = p[n][e] * fabsf((float)(distance - 8 * n - (e & 1)));
      p_sum += p[n][e], p_dp += p[n][e] * kept[n][e], p_dist += weighed, p_dp_dist += weighed * kept[n][e];
    }
  sums->p += p_sum, sums->p_dp += p_dp, sums->p_dist += p_dist, sums->p_dp_dist += p_dp_dist;
}

#define FA_MOST_FRAGMENTS 16

/* The general form. A hidden pair has the score -infinity. */
FA_INLINE void fa_changed_gradient(float s[][4], float dp[][4], int count, const fa_arg_problem *p, const fa_gradient_head *head, int row,
                                   const fa_range keys[2], int column, const float lse[2], const float delta[2], fa_gradient_wish wish) {
  float cap_slope[FA_MOST_FRAGMENTS][4], keep = DROPOUT ? (float)p->keep_scale : 1.0f;
  int dropped[FA_MOST_FRAGMENTS]; /* bit e of entry n: element e of fragment n */
  fa_change_scores(s, wish.before_cap ? 0 : cap_slope, count, p, &head->score, head->len_q, head->len_k, row, column);
  fa_hide_scores(s, count, keys, column);
#pragma unroll
  for (int n = 0; n < count; n++) {
    uint32_t word[4];
    if (DROPOUT) fa_fragment_words(head->dropout, head->b, head->h, row, (column & ~7) + 8 * n, word);
    dropped[n] = 0;
#pragma unroll
    for (int e = 0; e < 4; e++) {
      int hidden = s[n][e] == MINUS_INFINITY;
      if (DROPOUT && word[e] < p->dropout_threshold) dropped[n] |= 1 << e;
      s[n][e] = hidden ? 0.0f : fa_weight(s[n][e], lse[e >> 1]);
      dp[n][e] = hidden || dropped[n] >> e & 1 ? 0.0f : dp[n][e] * keep;
    }
  }
  if (SCORE && wish.slope_sums) {
#pragma unroll
    for (int r = 0; r < 2; r++) fa_add_slope_terms(&wish.slope_sums[r], s, dp, count, r, row + 8 * r + head->score.off - column);
  }
#pragma unroll
  for (int n = 0; n < count; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) {
      float ds = s[n][e] * (dp[n][e] - delta[e >> 1]) * (SCORE && !wish.before_cap ? cap_slope[n][e] : 1.0f);
      dp[n][e] = s[n][e] == 0.0f ? 0.0f : ds;
      s[n][e] = dropped[n] >> e & 1 ? 0.0f : s[n][e] * keep;
    }
}

/* s: products q.k, becomes P. dp: products dout.v, becomes dS. `row` is this lane's row g within the sequence, column0 the first key of
 * the fragments, `full` whether all pairs are visible by the rule. */
FA_INLINE void fa_gradient_fragments(float s[][4], float dp[][4], int count, const fa_arg_problem *p, const fa_gradient_head *head, int row,
                                     int column0, int full, const float lse[2], const float delta[2], fa_gradient_wish wish) {
  int column = column0 + 2 * (threadIdx.x & 3);
  fa_range keys[2] = {fa_keys_of_row(p, head, row), fa_keys_of_row(p, head, row + 8)};
  if (SCORE || DROPOUT) {
    fa_changed_gradient(s, dp, count, p, head, row, keys, column, lse, delta, wish);
  } else {
    fa_plain_gradient(s, dp, count, (float)p->scale, lse, delta);
    if (!full) fa_clear_invisible(s, dp, count, keys, column);
  }
}

#endif
