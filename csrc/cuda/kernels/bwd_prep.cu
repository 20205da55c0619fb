/* bwd_prep.cu: before the backward pass: what its kernels need of each row, and the empty sum of dQ.
 *
 *     delta = rowsum(dout * out) - dlse        so that dS = P (dP - delta) takes in the gradient through lse as well
 *     lse   in the base of logarithm of the kernels, +inf for rows without any key, so that P = 0 there without a test
 *
 * One CTA has FA_ROW_PAD rows of the workspace, padding included; eight lanes share a row and read 128 bytes of it at once. Limited by
 * memory: out and dout are read once, dq_sum is written once.
 *
 * Constants: DTYPE, ALIGNED.
 */
#if DTYPE == 2
#define REAL double
#else
#define REAL float
#endif
#define SCORE 0
#define DROPOUT 0

#include "gradient.h"

#define THREADS 256
#define LANES_OF_ROW 8
#define LSE_FACTOR (DTYPE == FA_ARG_F64 || DTYPE == FA_ARG_F32 ? 1.0f : LOG2E)
#define PASS_ROWS (THREADS / LANES_OF_ROW)
#define PASSES (FA_ROW_PAD / PASS_ROWS)

/* An element of out that is 0 takes nothing from dout, which may be NaN where a row sees nothing. */
FA_INLINE REAL add_product(REAL sum, REAL out, REAL dout) { return out == 0 ? sum : sum + out * dout; }

typedef struct __align__(16) {
  uint32_t word[4];
}
chunk_words;

/* 16 bytes of two rows of 16-bit or 32-bit elements. */
FA_INLINE REAL add_chunk(REAL sum, chunk_words out, chunk_words dout) {
  const uint32_t *a = out.word, *b = dout.word;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if (DTYPE == FA_ARG_F32) {
      sum = add_product(sum, __uint_as_float(a[i]), __uint_as_float(b[i]));
    } else if (DTYPE == FA_ARG_BF16) {
      sum = add_product(sum, __uint_as_float(a[i] << 16), __uint_as_float(b[i] << 16));
      sum = add_product(sum, __uint_as_float(a[i] & 0xFFFF0000u), __uint_as_float(b[i] & 0xFFFF0000u));
    } else {
      sum = add_product(sum, cvt_f32_f16((uint16_t)a[i]), cvt_f32_f16((uint16_t)b[i]));
      sum = add_product(sum, cvt_f32_f16((uint16_t)(a[i] >> 16)), cvt_f32_f16((uint16_t)(b[i] >> 16)));
    }
  }
  return sum;
}

/* rowsum(dout * out) of a row of each pass, in all its lanes; a row that is not used is read where the tile starts. The rows of all passes are
 * read before any is summed: what limits is how many loads are on their way. */
FA_INLINE void dot_of_rows(REAL sum[PASSES], const fa_gradient_args *args, const fa_tile *tile, int part) {
  const char *out_gmem[PASSES], *dout_gmem[PASSES];
  int dims = args->problem.dim_v;
#pragma unroll
  for (int pass = 0; pass < PASSES; pass++) {
    int row = tile->m0 + threadIdx.x / LANES_OF_ROW + pass * PASS_ROWS, at = row < tile->len_q ? row : tile->m0;
    out_gmem[pass] = fa_head_base(&args->out, ELEMENT_BYTES, tile->b, tile->h, tile->q_start + at);
    dout_gmem[pass] = fa_head_base(&args->dout, ELEMENT_BYTES, tile->b, tile->h, tile->q_start + at);
    sum[pass] = 0;
  }
  if (ALIGNED) {
    for (int chunk = part; chunk < dims / CHUNK_ELEMENTS; chunk += LANES_OF_ROW) {
      chunk_words out[PASSES], dout[PASSES];
#pragma unroll
      for (int pass = 0; pass < PASSES; pass++) {
        out[pass] = ((const chunk_words *)out_gmem[pass])[chunk];
        dout[pass] = ((const chunk_words *)dout_gmem[pass])[chunk];
      }
#pragma unroll
      for (int pass = 0; pass < PASSES; pass++) sum[pass] = add_chunk(sum[pass], out[pass], dout[pass]);
    }
  } else {
    for (int d = part; d < dims; d += LANES_OF_ROW)
#pragma unroll
      for (int pass = 0; pass < PASSES; pass++)
        sum[pass] = add_product(sum[pass], fa_load_real(out_gmem[pass], DTYPE, d * args->out.d),
                                fa_load_real(dout_gmem[pass], DTYPE, d * args->dout.d));
  }
#pragma unroll
  for (int pass = 0; pass < PASSES; pass++)
#pragma unroll
    for (int step = LANES_OF_ROW / 2; step > 0; step /= 2) sum[pass] += __shfl_xor_sync(0xFFFFFFFFu, sum[pass], step);
}

extern "C" __global__ void __launch_bounds__(THREADS) bwd_prep(const __grid_constant__ fa_gradient_args args) {
  const fa_arg_problem *p = &args.problem;
  fa_tile tile;
  if (!fa_find_query_tile(p, args.pad_tiles, 1, FA_ROW_PAD, &tile) || tile.b == p->batch) return;
  int64_t workspace_row = fa_workspace_row(&args, tile.b, tile.h, tile.q_start) + tile.m0;
  int part = threadIdx.x % LANES_OF_ROW, row0 = threadIdx.x / LANES_OF_ROW;
  REAL lse[PASSES], dlse[PASSES], delta[PASSES];
#pragma unroll
  for (int pass = 0; pass < PASSES; pass++) {
    int i = tile.m0 + row0 + pass * PASS_ROWS, used = i < tile.len_q;
    lse[pass] = used ? *(const REAL *)fa_head_base(&args.lse, sizeof(REAL), tile.b, tile.h, tile.q_start + i) : (REAL)PLUS_INFINITY;
    dlse[pass] = used && args.dlse.data ? *(const REAL *)fa_head_base(&args.dlse, sizeof(REAL), tile.b, tile.h, tile.q_start + i) : 0;
  }
  dot_of_rows(delta, &args, &tile, part);
#pragma unroll
  for (int pass = 0; pass < PASSES; pass++) {
    int64_t row = workspace_row + row0 + pass * PASS_ROWS;
    int used = tile.m0 + row0 + pass * PASS_ROWS < tile.len_q;
    if (part != 0) continue;
    ((REAL *)args.lse_rows)[row] = lse[pass] == fa_minus_infinity() ? (REAL)PLUS_INFINITY : lse[pass] * (REAL)LSE_FACTOR;
    ((REAL *)args.delta_rows)[row] = used ? delta[pass] - dlse[pass] : 0;
  }
  if (args.dq_sum) {
    const chunk_words zeros = {{0, 0, 0, 0}};
    chunk_words *sum_gmem = (chunk_words *)((float *)args.dq_sum + workspace_row * args.dq_columns);
    for (int chunk = threadIdx.x; chunk < FA_ROW_PAD * args.dq_columns / 4; chunk += THREADS) sum_gmem[chunk] = zeros;
  }
}
