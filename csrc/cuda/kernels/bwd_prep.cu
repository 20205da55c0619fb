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

/* rowsum(dout * out), in all lanes of the row. */
FA_INLINE REAL dot_of_row(const fa_gradient_args *args, const fa_tile *tile, int row, int part) {
  const char *out_gmem = fa_head_base(&args->out, ELEMENT_BYTES, tile->b, tile->h, tile->q_start + row);
  const char *dout_gmem = fa_head_base(&args->dout, ELEMENT_BYTES, tile->b, tile->h, tile->q_start + row);
  int dims = args->problem.dim_v;
  REAL sum = 0;
  if (ALIGNED) {
    for (int chunk = part; chunk < dims / CHUNK_ELEMENTS; chunk += LANES_OF_ROW)
      sum = add_chunk(sum, ((const chunk_words *)out_gmem)[chunk], ((const chunk_words *)dout_gmem)[chunk]);
  } else {
    for (int d = part; d < dims; d += LANES_OF_ROW)
      sum = add_product(sum, fa_load_real(out_gmem, DTYPE, d * args->out.d), fa_load_real(dout_gmem, DTYPE, d * args->dout.d));
  }
#pragma unroll
  for (int step = LANES_OF_ROW / 2; step > 0; step /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step);
  return sum;
}

extern "C" __global__ void __launch_bounds__(THREADS) bwd_prep(const __grid_constant__ fa_gradient_args args) {
  const fa_arg_problem *p = &args.problem;
  fa_tile tile;
  if (!fa_find_query_tile(p, args.pad_tiles, 1, FA_ROW_PAD, &tile) || tile.b == p->batch) return;
  int64_t workspace_row = fa_workspace_row(&args, tile.b, tile.h, tile.q_start) + tile.m0;
  int part = threadIdx.x % LANES_OF_ROW;
#pragma unroll
  for (int row = threadIdx.x / LANES_OF_ROW; row < FA_ROW_PAD; row += THREADS / LANES_OF_ROW) {
    int i = tile.m0 + row, used = i < tile.len_q;
    REAL delta = dot_of_row(&args, &tile, used ? i : tile.m0, part), lse = PLUS_INFINITY;
    if (used) {
      lse = *(const REAL *)fa_head_base(&args.lse, sizeof(REAL), tile.b, tile.h, tile.q_start + i);
      lse = lse == fa_minus_infinity() ? (REAL)PLUS_INFINITY : DTYPE == FA_ARG_F64 || DTYPE == FA_ARG_F32 ? lse : lse * (REAL)LOG2E;
      if (args.dlse.data) delta -= *(const REAL *)fa_head_base(&args.dlse, sizeof(REAL), tile.b, tile.h, tile.q_start + i);
    }
    if (part != 0) continue;
    ((REAL *)args.lse_rows)[workspace_row + row] = lse;
    ((REAL *)args.delta_rows)[workspace_row + row] = used ? delta : 0;
  }
  if (args.dq_sum) {
    const chunk_words zeros = {{0, 0, 0, 0}};
    chunk_words *sum_gmem = (chunk_words *)((float *)args.dq_sum + workspace_row * args.dq_columns);
    for (int chunk = threadIdx.x; chunk < FA_ROW_PAD * args.dq_columns / 4; chunk += THREADS) sum_gmem[chunk] = zeros;
  }
}
