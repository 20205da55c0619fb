/* bwd_finish.cu: after bwd_sm80.cu: dq = scale * dq_sum, from the order of fragments (dq_sum.h) to rows of the tensor.
 *
 * One CTA has FA_ROW_PAD rows. Neighbouring threads take neighbouring pairs of columns of rows g and g + 8: reads come in runs of 64
 * bytes, writes in whole rows. Rows past the used ones that have a place in the tensor get 0. Limited by memory.
 *
 * Constants: DTYPE, ALIGNED.
 */
#define REAL float

#include "dq_sum.h"
#include "mma_bwd.h"

#define THREADS 256
#define BATCH 4 /* fragments that a thread reads at once */

extern "C" __global__ void __launch_bounds__(THREADS) bwd_finish(const __grid_constant__ fa_gradient_args args) {
  const fa_arg_problem *p = &args.problem;
  fa_tile tile;
  if (!fa_find_query_tile(p, args.pad_tiles, 1, FA_ROW_PAD, &tile)) return;
  const float *sum_gmem = (const float *)args.dq_sum + (fa_workspace_row(&args, tile.b, tile.h, tile.q_start) + tile.m0) * args.dq_columns;
  int pairs = args.dq_columns / 2;
  float scale = (float)p->scale;
  int summed = tile.b < p->batch; /* positions after the last sequence have no sums, only a gradient of 0 */
  const fa_lane_sum none = {{0.0f, 0.0f, 0.0f, 0.0f}};
  int items = FA_ROW_PAD / 2 * pairs;
  for (int first = threadIdx.x; first < items; first += BATCH * THREADS) {
    fa_lane_sum sum[BATCH];
#pragma unroll
    for (int n = 0; n < BATCH; n++) { /* all on their way before the first is used */
      int item = fa_min(first + n * THREADS, items - 1), pair = item % pairs, row = item / pairs;
      const float *fragment_gmem = sum_gmem + row / 8 * 16 * args.dq_columns + pair / 4 * FA_FRAGMENT;
      sum[n] = summed ? fa_read_fragment(fragment_gmem, row % 8 * 4 + pair % 4) : none;
    }
#pragma unroll
    for (int n = 0; n < BATCH; n++) {
      int item = first + n * THREADS, pair = item % pairs, row = item / pairs, i = tile.m0 + row / 8 * 16 + row % 8;
#pragma unroll
      for (int r = 0; r < 2; r++, i += 8) {
        if (item >= items || i >= tile.slot_q) continue;
        char *row_gmem = fa_head_base(&args.dq, ELEMENT_BYTES, tile.b, tile.h, tile.q_start + i);
        int used = i < tile.len_q;
        fa_store_pair(row_gmem, args.dq.d, p->dim_qk, 2 * pair, used ? sum[n].x[2 * r] * scale : 0.0f,
                      used ? sum[n].x[2 * r + 1] * scale : 0.0f);
      }
    }
  }
}
