/* dq_sum.h: the f32 sum of dQ in the workspace, in the order of mma fragments.
 *
 * Sixteen rows of the sum are one run of memory: fragment after fragment of 8 columns, FA_FRAGMENT floats each. From sm_90 on, one
 * instruction adds a lane's four numbers, so lane l has floats 4 l to 4 l + 3; before, one adds a number of each lane, so number i of
 * lane l is float 32 i + l. Either way a warp's addition touches whole lines.
 */
#ifndef FA_DQ_SUM_H
#define FA_DQ_SUM_H

#include "args_bwd.h"
#include "ptx_bwd.h"

#define FA_FRAGMENT 128 /* floats: 16 rows by 8 columns */

FA_INLINE void fa_add_fragment(float *fragment_gmem, int lane, const float x[4]) {
  if (FA_VECTOR_RED) {
    red_global_add_v4_f32(fragment_gmem + 4 * lane, x);
  } else {
#pragma unroll
    for (int i = 0; i < 4; i++) red_global_add_f32(fragment_gmem + 32 * i + lane, x[i]);
  }
}

typedef struct __align__(16) {
  float x[4];
}
fa_lane_sum;

FA_INLINE fa_lane_sum fa_read_fragment(const float *fragment_gmem, int lane) {
  if (FA_VECTOR_RED) return *(const fa_lane_sum *)(fragment_gmem + 4 * lane);
  fa_lane_sum sum = {{fragment_gmem[lane], fragment_gmem[32 + lane], fragment_gmem[64 + lane], fragment_gmem[96 + lane]}};
  return sum;
}

#endif
