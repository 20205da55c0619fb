/* combine.cu: the results of the splits of the keys, exactly combined:
 *
 *     lse = log sum_s exp(lse_s)          out = sum_s exp(lse_s - lse) * out_s
 *
 * with the sink's logit as one more term of the sum. A row has a team of fa_combine_team(splits) warps: one for a few splits, all WARPS of the CTA
 * for many, since a single warp would wait for its loads most of the time. Warps of a team share the splits; their parts of the output are added in
 * shared memory, in the order of the warps. Limited by the bandwidth of the partial results.
 *
 * Shared memory: [WARPS][MAX_DIM] floats, 8192 bytes
 *
 * Constants: DTYPE.
 */
#define REAL float
#define ALIGNED 0

#include "score.h"
#include "softmax.h"

#define WARPS FA_COMBINE_WARPS
#define MAX_DIM FA_COMBINE_DIM
#define DIM_STEPS (MAX_DIM / 32)

FA_INLINE float warp_max(float x) {
  for (int step = 16; step; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, step));
  return x;
}

FA_INLINE float warp_sum(float x) {
  for (int step = 16; step; step /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, step);
  return x;
}

/* log sum_s exp(lse_s), with the sink; all warps of a team compute it. `lse_gmem` is the row's first, the others follow `rows` apart. */
FA_INLINE float total_lse(const float *lse_gmem, int64_t rows, int splits, float sink) {
  float top = sink, sum = 0.0f;
  for (int s = threadIdx.x % 32; s < splits; s += 32) top = fmaxf(top, lse_gmem[s * rows]);
  top = warp_max(top);
  if (top == MINUS_INFINITY) return top;
  for (int s = threadIdx.x % 32; s < splits; s += 32) sum += __expf(lse_gmem[s * rows] - top);
  return top + __logf(warp_sum(sum) + __expf(sink - top));
}

/* Columns lane, lane + 32, ... of the sum over the splits first, first + step, ... A split of weight 0 may hold anything. */
FA_INLINE void add_splits(float o[DIM_STEPS], const fa_forward_args *args, int64_t row, int64_t rows, int first, int step, float lse) {
  const float *lse_gmem = (const float *)args->partial_lse + row;
  int dim_v = args->problem.dim_v, lane = threadIdx.x % 32;
#pragma unroll
  for (int c = 0; c < DIM_STEPS; c++) o[c] = 0.0f;
#pragma unroll 4
  for (int s = first; s < args->splits; s += step) {
    const float *part_gmem = (const float *)args->partial_out + (s * rows + row) * dim_v;
    float weight = lse == MINUS_INFINITY ? 0.0f : __expf(lse_gmem[s * rows] - lse);
#pragma unroll
    for (int c = 0; c < DIM_STEPS; c++) {
      float part = 32 * c + lane < dim_v ? part_gmem[32 * c + lane] : 0.0f;
      o[c] += weight == 0.0f ? 0.0f : weight * part;
    }
  }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS) combine(const __grid_constant__ fa_forward_args args) {
  extern __shared__ __align__(16) unsigned char shared[];
  float(*part_smem)[MAX_DIM] = (float(*)[MAX_DIM])shared;
  const fa_arg_problem *p = &args.problem;
  fa_tile tile;
  int team = fa_combine_team(args.splits), warp = (int)threadIdx.x / 32, member = warp % team, lane = threadIdx.x % 32;
  int found = fa_find_query_tile(p, args.tiles, 1, WARPS / team, &tile), row = tile.m0 + warp / team;
  if (!found) return; /* all threads of the CTA alike */

  int inside = row < tile.slot_q;
  int64_t at = fa_statistics_row(p, &tile, inside ? row : tile.m0), rows = fa_statistics_rows(p);
  float sink = row < tile.len_q ? fa_sink_of_head(p, tile.h) : MINUS_INFINITY, o[DIM_STEPS];
  float lse = total_lse((const float *)args.partial_lse + at, rows, args.splits, sink);
  add_splits(o, &args, at, rows, member, team, lse);
#pragma unroll
  for (int c = 0; c < DIM_STEPS; c++) part_smem[warp][32 * c + lane] = o[c];
  __syncthreads(); /* every member's part is there */

  if (!inside || member != 0) return;
  char *out_gmem = fa_head_base(&args.out, ELEMENT_BYTES, tile.b, tile.h, tile.q_start + row);
  for (int d = lane; d < p->dim_v; d += 32) {
    float sum = 0.0f;
    for (int i = 0; i < team; i++) sum += part_smem[warp + i][d];
    fa_store_element(out_gmem + d * args.out.d * ELEMENT_BYTES, sum);
  }
  if (lane == 0) *(float *)fa_head_base(&args.lse, 4, tile.b, tile.h, tile.q_start + row) = lse;
}
