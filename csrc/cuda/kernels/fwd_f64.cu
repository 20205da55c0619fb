/* fwd_f64.cu: forward attention in double precision on CUDA cores, for gradient checks. It reads like the paper's Algorithm 1 with a tile of one row
 * and 32 keys.
 *
 * A warp owns a query row. Each lane scores one key of the 32; the warp agrees on the new maximum; then the lanes change roles and each owns every
 * 32nd column of O, to which the 32 keys' values are added one after another, only where the pair is visible. A CTA is four rows; no shared
 * memory, no barrier. K and V come through L1. Limited by load instructions.
 *
 * Constants: DTYPE (f64).
 */
#define REAL double
#define ALIGNED 0

#include "plain.h"

#define MAX_HEAD_DIM 256
#define LANE_COLUMNS (MAX_HEAD_DIM / 32)

/* O, the maximum and the sum of one row. Column lane + 32 * c is o[c]. */
typedef struct {
  double o[LANE_COLUMNS], max, sum;
} row_state;

FA_INLINE void add_keys(row_state *s, const plain_row *r, fa_philox_key key, int n0) {
  int lane = threadIdx.x % 32;
  double score = plain_score(r, n0 + lane), top = plain_max(score);
  unsigned visible = __ballot_sync(0xFFFFFFFFu, !(score == fa_minus_infinity()));
  if (top > s->max) {
    double rescale = exp(s->max - top); /* 0 at the first visible key */
    s->max = top;
    s->sum *= rescale;
#pragma unroll
    for (int c = 0; c < LANE_COLUMNS; c++) s->o[c] *= rescale;
  }
  double weight = visible >> lane & 1 ? exp(score - s->max) : 0.0;
  s->sum += plain_sum(weight);
  if (r->p->dropout_threshold && fa_is_dropped(r->p, key, r->tile.b, r->tile.h, r->row, n0 + lane)) weight = 0.0;
  for (; visible; visible &= visible - 1) {
    int j = __ffs(visible) - 1;
    double w = __shfl_sync(0xFFFFFFFFu, weight, j);
#pragma unroll
    for (int c = 0; c < LANE_COLUMNS; c++)
      if (lane + 32 * c < r->p->dim_v && w != 0.0)
        s->o[c] += w * ((const double *)r->v_gmem)[(n0 + j) * r->v_row + (lane + 32 * c) * r->v_dim];
  }
}

extern "C" __global__ void __launch_bounds__(32 * PLAIN_WARPS) fwd_f64(const __grid_constant__ fa_forward_args args) {
  const fa_arg_problem *p = &args.problem;
  fa_tile tile;
  if (!fa_find_query_tile(p, args.tiles, 1, PLAIN_WARPS, &tile)) return;
  int lane = threadIdx.x % 32, row = tile.m0 + (int)threadIdx.x / 32;
  if (row >= tile.slot_q) return;

  plain_row r = plain_row_of(&args, &tile, row);
  fa_philox_key key = fa_dropout_key_of(p);
  row_state s = {{0}, fa_minus_infinity(), 0.0};
  for (int n0 = r.lo / 32 * 32; n0 < r.hi; n0 += 32) add_keys(&s, &r, key, n0);

  double sink = row < tile.len_q ? fa_sink_of_head(p, tile.h) : fa_minus_infinity();
  if (sink > fa_minus_infinity()) {
    double top = sink > s.max ? sink : s.max, rescale = exp(s.max - top);
    s.sum = s.sum * rescale + exp(sink - top);
    s.max = top;
#pragma unroll
    for (int c = 0; c < LANE_COLUMNS; c++) s.o[c] *= rescale;
  }
  double factor = s.sum == 0.0 ? 0.0 : p->keep_scale / s.sum;
  double *out_gmem = (double *)fa_head_base(&args.out, 8, tile.b, tile.h, tile.q_start + row);
#pragma unroll
  for (int c = 0; c < LANE_COLUMNS; c++)
    if (lane + 32 * c < p->dim_v) out_gmem[(lane + 32 * c) * args.out.d] = factor == 0.0 ? 0.0 : s.o[c] * factor;
  if (lane == 0)
    *(double *)fa_head_base(&args.lse, 8, tile.b, tile.h, tile.q_start + row) = s.sum == 0.0 ? fa_minus_infinity() : s.max + log(s.sum);
}
