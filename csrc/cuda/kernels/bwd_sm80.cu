/* bwd_sm80.cu: gradients of K and V, and dQ by addition, on mma.sync for sm_80 and every later GPU; fp16, bf16, and fp32 in three TF32 terms.
 *
 * One CTA owns BLOCK_N keys of one key head. K and V stay; Q and dO of every query tile that sees them pass by, for each query head of the
 * group, so dK and dV are complete in registers at the end and are written once: no atomics, bitwise stable.
 *
 *          queries -->  m      m+1     m+2            each step, for one tile of BLOCK_M rows:
 *            +-------+-------+-------+                   S  = Q K^T     dP = dO V^T            warps split the tile S_WARPS x ...
 *    BLOCK_N |       |       |       |                   P  = exp(S - lse)   dS = P (dP - delta)   registers, then to shared memory
 *      keys  |   S   |   S   |   S   |  head h           --- barrier ---
 *            |       |       |       |                   dV += P^T dO   dK += dS^T Q           warps split keys KV_WARPS x dims
 *            +-------+-------+-------+                   dQ  = dS K -> red.add to dq_sum       warps split rows DQ_WARPS x dims
 *               ...then head h + 1 of the group
 *
 * Shared memory, bytes, in this order (rows swizzled, tile.h):
 *   K    BLOCK_N * HEAD_DIM * size          V    BLOCK_N * DIM_V * size
 *   Q    STAGES * BLOCK_M * HEAD_DIM * size dO   STAGES * BLOCK_M * DIM_V * size
 *   P    BLOCK_M * BLOCK_N * size           dS   the same
 * With bf16, dim 128, 64 x 128 and two stages: 32 + 32 + 32 + 32 + 16 + 16 = 160 KiB.
 *
 * Order: Q and dO of the next tile are requested (cp.async) right after the barrier that ends the previous one, so they have a whole step to
 * arrive; two barriers a step. With STAGES == 1 they are requested at the end of a step behind one more barrier.
 *
 * Registers a thread: dK and dV take BLOCK_N * (HEAD_DIM + DIM_V) / THREADS, S and dP 2 * BLOCK_M * BLOCK_N / THREADS, dQ reuses the room of the
 * latter: 128 + 64 at dim 128. tiles_bwd.def keeps this under about 200. What limits: shared-memory reads of the five products (about 2 cycles a
 * mma, against 1.6 of the tensor cores on sm_90) and the exponential phase, during which the tensor cores wait.
 *
 * Constants: DTYPE, HEAD_DIM and DIM_V (padded to 32), BLOCK_M, BLOCK_N, WARPS, S_WARPS, KV_WARPS, DQ_WARPS, STAGES, ALIGNED, SCORE, DROPOUT, ADD_DQ
 * (0: dQ is left to bwd_rows_sm80.cu or not wanted).
 */
#define REAL float

#include "dq_sum.h"
#include "gradient_mma.h"

#define THREADS (32 * WARPS)
#define K_ROW_BYTES (HEAD_DIM * ELEMENT_BYTES)
#define V_ROW_BYTES (DIM_V * ELEMENT_BYTES)
#define S_ROW_BYTES (BLOCK_N * ELEMENT_BYTES)
#define K_TILE_BYTES (BLOCK_N * K_ROW_BYTES)
#define V_TILE_BYTES (BLOCK_N * V_ROW_BYTES)
#define Q_TILE_BYTES (BLOCK_M * K_ROW_BYTES)
#define DO_TILE_BYTES (BLOCK_M * V_ROW_BYTES)
#define S_TILE_BYTES (BLOCK_M * S_ROW_BYTES)

/* What a warp owns of S and dP, of dK and dV, of dQ; fragments of 16 rows by 8 columns. */
#define S_ROWS (BLOCK_M / S_WARPS)
#define S_COLUMNS (BLOCK_N / (WARPS / S_WARPS))
#define S_M (S_ROWS / 16)
#define S_N (S_COLUMNS / 8)
#define KV_ROWS (BLOCK_N / KV_WARPS)
#define KV_M (KV_ROWS / 16)
#define DK_COLUMNS (HEAD_DIM / (WARPS / KV_WARPS))
#define DV_COLUMNS (DIM_V / (WARPS / KV_WARPS))
#define DK_N (DK_COLUMNS / 8)
#define DV_N (DV_COLUMNS / 8)
#define DQ_ROWS (BLOCK_M / DQ_WARPS)
#define DQ_COLUMNS (HEAD_DIM / (WARPS / DQ_WARPS))
#define DQ_M (DQ_ROWS / 16)
#define DQ_N (DQ_COLUMNS / 8)

typedef struct {
  float dk[KV_M * DK_N][4], dv[KV_M * DV_N][4];
} warp_sums;

/* Addresses of the tiles in shared memory. */
typedef struct {
  uint32_t k, v, q, dout, p, ds;
} shared_map;

FA_INLINE shared_map map_shared(uint32_t base) {
  shared_map smem;
  smem.k = base;
  smem.v = smem.k + K_TILE_BYTES;
  smem.q = smem.v + V_TILE_BYTES;
  smem.dout = smem.q + STAGES * Q_TILE_BYTES;
  smem.p = smem.dout + STAGES * DO_TILE_BYTES;
  smem.ds = smem.p + S_TILE_BYTES;
  return smem;
}

/* The query tiles that meet this CTA's keys: heads of the group, then rows. */
typedef struct {
  int h, m0;             /* where it stands */
  int lo, hi, heads_end; /* m0 from lo in steps of BLOCK_M to below hi */
} row_walk;

FA_INLINE row_walk start_walk(const fa_arg_problem *p, const fa_tile *tile) {
  fa_range rows = fa_visiting_rows(p->rule, tile->len_q, tile->len_k, tile->m0, fa_min(tile->m0 + BLOCK_N, tile->len_k));
  int first = tile->h * p->group;
  row_walk walk = {first, 0, rows.lo / BLOCK_M * BLOCK_M, tile->m0 < tile->len_k ? rows.hi : 0, first + p->group};
  walk.m0 = walk.lo - BLOCK_M;
  return walk;
}

/* The next tile; walk->h == heads_end when there is none. With a block mask a warp looks up 32 tiles at a time. All warps get the same answer. */
FA_INLINE void next_tile(row_walk *walk, const fa_arg_problem *p, const fa_tile *tile) {
  walk->m0 += BLOCK_M;
  for (; walk->h < walk->heads_end; walk->h++, walk->m0 = walk->lo)
    for (; walk->m0 < walk->hi; walk->m0 += 32 * BLOCK_M) {
      if (!p->block_size) return;
      int m0 = walk->m0 + (int)(threadIdx.x % 32) * BLOCK_M;
      unsigned seen = __ballot_sync(0xFFFFFFFFu, m0 < walk->hi && fa_in_block_mask(p, tile->b, walk->h, m0, tile->m0));
      if (seen) {
        walk->m0 += (__ffs(seen) - 1) * BLOCK_M;
        return;
      }
    }
}

FA_INLINE void load_query_side(const fa_gradient_args *args, const fa_tile *tile, const shared_map *smem, const row_walk *walk, int stage) {
  const char *q_gmem = fa_head_base(&args->q, ELEMENT_BYTES, tile->b, walk->h, tile->q_start + walk->m0);
  const char *dout_gmem = fa_head_base(&args->dout, ELEMENT_BYTES, tile->b, walk->h, tile->q_start + walk->m0);
  int rows = tile->len_q - walk->m0;
  fa_load_tile(smem->q + stage * Q_TILE_BYTES, q_gmem, &args->q, rows, args->problem.dim_qk, BLOCK_M, HEAD_DIM, THREADS);
  fa_load_tile(smem->dout + stage * DO_TILE_BYTES, dout_gmem, &args->dout, rows, args->problem.dim_v, BLOCK_M, DIM_V, THREADS);
}

/* S, dP -> P, dS in shared memory. Returns 1 when a tile with invisible pairs met data that is not finite; the vote is also a barrier: P and
 * dS are complete for all warps. */
FA_INLINE int gradient_tile(const fa_gradient_args *args, const fa_gradient_head *head, const fa_tile *tile, const shared_map *smem, int m0,
                            int stage) {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row0 = warp % S_WARPS * S_ROWS, column0 = warp / S_WARPS * S_COLUMNS;
  int64_t workspace_row = fa_workspace_row(args, tile->b, head->h, tile->q_start) + m0 + row0 + (lane >> 2);
  float s[S_M * S_N][4], dp[S_M * S_N][4], lse[S_M][2], delta[S_M][2];
#pragma unroll
  for (int i = 0; i < S_M * S_N; i++)
#pragma unroll
    for (int e = 0; e < 4; e++) s[i][e] = dp[i][e] = 0.0f;

  fa_tile_operand q = {smem->q + stage * Q_TILE_BYTES, FA_BY_ROWS, row0, K_ROW_BYTES}, k = {smem->k, FA_BY_ROWS, column0, K_ROW_BYTES};
  fa_tile_operand dout = {smem->dout + stage * DO_TILE_BYTES, FA_BY_ROWS, row0, V_ROW_BYTES}, v = {smem->v, FA_BY_ROWS, column0, V_ROW_BYTES};
  fa_product(s, S_M, S_N, HEAD_DIM, q, k);
#pragma unroll
  for (int m = 0; m < S_M; m++) fa_read_row_statistics(args, workspace_row + 16 * m, lse[m], delta[m]); /* they arrive during dO V^T */
  fa_product(dp, S_M, S_N, DIM_V, dout, v);

  int full = fa_tile_is_full(&args->problem, head, m0, BLOCK_M, tile->m0, BLOCK_N), poisoned = 0;
  fa_gradient_wish wish = {0, 0};
  if (SCORE || !full) poisoned = fa_has_nonfinite(s, S_M * S_N) || fa_has_nonfinite(dp, S_M * S_N);
#pragma unroll
  for (int m = 0; m < S_M; m++) {
    int row = m0 + row0 + 16 * m + (lane >> 2), column = tile->m0 + column0;
    fa_gradient_fragments(&s[m * S_N], &dp[m * S_N], S_N, &args->problem, head, row, column, full, lse[m], delta[m], wish);
    fa_store_fragments(smem->p, &s[m * S_N], S_N, row0 + 16 * m, column0, S_ROW_BYTES);
    fa_store_fragments(smem->ds, &dp[m * S_N], S_N, row0 + 16 * m, column0, S_ROW_BYTES);
  }
  return __syncthreads_or(poisoned);
}

/* dq_sum += dS K, in fragment order: each lane adds its four numbers of a fragment at once. */
FA_INLINE void add_dq(const fa_gradient_args *args, const fa_tile *tile, int h, const shared_map *smem, int m0, int poisoned) {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row0 = warp % DQ_WARPS * DQ_ROWS, column0 = warp / DQ_WARPS * DQ_COLUMNS;
  float dq[DQ_M * DQ_N][4];
#pragma unroll
  for (int i = 0; i < DQ_M * DQ_N; i++)
#pragma unroll
    for (int e = 0; e < 4; e++) dq[i][e] = 0.0f;
  fa_tile_operand ds = {smem->ds, FA_BY_ROWS, row0, S_ROW_BYTES}, k = {smem->k, FA_BY_COLUMNS, column0, K_ROW_BYTES};
  if (poisoned)
    fa_product_exact(dq, DQ_M, DQ_N, BLOCK_N, ds, k);
  else
    fa_product(dq, DQ_M, DQ_N, BLOCK_N, ds, k);
  int64_t row = fa_workspace_row(args, tile->b, h, tile->q_start) + m0 + row0;
  float *sum_gmem = (float *)args->dq_sum + row * HEAD_DIM + column0 / 8 * FA_FRAGMENT;
#pragma unroll
  for (int m = 0; m < DQ_M; m++)
#pragma unroll
    for (int n = 0; n < DQ_N; n++) fa_add_fragment(sum_gmem + m * 16 * HEAD_DIM + n * FA_FRAGMENT, lane, dq[m * DQ_N + n]);
}

FA_INLINE void accumulate(warp_sums *sums, const shared_map *smem, int stage, int poisoned) {
  int warp = threadIdx.x / 32, key0 = warp % KV_WARPS * KV_ROWS, part = warp / KV_WARPS;
  fa_tile_operand p = {smem->p, FA_BY_COLUMNS, key0, S_ROW_BYTES}, ds = {smem->ds, FA_BY_COLUMNS, key0, S_ROW_BYTES};
  fa_tile_operand dout = {smem->dout + stage * DO_TILE_BYTES, FA_BY_COLUMNS, part * DV_COLUMNS, V_ROW_BYTES};
  fa_tile_operand q = {smem->q + stage * Q_TILE_BYTES, FA_BY_COLUMNS, part * DK_COLUMNS, K_ROW_BYTES};
  if (poisoned) {
    fa_product_exact(sums->dv, KV_M, DV_N, BLOCK_M, p, dout);
    fa_product_exact(sums->dk, KV_M, DK_N, BLOCK_M, ds, q);
  } else {
    fa_product(sums->dv, KV_M, DV_N, BLOCK_M, p, dout);
    fa_product(sums->dk, KV_M, DK_N, BLOCK_M, ds, q);
  }
}

/* This warp's part of dK or dV, times factor. Keys past the used ones that have a place in the tensor get 0. */
FA_INLINE void store_keys(const fa_arg_view *view, const fa_tile *tile, float sum[][4], int columns, int dims, float factor) {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n_count = columns / 8;
  if (!view->data) return;
#pragma unroll
  for (int m = 0; m < KV_M; m++)
#pragma unroll
    for (int r = 0; r < 2; r++) {
      int j = tile->m0 + warp % KV_WARPS * KV_ROWS + 16 * m + (lane >> 2) + 8 * r, used = j < tile->len_k;
      if (j >= tile->slot_k) continue;
      char *row_gmem = fa_head_base(view, ELEMENT_BYTES, tile->b, tile->h, tile->k_start + j);
#pragma unroll
      for (int n = 0; n < n_count; n++) {
        float x = sum[m * n_count + n][2 * r] * factor, y = sum[m * n_count + n][2 * r + 1] * factor;
        fa_store_pair(row_gmem, view->d, dims, warp / KV_WARPS * columns + 8 * n + 2 * (lane & 3), used ? x : 0.0f, used ? y : 0.0f);
      }
    }
}

/* Walks over the query tiles with dK and dV in registers. */
FA_INLINE void walk_queries(warp_sums *sums, const fa_gradient_args *args, const fa_tile *tile, const shared_map *smem) {
  const fa_arg_problem *p = &args->problem;
  fa_gradient_head head;
  row_walk walk = start_walk(p, tile);
  int stage = 0, h = -1;
  next_tile(&walk, p, tile);
  if (walk.h == walk.heads_end) return;
  fa_load_tile(smem->k, fa_head_base(&args->k, ELEMENT_BYTES, tile->b, tile->h, tile->k_start + tile->m0), &args->k, tile->len_k - tile->m0,
               p->dim_qk, BLOCK_N, HEAD_DIM, THREADS);
  fa_load_tile(smem->v, fa_head_base(&args->v, ELEMENT_BYTES, tile->b, tile->h, tile->k_start + tile->m0), &args->v, tile->len_k - tile->m0,
               p->dim_v, BLOCK_N, DIM_V, THREADS);
  load_query_side(args, tile, smem, &walk, 0);
  cp_async_commit_group();

  while (walk.h < walk.heads_end) {
    int m0 = walk.m0;
    if (h != walk.h || (!SCORE && !DROPOUT)) head = fa_gradient_of_head(p, tile, walk.h);
    h = walk.h;
    next_tile(&walk, p, tile);
    int more = walk.h < walk.heads_end;
    cp_async_wait_group(0);
    __syncthreads(); /* Q and dO of this tile have landed for all; all warps are done with P, dS and the other stage */
    if (STAGES == 2 && more) load_query_side(args, tile, smem, &walk, stage ^ 1);
    cp_async_commit_group();
    int poisoned = gradient_tile(args, &head, tile, smem, m0, stage);
    accumulate(sums, smem, stage, poisoned);
    if (STAGES == 1) {
      __syncthreads(); /* all warps are done with Q and dO */
      if (more) load_query_side(args, tile, smem, &walk, 0);
      cp_async_commit_group();
    }
    if (ADD_DQ) add_dq(args, tile, h, smem, m0, poisoned);
    if (STAGES == 2) stage ^= 1;
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) bwd_sm80(const __grid_constant__ fa_gradient_args args) {
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ fa_tile tile; /* not in registers, which are short */
  fa_tile found;
  if (!fa_find_key_tile(&args.problem, args.key_tiles, BLOCK_N, &found)) return;
  if (threadIdx.x == 0) tile = found;
  __syncthreads(); /* the tile is there for all */
  shared_map smem = map_shared(smem_address(shared));
  warp_sums sums;
#pragma unroll
  for (int i = 0; i < KV_M * DK_N; i++)
#pragma unroll
    for (int e = 0; e < 4; e++) sums.dk[i][e] = 0.0f;
#pragma unroll
  for (int i = 0; i < KV_M * DV_N; i++)
#pragma unroll
    for (int e = 0; e < 4; e++) sums.dv[i][e] = 0.0f;
  walk_queries(&sums, &args, &tile, &smem);
  store_keys(&args.dk, &tile, sums.dk, DK_COLUMNS, args.problem.dim_qk, (float)args.problem.scale);
  store_keys(&args.dv, &tile, sums.dv, DV_COLUMNS, args.problem.dim_v, 1.0f);
}
