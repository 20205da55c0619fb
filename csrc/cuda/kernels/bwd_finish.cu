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

extern "C" __global__ void __launch_bounds__(THREADS) bwd_finish(const __grid_constant__ fa_gradient_args args) {
  const fa_arg_problem *p = &args.problem;
  fa_tile tile;
  if (!fa_find_query_tile(p, args.pad_tiles, 1, FA_ROW_PAD, &tile)) return;
  const float *sum_gmem = (const float *)args.dq_sum + (fa_workspace_row(&args, tile.b, tile.h, tile.q_start) + tile.m0) * args.dq_columns;
  int pairs = args.dq_columns / 2;
  float scale = (float)p->scale;
  for (int item = threadIdx.x; item < FA_ROW_PAD / 2 * pairs; item += THREADS) {
    int pair = item % pairs, g = item / pairs % 8, block = item / pairs / 8, i = tile.m0 + 16 * block + g;
    if (i >= tile.slot_q) continue;
    float x[4] = {0, 0, 0, 0};
    if (i < tile.len_q) fa_read_fragment(sum_gmem + block * 16 * args.dq_columns + pair / 4 * FA_FRAGMENT, 4 * g + pair % 4, x);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      int row = i + 8 * r, used = row < tile.len_q;
      if (row >= tile.slot_q) continue;
      char *row_gmem = fa_head_base(&args.dq, ELEMENT_BYTES, tile.b, tile.h, tile.q_start + row);
      fa_store_pair(row_gmem, args.dq.d, p->dim_qk, 2 * pair, used ? x[2 * r] * scale : 0.0f, used ? x[2 * r + 1] * scale : 0.0f);
    }
  }
}
