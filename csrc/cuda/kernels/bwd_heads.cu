/* bwd_heads.cu: gradients of what a head has one of, as f64 sums in a fixed order; one CTA a head.
 *
 *     dsink  = - sum over rows of exp(sink - lse) * delta      the sink's own probability, by which every P shrinks
 *     dslope = sum over query tiles of what the row kernel left in dalibi_tiles
 *
 * Constants: DTYPE.
 */
#if DTYPE == 2
#define REAL double
#else
#define REAL float
#endif
#define ALIGNED 0
#define SCORE 0
#define DROPOUT 0

#include "gradient.h"

#define THREADS 256

FA_INLINE void store_real(const fa_arg_heads *t, int b, int h, double x) {
  int64_t at = b * t->b + h * t->h;
  if (t->dtype == FA_ARG_F64)
    ((double *)t->data)[at] = x;
  else if (t->dtype == FA_ARG_F32)
    ((float *)t->data)[at] = (float)x;
  else
    ((uint16_t *)t->data)[at] = (uint16_t)fa_pack((float)x, 0.0f);
}

/* The CTA's sum, in thread 0. */
FA_INLINE double sum_of_cta(double *sums, double mine) {
  __syncthreads(); /* the last call's result has been read */
  sums[threadIdx.x] = mine;
  for (int half = THREADS / 2; half > 0; half /= 2) {
    __syncthreads(); /* the sums of the step before are there */
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  return sums[0];
}

extern "C" __global__ void __launch_bounds__(THREADS) bwd_heads(const __grid_constant__ fa_gradient_args args) {
  extern __shared__ __align__(128) unsigned char shared[]; /* f64 [THREADS] */
  double *sums = (double *)shared;
  const fa_arg_problem *p = &args.problem;
  int h = (int)blockIdx.x;
  REAL sink = fa_sink_of_head(p, h);
  double dsink = 0, dslope = 0;
  for (int b = 0; b < p->batch; b++) {
    fa_tile tile;
    tile.b = b;
    fa_read_lengths(p, &tile);
    int64_t row0 = fa_workspace_row(&args, b, h, tile.q_start);
    double slope_of_batch = 0;
    if (args.dsinks.data && sink != fa_minus_infinity())
      for (int i = threadIdx.x; i < tile.len_q; i += THREADS)
        dsink -= (double)fa_weight(sink, ((const REAL *)args.lse_rows)[row0 + i]) * ((const REAL *)args.delta_rows)[row0 + i];
    if (args.dalibi.data)
      for (int t = threadIdx.x; t < fa_ceil_div(tile.len_q, args.row_tile); t += THREADS)
        slope_of_batch += ((const double *)args.dalibi_tiles)[row0 / args.row_tile + t];
    dslope += slope_of_batch;
    if (args.dalibi.data && args.dalibi.b) {
      double sum = sum_of_cta(sums, slope_of_batch);
      if (threadIdx.x == 0) store_real(&args.dalibi, b, h, sum);
    }
  }
  if (args.dsinks.data) {
    double sum = sum_of_cta(sums, dsink);
    if (threadIdx.x == 0) store_real(&args.dsinks, 0, h, sum);
  }
  if (args.dalibi.data && !args.dalibi.b) {
    double sum = sum_of_cta(sums, dslope);
    if (threadIdx.x == 0) store_real(&args.dalibi, 0, h, sum);
  }
}
