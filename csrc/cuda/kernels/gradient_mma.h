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

/* A long sum of numbers of both signs: `lost` is what rounding has taken from `sum`. */
typedef struct {
  float sum, lost;
} fa_long_sum;

FA_INLINE void fa_add_to(fa_long_sum *s, float x) {
  float added = x - s->lost, sum = s->sum + added;
  s->lost = (sum - s->sum) - added;
  s->sum = sum;
}

/* What a caller wants besides P and dS. */
typedef struct {
  int before_cap;            /* dS as the gradient of the bias, not of q and k */
  fa_long_sum *distance_sum; /* receives -dS * |i + off - j| summed, the gradient of the slope; or 0 */
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

/* The general form. */
FA_INLINE void fa_changed_gradient(float s[][4], float dp[][4], int count, const fa_arg_problem *p, const fa_gradient_head *head, int row,
                                   const fa_range keys[2], int column, const float lse[2], const float delta[2], fa_gradient_wish wish) {
#pragma unroll
  for (int n = 0; n < count; n++) {
    uint32_t word[4];
    if (DROPOUT) fa_fragment_words(head->dropout, head->b, head->h, row, (column & ~7) + 8 * n, word);
#pragma unroll
    for (int e = 0; e < 4; e++) {
      int r = e >> 1, i = row + 8 * r, j = column + 8 * n + (e & 1), visible = j >= keys[r].lo && j < keys[r].hi;
      float slope_of_cap =
          fa_gradient_of_pair(p, head, &s[n][e], &dp[n][e], visible, i, j, lse[r], delta[r], DROPOUT && word[e] < p->dropout_threshold);
      if (SCORE && wish.distance_sum) {
        int distance = i + head->score.off - j;
        fa_add_to(wish.distance_sum, -dp[n][e] * (float)(distance < 0 ? -distance : distance));
      }
      if (SCORE && !wish.before_cap) dp[n][e] *= slope_of_cap;
    }
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
