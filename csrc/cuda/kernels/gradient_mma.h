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
  int before_cap;        /* dS as the gradient of the bias, not of q and k */
  float *distance_sum;   /* receives -dS * |i + off - j| summed, the gradient of the slope; or 0 */
} fa_gradient_wish;

/* s: products q.k, becomes P. dp: products dout.v, becomes dS. `row` is this lane's row g within the sequence, column0 the first key of
 * the fragments, `full` whether all pairs are visible by the rule. */
FA_INLINE void fa_gradient_fragments(float s[][4], float dp[][4], int count, const fa_arg_problem *p, const fa_gradient_head *head, int row,
                                     int column0, int full, const float lse[2], const float delta[2], fa_gradient_wish wish) {
  int q = threadIdx.x & 3;
  fa_range keys[2];
#pragma unroll
  for (int r = 0; r < 2; r++) keys[r] = fa_keys_of_row(head, row + 8 * r);
#pragma unroll
  for (int n = 0; n < count; n++) {
    uint32_t word[4];
    if (DROPOUT) fa_fragment_words(head->dropout, head->b, head->h, row, column0 + 8 * n, word);
#pragma unroll
    for (int e = 0; e < 4; e++) {
      int r = e >> 1, i = row + 8 * r, j = column0 + 8 * n + 2 * q + (e & 1);
      if (!SCORE && !DROPOUT && full) {
        s[n][e] = ex2_approx(__fmaf_rn(s[n][e], head->scale_log2, -lse[r]));
        dp[n][e] = s[n][e] * (dp[n][e] - delta[r]);
        continue;
      }
      int visible = full ? !SCORE || i < head->len_q : j >= keys[r].lo && j < keys[r].hi;
      float slope_of_cap = fa_gradient_of_pair(p, head, &s[n][e], &dp[n][e], visible, i, j, lse[r], delta[r],
                                               DROPOUT && word[e] < p->dropout_threshold);
      if (SCORE && wish.distance_sum) {
        int distance = i + head->score.off - j;
        *wish.distance_sum -= dp[n][e] * (float)(distance < 0 ? -distance : distance);
      }
      if (SCORE && !wish.before_cap) dp[n][e] *= slope_of_cap;
    }
  }
}

#endif
