/* bwd_rows_sm80.cu: dQ without atomics, and each tile's share of the gradient of the ALiBi slopes, on mma.sync; bitwise reproducible.
 *
 * The mirror image of bwd_sm80.cu: one CTA owns BLOCK_M = 16 * WARPS query rows of one head, each warp 16 of them. Q and dO stay, K and
 * V pass by.
 *
 *            keys -->  n       n+1     n+2          each step, for one tile of BLOCK_N keys, in each warp by itself:
 *          +-------+-------+-------+                    S  = Q K^T    dP = dO V^T
 *   warp 0 |       |       |       |                    P  = exp(S - lse)   dS = P (dP - delta)
 *   warp 1 |   S   |   S   |   S   |  ...               dQ += dS K         dS from the registers of dP
 *   ...    |       |       |       |
 *          +-------+-------+-------+
 *
 * Shared memory, bytes, in this order: Q BLOCK_M * HEAD_DIM * size, dO BLOCK_M * DIM_V * size, K STAGES * BLOCK_N * HEAD_DIM * size,
 * V STAGES * BLOCK_N * DIM_V * size; fp32: 4 more for each row (split.h). Loads are cp.async; with two stages the next tile arrives during this one: one barrier a step.
 *
 * Registers a thread: dQ HEAD_DIM / 2, S and dP BLOCK_N. S and dP are computed once more than in bwd_sm80.cu: seven products in all,
 * not five.
 *
 * Constants: DTYPE, HEAD_DIM and DIM_V (padded to 32), BLOCK_N, WARPS, STAGES, ALIGNED, SCORE, DROPOUT.
 */
#define REAL float
#define STEP_UNROLL 2 /* more of them side by side take registers that dQ needs */

#include "gradient_mma.h"
#include "visible.h"

#define THREADS (32 * WARPS)
#define BLOCK_M (16 * WARPS)
#define S_N (BLOCK_N / 8)
#define DQ_N (HEAD_DIM / 8)
#define K_ROW_BYTES (HEAD_DIM * ELEMENT_BYTES)
#define V_ROW_BYTES (DIM_V * ELEMENT_BYTES)
#define K_TILE_BYTES (BLOCK_N * (K_ROW_BYTES + SCALE_BYTES))
#define V_TILE_BYTES (BLOCK_N * (V_ROW_BYTES + SCALE_BYTES))
#define Q_TILE_BYTES (BLOCK_M * (K_ROW_BYTES + SCALE_BYTES))
#define DO_TILE_BYTES (BLOCK_M * (V_ROW_BYTES + SCALE_BYTES))

typedef struct {
  uint32_t q, dout, k, v;
} shared_map;

/* What a lane carries from tile to tile. */
typedef struct {
  float dq[DQ_N][4];
  float lse[2], delta[2];
  fa_slope_sums slope_sums[2];
} warp_state;

FA_INLINE void load_key_side(const fa_gradient_args *args, const fa_tile *tile, const shared_map *smem, int n0, int stage) {
  int h_k = tile->h / args->problem.group, keys = tile->len_k - n0;
  const char *k_gmem = fa_head_base(&args->k, ELEMENT_BYTES, tile->b, h_k, tile->k_start + n0);
  const char *v_gmem = fa_head_base(&args->v, ELEMENT_BYTES, tile->b, h_k, tile->k_start + n0);
  fa_load_tile(smem->k + stage * K_TILE_BYTES, k_gmem, &args->k, keys, args->problem.dim_qk, BLOCK_N, HEAD_DIM, THREADS);
  fa_load_tile(smem->v + stage * V_TILE_BYTES, v_gmem, &args->v, keys, args->problem.dim_v, BLOCK_N, DIM_V, THREADS);
}

/* dQ += dS K with dS in fragments. */
FA_INLINE void accumulate(float dq[DQ_N][4], float ds[S_N][4], uint32_t k_smem) {
  int lane = (int)fa_opaque(threadIdx.x % 32);
  fa_tile_operand k_tile = {k_smem, FA_BY_COLUMNS, 0, K_ROW_BYTES, BLOCK_N};
#pragma unroll
  for (int step = 0; step < BLOCK_N / FA_STEP_ROWS; step++) {
    fa_operand_a a;
    float back[2];
    if (DTYPE == FA_ARG_F32)
      fa_split_accumulators(&a, &ds[2 * step], 1, fa_scales_of(k_tile) + 64 * step, back);
    else
      fa_operand_from_accumulator(&a, ds, step);
#pragma unroll
    for (int n = 0; n < DQ_N; n += 2) {
      fa_operand_b k[2];
      fa_load_operand_b(k, k_tile, lane, 8 * n, step);
#pragma unroll
      for (int half = 0; half < 2; half++) fa_mma_back(dq[n + half], &a, &k[half], back);
    }
  }
}

/* Infinite and NaN elements of K become 0, so that they reach dQ only through the dS of the rows that see them, which is NaN. */
FA_INLINE void clear_nonfinite(uint32_t k_smem) {
#pragma unroll 1
  for (uint32_t at = 4 * threadIdx.x; at < BLOCK_N * K_ROW_BYTES; at += 4 * THREADS) {
    uint32_t word = ld_shared_b32(k_smem + at);
    fa_flag_nonfinite(&word);
    st_shared_b32(k_smem + at, word);
  }
  __syncthreads(); /* K is finite for all */
}

/* One tile of keys; `mine` whether any row of this warp sees it, `full` whether all rows of the CTA see all of it. */
FA_INLINE void key_step(warp_state *w, const fa_gradient_args *args, const fa_gradient_head *head, const shared_map *smem, int row0, int n0,
                        int stage, int mine, int full) {
  int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * 16, poisoned = 0;
  uint32_t k_smem = smem->k + stage * K_TILE_BYTES;
  float s[S_N][4], dp[S_N][4];
#pragma unroll
  for (int n = 0; n < S_N; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) dp[n][e] = 0.0f;
  if (mine) {
    fa_tile_operand q = {smem->q, FA_BY_ROWS, warp_row, K_ROW_BYTES, BLOCK_M}, k = {k_smem, FA_BY_ROWS, 0, K_ROW_BYTES, BLOCK_N};
    fa_tile_operand dout = {smem->dout, FA_BY_ROWS, warp_row, V_ROW_BYTES, BLOCK_M};
    fa_tile_operand v = {smem->v + stage * V_TILE_BYTES, FA_BY_ROWS, 0, V_ROW_BYTES, BLOCK_N};
    fa_product_of_rows(s, 1, S_N, HEAD_DIM, q, k);
    fa_product_of_rows(dp, 1, S_N, DIM_V, dout, v);
    poisoned = fa_has_nonfinite(s, S_N);
    fa_gradient_wish wish = {0, args->dalibi_tiles ? w->slope_sums : 0};
    fa_gradient_fragments(s, dp, S_N, &args->problem, head, row0 + (lane >> 2), n0, full, w->lse, w->delta, wish);
  }
  if ((SCORE || !full) && __syncthreads_or(poisoned)) clear_nonfinite(k_smem); /* all warps are done with K as it was */
  if (mine) accumulate(w->dq, dp, k_smem);
}

/* Walks over the key tiles with dQ in registers. */
FA_INLINE void walk_keys(warp_state *w, const fa_gradient_args *args, const fa_tile *tile, const shared_map *smem) {
  const fa_arg_problem *p = &args->problem;
  int row0 = tile->m0 + threadIdx.x / 32 * 16, m1 = fa_min(tile->m0 + BLOCK_M, tile->len_q), stage = 0;
  fa_range seen = fa_visited_keys(p->rule, tile->len_q, tile->len_k, tile->m0, m1);
  fa_range warp_seen = fa_visited_keys(p->rule, tile->len_q, tile->len_k, row0, fa_min(row0 + 16, tile->len_q));
  if (row0 >= tile->len_q) warp_seen.hi = 0;
  int last = m1 <= tile->m0 || seen.hi <= seen.lo ? -1 : fa_ceil_div(seen.hi, BLOCK_N) - 1;
  fa_key_walk walk = fa_walk_keys(p, tile, fa_max(seen.lo, 0) / BLOCK_N, last, BLOCK_N);
  int n = last >= 0 ? fa_walk_next(&walk) : -1;
  if (n < 0) return;

  fa_gradient_head head = fa_gradient_of_head(p, tile, tile->h);
  const char *q_gmem = fa_head_base(&args->q, ELEMENT_BYTES, tile->b, tile->h, tile->q_start + tile->m0);
  const char *dout_gmem = fa_head_base(&args->dout, ELEMENT_BYTES, tile->b, tile->h, tile->q_start + tile->m0);
  fa_load_tile(smem->q, q_gmem, &args->q, tile->len_q - tile->m0, p->dim_qk, BLOCK_M, HEAD_DIM, THREADS);
  fa_load_tile(smem->dout, dout_gmem, &args->dout, tile->len_q - tile->m0, p->dim_v, BLOCK_M, DIM_V, THREADS);
  load_key_side(args, tile, smem, n * BLOCK_N, 0);
  cp_async_commit_group();
  cp_async_wait_group(0);
  fa_split_tile(smem->q, BLOCK_M, HEAD_DIM, THREADS);
  fa_split_tile(smem->dout, BLOCK_M, DIM_V, THREADS);
  while (n >= 0) {
    int next = fa_walk_next(&walk), n0 = n * BLOCK_N;
    cp_async_wait_group(0);
    fa_split_tile(smem->k + stage * K_TILE_BYTES, BLOCK_N, HEAD_DIM, THREADS);
    fa_split_tile(smem->v + stage * V_TILE_BYTES, BLOCK_N, DIM_V, THREADS);
    __syncthreads(); /* K and V of this tile have landed for all; all warps are done with the other stage */
    if (STAGES == 2 && next >= 0) load_key_side(args, tile, smem, next * BLOCK_N, stage ^ 1);
    cp_async_commit_group();
    int mine = n0 < warp_seen.hi && n0 + BLOCK_N > warp_seen.lo;
    int full = fa_tile_is_full(p, &head, tile->m0, BLOCK_M, n0, BLOCK_N);
    key_step(w, args, &head, smem, row0, n0, stage, mine, full);
    if (STAGES == 1) {
      __syncthreads(); /* all warps are done with K and V */
      if (next >= 0) load_key_side(args, tile, smem, next * BLOCK_N, 0);
      cp_async_commit_group();
    }
    if (STAGES == 2) stage ^= 1;
    n = next;
  }
}

/* Rows past the used ones that have a place in the tensor get 0. */
FA_INLINE void store_dq(const fa_gradient_args *args, const fa_tile *tile, float dq[DQ_N][4], int row0) {
  int lane = threadIdx.x % 32;
  float scale = (float)args->problem.scale;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    int i = row0 + (lane >> 2) + 8 * r, used = i < tile->len_q;
    if (i >= tile->slot_q) continue;
    char *row_gmem = fa_head_base(&args->dq, ELEMENT_BYTES, tile->b, tile->h, tile->q_start + i);
#pragma unroll
    for (int n = 0; n < DQ_N; n++)
      fa_store_pair(row_gmem, args->dq.d, args->problem.dim_qk, 8 * n + 2 * (lane & 3), used ? dq[n][2 * r] * scale : 0.0f,
                    used ? dq[n][2 * r + 1] * scale : 0.0f);
  }
}

FA_INLINE double quad_sum(double x) {
  x += __shfl_xor_sync(0xFFFFFFFFu, x, 1);
  return x + __shfl_xor_sync(0xFFFFFFFFu, x, 2);
}

/* The tile's share of the gradient of the slope, in a fixed order. */
FA_INLINE void store_slope_sum(const fa_gradient_args *args, const fa_tile *tile, const warp_state *w, int row0, double *warp_sums) {
  double sum = 0;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const fa_slope_sums *mine = &w->slope_sums[r];
    fa_slope_sums all = {quad_sum(mine->p), quad_sum(mine->p_dp), quad_sum(mine->p_dist), quad_sum(mine->p_dp_dist)};
    sum += fa_slope_of_row(args, tile, row0 + 8 * r, &all, w->lse[r]);
  }
#pragma unroll
  for (int step = 16; step > 2; step /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step); /* a quad has one sum */
  __syncthreads(); /* all warps are done with the tiles, whose memory the sums take */
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = sum;
  __syncthreads(); /* the sums of all warps are there */
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < WARPS; warp++) sum += warp_sums[warp];
  int64_t row = fa_workspace_row(args, tile->b, tile->h, tile->q_start) + tile->m0;
  ((double *)args->dalibi_tiles)[row / BLOCK_M] = sum;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) bwd_rows_sm80(const __grid_constant__ fa_gradient_args args) {
  extern __shared__ __align__(128) unsigned char shared[];
  fa_tile tile;
  if (!fa_find_query_tile(&args.problem, args.row_tiles, 1, BLOCK_M, &tile)) return;
  shared_map smem;
  smem.q = smem_address(shared);
  smem.dout = smem.q + Q_TILE_BYTES;
  smem.k = smem.dout + DO_TILE_BYTES;
  smem.v = smem.k + STAGES * K_TILE_BYTES;

  int row0 = tile.m0 + threadIdx.x / 32 * 16;
  warp_state w = {{{0}}, {0, 0}, {0, 0}, {{0, 0, 0, 0}, {0, 0, 0, 0}}};
  if (tile.len_q > tile.m0) {
    fa_read_row_statistics(&args, fa_workspace_row(&args, tile.b, tile.h, tile.q_start) + row0 + threadIdx.x % 32 / 4, w.lse, w.delta);
    walk_keys(&w, &args, &tile, &smem);
    if (args.dalibi_tiles) store_slope_sum(&args, &tile, &w, row0 + (int)threadIdx.x % 32 / 4, (double *)shared);
  }
  if (args.dq.data) store_dq(&args, &tile, w.dq, row0);
}
