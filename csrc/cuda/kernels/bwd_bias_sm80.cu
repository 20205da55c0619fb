/* bwd_bias_sm80.cu: the gradient of the bias, on mma.sync for sm_80 and every later GPU.
 *
 * One CTA owns a tile of BLOCK_M = 16 * WARPS rows by BLOCK_N columns of dbias (bias_tile.h); for each tile of scores that adds to it S
 * and dP are computed once more, and dS is summed in registers. Each warp has 16 rows and shares nothing but the loaded tiles.
 *
 * Shared memory, bytes, in this order: Q BLOCK_M * HEAD_DIM * size, dO BLOCK_M * DIM_V * size, K BLOCK_N * HEAD_DIM * size, V BLOCK_N *
 * DIM_V * size, in fp32 4 more for each row; at the end the f32 sums, BLOCK_M * BLOCK_N * 4, take the same place. Not pipelined: two CTAs on an SM hide each other's
 * loads.
 *
 * Constants: DTYPE, HEAD_DIM and DIM_V (padded to 32), BLOCK_N, WARPS, ALIGNED, DROPOUT.
 */
#define REAL float
#define STEP_UNROLL 2
#define SCORE 1

#include "gradient_mma.h"
#include "bias_tile.h"

#define THREADS (32 * WARPS)
#define BLOCK_M (16 * WARPS)
#define S_N (BLOCK_N / 8)
#define K_ROW_BYTES (HEAD_DIM * ELEMENT_BYTES)
#define V_ROW_BYTES (DIM_V * ELEMENT_BYTES)

/* dS of one tile of scores joins the sum. */
FA_INLINE void add_tile(float sum[S_N][4], const fa_gradient_args *args, const fa_tile *tile, uint32_t base_smem, int m0, int n0) {
  const fa_arg_problem *p = &args->problem;
  uint32_t q_smem = base_smem, dout_smem = q_smem + BLOCK_M * (K_ROW_BYTES + SCALE_BYTES);
  uint32_t k_smem = dout_smem + BLOCK_M * (V_ROW_BYTES + SCALE_BYTES);
  uint32_t v_smem = k_smem + BLOCK_N * (K_ROW_BYTES + SCALE_BYTES);
  int warp_row = threadIdx.x / 32 * 16, row = m0 + warp_row + threadIdx.x % 32 / 4, h_k = tile->h / p->group;
  fa_load_tile(q_smem, fa_head_base(&args->q, ELEMENT_BYTES, tile->b, tile->h, tile->q_start + m0), &args->q, tile->len_q - m0, p->dim_qk,
               BLOCK_M, HEAD_DIM, THREADS);
  fa_load_tile(dout_smem, fa_head_base(&args->dout, ELEMENT_BYTES, tile->b, tile->h, tile->q_start + m0), &args->dout, tile->len_q - m0,
               p->dim_v, BLOCK_M, DIM_V, THREADS);
  fa_load_tile(k_smem, fa_head_base(&args->k, ELEMENT_BYTES, tile->b, h_k, tile->k_start + n0), &args->k, tile->len_k - n0, p->dim_qk,
               BLOCK_N, HEAD_DIM, THREADS);
  fa_load_tile(v_smem, fa_head_base(&args->v, ELEMENT_BYTES, tile->b, h_k, tile->k_start + n0), &args->v, tile->len_k - n0, p->dim_v,
               BLOCK_N, DIM_V, THREADS);
  cp_async_commit_group();
  float s[S_N][4], dp[S_N][4], lse[2], delta[2];
  fa_read_row_statistics(args, fa_workspace_row(args, tile->b, tile->h, tile->q_start) + row, lse, delta);
  fa_gradient_head head = fa_gradient_of_head(p, tile, tile->h);
  cp_async_wait_group(0);
  fa_split_tile(q_smem, BLOCK_M, HEAD_DIM, THREADS);
  fa_split_tile(dout_smem, BLOCK_M, DIM_V, THREADS);
  fa_split_tile(k_smem, BLOCK_N, HEAD_DIM, THREADS);
  fa_split_tile(v_smem, BLOCK_N, DIM_V, THREADS);
  __syncthreads(); /* the four tiles have landed for all */
  fa_tile_operand q = {q_smem, FA_BY_ROWS, warp_row, K_ROW_BYTES, BLOCK_M}, k = {k_smem, FA_BY_ROWS, 0, K_ROW_BYTES, BLOCK_N};
  fa_tile_operand dout = {dout_smem, FA_BY_ROWS, warp_row, V_ROW_BYTES, BLOCK_M}, v = {v_smem, FA_BY_ROWS, 0, V_ROW_BYTES, BLOCK_N};
  fa_product_of_rows(s, 1, S_N, HEAD_DIM, q, k);
  fa_product_of_rows(dp, 1, S_N, DIM_V, dout, v);
  fa_gradient_wish wish = {1, 0};
  fa_gradient_fragments(s, dp, S_N, p, &head, row, n0, 0, lse, delta, wish);
#pragma unroll
  for (int n = 0; n < S_N; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) sum[n][e] += dp[n][e];
  __syncthreads(); /* all warps are done with the tiles */
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) bwd_bias_sm80(const __grid_constant__ fa_gradient_args args) {
  extern __shared__ __align__(128) unsigned char shared[];
  fa_bias_work work = fa_find_bias_tile(&args, BLOCK_M, BLOCK_N);
  float sum[S_N][4];
#pragma unroll
  for (int n = 0; n < S_N; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) sum[n][e] = 0.0f;
  fa_tile tile;
  for (tile.b = work.b.lo; tile.b < work.b.hi; tile.b++) {
    fa_read_lengths(&args.problem, &tile);
    for (tile.h = work.h.lo; tile.h < work.h.hi; tile.h++)
      for (int m0 = work.m.lo; m0 < work.m.hi; m0 += BLOCK_M)
        for (int n0 = work.n.lo; n0 < work.n.hi; n0 += BLOCK_N)
          if (fa_bias_tile_is_visible(&args.problem, &tile, m0, BLOCK_M, n0, BLOCK_N))
            add_tile(sum, &args, &tile, smem_address(shared), m0, n0);
  }
  float *sum_smem = (float *)shared;
  int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
#pragma unroll
  for (int n = 0; n < S_N; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) sum_smem[(row + 8 * (e >> 1)) * BLOCK_N + 8 * n + 2 * (threadIdx.x & 3) + (e & 1)] = sum[n][e];
  __syncthreads(); /* the sums of all warps are there */
  fa_write_bias_tile(&args, &work, sum_smem, BLOCK_M, BLOCK_N, THREADS);
}
