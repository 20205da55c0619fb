/* probs.cu: exp(score - row max) of every pair, for those who ask for it (return_attn_probs). The only quadratic output there is; the sign bit marks
 * a dropped pair, and everything invisible or beyond the sequences is 0.
 *
 * A warp owns a row of probs, (batch, heads_q, up128(seqlen_q), up128(seqlen_k)): it walks over the keys once for the maximum and once to write.
 *
 * Constants: DTYPE.
 */
#define REAL float
#define ALIGNED 0
#include "args.h"
#if DTYPE == 2 /* FA_ARG_F64; the only choice of a type by the preprocessor */
#undef REAL
#define REAL double
#endif

#include "plain.h"

FA_INLINE void store_prob(char *row_gmem, int64_t at, REAL x) {
  if (DTYPE == FA_ARG_F64)
    ((double *)row_gmem)[at] = x;
  else
    fa_store_element(row_gmem + at * ELEMENT_BYTES, (float)x);
}

extern "C" __global__ void __launch_bounds__(32 * PLAIN_WARPS) probs(const __grid_constant__ fa_forward_args args) {
  const fa_arg_problem *p = &args.problem;
  int rows = fa_ceil_div(p->seqlen_q, 128) * 128, columns = fa_ceil_div(p->seqlen_k, 128) * 128, lane = threadIdx.x % 32;
  int64_t index = (int64_t)blockIdx.x * PLAIN_WARPS + threadIdx.x / 32;
  int row = (int)(index % rows);
  fa_tile tile;
  tile.h = (int)(index / rows % p->heads_q);
  tile.b = (int)(index / rows / p->heads_q);
  tile.m0 = row;
  fa_read_lengths(p, &tile);

  plain_row r = plain_row_of(&args, &tile, row);
  fa_philox_key key = fa_dropout_key_of(p);
  REAL max = fa_minus_infinity();
  for (int n0 = r.lo; n0 < r.hi; n0 += 32) {
    REAL score = plain_score(&r, n0 + lane);
    max = score > max ? score : max;
  }
  max = plain_max(max);
  char *row_gmem = fa_head_base(&args.probs, ELEMENT_BYTES, tile.b, tile.h, row);
  for (int j = lane; j < columns; j += 32) {
    REAL score = plain_score(&r, j);
    REAL prob = score == fa_minus_infinity() ? 0 : (REAL)exp(score - max);
    int dropped = row < tile.len_q && j < tile.len_k && p->dropout_threshold && fa_is_dropped(p, key, tile.b, tile.h, row, j);
    store_prob(row_gmem, j * args.probs.d, dropped ? -prob : prob);
  }
}
