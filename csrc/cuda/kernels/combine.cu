/* combine.cu: the results of the splits of the keys, exactly combined:
 *
 *     lse = log sum_s exp(lse_s)          out = sum_s exp(lse_s - lse) * out_s
 *
 * with the sink's logit as one more term of the sum. One warp a row: its lanes take the splits for the sum, then the dims for the output, which they
 * read as whole lines. A CTA is WARPS rows; no shared memory, no barrier. Limited by the bandwidth of the partial results.
 *
 * Constants: DTYPE.
 */
#define REAL float
#define ALIGNED 0

#include "score.h"
#include "softmax.h"

#define WARPS 4

FA_INLINE float warp_max(float x) {
  for (int step = 16; step; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, step));
  return x;
}

FA_INLINE float warp_sum(float x) {
  for (int step = 16; step; step /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, step);
  return x;
}

extern "C" __global__ void __launch_bounds__(32 * WARPS) combine(const __grid_constant__ fa_forward_args args) {
  const fa_arg_problem *p = &args.problem;
  fa_tile tile;
  if (!fa_find_query_tile(p, args.tiles, 1, WARPS, &tile)) return;
  int lane = threadIdx.x % 32, row = tile.m0 + (int)threadIdx.x / 32;
  if (row >= tile.slot_q) return;

  int64_t first = fa_statistics_row(p, &tile, row), rows = fa_statistics_rows(p);
  const float *lse_gmem = (const float *)args.partial_lse;
  float sink = row < tile.len_q ? fa_sink_of_head(p, tile.h) : MINUS_INFINITY, top = sink, sum = 0.0f;
  for (int s = lane; s < args.splits; s += 32) top = fmaxf(top, lse_gmem[s * rows + first]);
  top = warp_max(top);
  if (top > MINUS_INFINITY) {
    for (int s = lane; s < args.splits; s += 32) sum += __expf(lse_gmem[s * rows + first] - top);
    sum = warp_sum(sum) + __expf(sink - top);
  }
  float lse = sum == 0.0f ? MINUS_INFINITY : top + __logf(sum);

  char *out_gmem = fa_head_base(&args.out, ELEMENT_BYTES, tile.b, tile.h, tile.q_start + row);
  for (int d = lane; d < p->dim_v; d += 32) {
    float o = 0.0f;
    for (int s = 0; s < args.splits; s++) {
      float weight = sum == 0.0f ? 0.0f : __expf(lse_gmem[s * rows + first] - lse);
      if (weight != 0.0f) o += weight * ((const float *)args.partial_out)[(s * rows + first) * p->dim_v + d];
    }
    fa_store_element(out_gmem + d * args.out.d * ELEMENT_BYTES, o);
  }
  if (lane == 0) *(float *)fa_head_base(&args.lse, 4, tile.b, tile.h, tile.q_start + row) = lse;
}
