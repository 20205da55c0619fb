/* softmax.h: the online softmax on fragments, in base 2.
 *
 * A row of a fragment lies in the four lanes of a quad, so its maximum and its sum take two exchanges and no shared memory. Maxima are kept
 * as score * to_log2. The running maximum moves only when it grows by more than LAZY: until then the weights may reach 2^LAZY, which every
 * element type holds at full precision, and the accumulated output needs no rescaling. The final division makes it exact.
 */
#ifndef FA_SOFTMAX_H
#define FA_SOFTMAX_H

#include "args.h"
#include "ptx.h"

#define LOG2E 1.4426950408889634f
#define LN2 0.6931471805599453f
#define LAZY 8.0f
#define MINUS_INFINITY __int_as_float(0xff800000)

FA_INLINE float fa_quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 2));
}

FA_INLINE float fa_quad_sum(float x) {
  x += __shfl_xor_sync(0xFFFFFFFFu, x, 1);
  return x + __shfl_xor_sync(0xFFFFFFFFu, x, 2);
}

/* The running maxima of two rows (g and g + 8) after `count` more fragments of scores, and what the rows' sums and accumulated output have to be
 * multiplied with. to_log2 is positive. */
FA_INLINE void fa_move_maxima(float s[][4], int count, float to_log2, float max[2], float rescale[2]) {
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float top = s[0][2 * r];
#pragma unroll
    for (int n = 0; n < count; n++) top = fmaxf(top, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
    top = fa_quad_max(top) * to_log2;
    rescale[r] = 1.0f;
    if (top > max[r] + LAZY) {
      rescale[r] = ex2_approx(max[r] - top);
      max[r] = top;
    }
  }
}

/* Whether the running maxima of two rows may stay, as far as this lane sees: none of its scores exceeds its row's by more than LAZY. Positive floats
 * compare like integers, of which newer GPUs take the maximum of three at a time; 0 stands for the scores below it. */
FA_INLINE int fa_maxima_may_stay(float s[][4], int count, float to_log2, const float max[2]) {
  int top[2] = {0, 0};
#pragma unroll
  for (int n = 0; n < count; n++)
#pragma unroll
    for (int r = 0; r < 2; r++) top[r] = fa_max(fa_max(__float_as_int(s[n][2 * r]), __float_as_int(s[n][2 * r + 1])), top[r]);
  return __int_as_float(top[0]) * to_log2 <= max[0] + LAZY && __int_as_float(top[1]) * to_log2 <= max[1] + LAZY;
}

/* Scores become weights exp2(score * to_log2 - max), and sum[] grows by this lane's part of them. A row that has seen no key has the
 * maximum -infinity: its weights are exp2(-infinity - 0) = 0. */
FA_INLINE void fa_weigh(float s[][4], int count, float to_log2, const float max[2], float sum[2]) {
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float shift = max[r] == MINUS_INFINITY ? 0.0f : max[r], total = 0.0f;
#pragma unroll
    for (int n = 0; n < count; n++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        s[n][2 * r + e] = ex2_approx(__fmaf_rn(s[n][2 * r + e], to_log2, -shift));
        total += s[n][2 * r + e];
      }
    sum[r] += total;
  }
}

/* Natural log of the sum of exp(score), -inf for a row that saw nothing. The backward gets its weights from it, so in fp32 it is rounded once. */
FA_INLINE float fa_log_sum_exp(float max, float sum) {
  if (sum == 0.0f) return MINUS_INFINITY;
  if (DTYPE == FA_ARG_F32) return (float)(((double)max + log2((double)sum)) * 0.6931471805599453);
  return (max + __log2f(sum)) * LN2;
}

#endif
