/* bwd_keys_sm80.cu: what bwd_sm80.cu computes, for 16-bit elements and small head dims: each warp owns keys, and P and dS stay in its
 * registers.
 *
 * One CTA owns BLOCK_N keys of one key head, each warp 16 or 32 of them. K and V stay; Q and dO of every query tile that sees the keys pass
 * by, for each query head of the group. Scores are computed transposed, keys down and queries across: then accumulators of P and dS are
 * the left operands of the products that follow, and only dS, for dQ, goes through shared memory.
 *
 *            queries -->  m                       in each warp by itself, SLAB queries of the tile after the other:
 *          +-------+-------+-------+                 S = K Q^T      dP = V dO^T
 *   warp 0 | slab  |       |       |                 P = exp(S - lse)      dS = P (dP - delta)
 *   warp 1 | slab  |       |       |  head h         dV += P dO     dK += dS Q      dS also to shared memory
 *   ...    |       |       |       |              --- barrier ---
 *          +-------+-------+-------+                 dQ = dS^T K of the tile, added to dq_sum: DQ_WARPS warps split the rows,
 *             ...then head h + 1 of the group        the others the columns
 *
 * Shared memory, bytes, in this order (rows swizzled, tile.h):
 *   K    BLOCK_N * HEAD_DIM * size             V    BLOCK_N * DIM_V * size
 *   Q    2 * BLOCK_M * HEAD_DIM * size         dO   2 * BLOCK_M * DIM_V * size
 *   dS   2 * BLOCK_N * BLOCK_M * size, a row for each key
 *   lse, delta   2 * 2 * BLOCK_M * 4; fa_key_work 64
 *
 * Order of work: dQ of tile t - 1 and everything else of tile t lie between the same two barriers, and tile t + 1 is on its way (cp.async)
 * meanwhile. In tiles where some pair is not visible, slabs of which a warp sees nothing are left out, and data that is not finite is
 * looked for (mma_bwd.h).
 *
 * Registers a thread: dK and dV take BLOCK_N * (HEAD_DIM + DIM_V) / THREADS, S and dP of a slab SLAB * KEY_M: 128 + 32 at dim 64; the
 * rest, 255 in all, lets the slabs of a full tile overlap. What limits: latency of products that wait for each other, and shared-memory
 * reads.
 *
 * What it takes, for bf16, equal dims, compiled by NVRTC 13.0:
 *   sm_100  HEAD_DIM=64   255 registers  99456 bytes
 *
 * Constants: DTYPE, HEAD_DIM and DIM_V (padded to 32), BLOCK_M, BLOCK_N, WARPS, DQ_WARPS, CTAS (on an SM), ADD_DQ (0: dQ is left to
 * bwd_rows_sm80.cu or not wanted). Rows must be aligned; score changes and dropout are left to bwd_sm80.cu.
 */
#define REAL float
#define ALIGNED 1
#define SCORE 0
#define DROPOUT 0

#include "work_bwd.h"

#define SLAB 16 /* queries whose P and dS are in registers at once */
#define SLAB_N (SLAB / 8)
#define SLAB_UNROLL (ADD_DQ ? BLOCK_M / SLAB : 1) /* without stores of dS between them, more slabs side by side spill */
#define KEY_ROWS (BLOCK_N / WARPS)                /* keys of a warp */
#define KEY_M (KEY_ROWS / 16)
#define S_ROW_BYTES (BLOCK_M * ELEMENT_BYTES)
#define S_TILE_BYTES (BLOCK_N * S_ROW_BYTES)
#define DK_N (HEAD_DIM / 8)
#define DV_N (DIM_V / 8)
#define DQ_ROWS (BLOCK_M / DQ_WARPS)
#define DQ_COLUMNS (HEAD_DIM / (WARPS / DQ_WARPS))
#define DQ_M (DQ_ROWS / 16)
#define DQ_N (DQ_COLUMNS / 8)

typedef struct {
  float dk[KEY_M * DK_N][4], dv[KEY_M * DV_N][4];
} warp_sums;

/* Addresses of the tiles in shared memory. */
typedef struct {
  uint32_t k, v, q, dout, ds, statistics;
} shared_map;

#define WORK_OFFSET (K_TILE_BYTES + V_TILE_BYTES + 2 * (Q_TILE_BYTES + DO_TILE_BYTES + S_TILE_BYTES + STATISTICS_BYTES))

FA_INLINE shared_map map_shared(uint32_t base) {
  shared_map smem;
  smem.k = base;
  smem.v = smem.k + K_TILE_BYTES;
  smem.q = smem.v + V_TILE_BYTES;
  smem.dout = smem.q + 2 * Q_TILE_BYTES;
  smem.ds = smem.dout + 2 * DO_TILE_BYTES;
  smem.statistics = smem.ds + 2 * S_TILE_BYTES;
  return smem;
}

FA_INLINE void load_query_side(const fa_gradient_args *args, const fa_tile *tile, const shared_map *smem, const fa_query_tile *at,
                               int stage) {
  fa_load_query_tiles(args, tile, at, smem->q + stage * Q_TILE_BYTES, smem->dout + stage * DO_TILE_BYTES);
  fa_load_statistics(args, tile, at, smem->statistics + stage * STATISTICS_BYTES);
}

/* ---- one slab ---- */

FA_INLINE void clear(float s[][4]) {
#pragma unroll
  for (int i = 0; i < KEY_M * SLAB_N; i++)
#pragma unroll
    for (int e = 0; e < 4; e++) s[i][e] = 0.0f;
}

/* s: products q.k, becomes P. dp: products dout.v, becomes dS. A lane has two rows (queries) of each fragment of 8. */
FA_INLINE void weigh(float s[][4], float dp[][4], float scale_log2, uint32_t lse_smem) {
  uint32_t mine_smem = lse_smem + 2 * (threadIdx.x & 3) * 4;
#pragma unroll
  for (int n = 0; n < SLAB_N; n++) {
    float lse[2], delta[2];
    ld_shared_v2_f32(lse, mine_smem + 32 * n);
    ld_shared_v2_f32(delta, mine_smem + 32 * n + BLOCK_M * 4);
#pragma unroll
    for (int m = 0; m < KEY_M; m++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        float *p = &s[m * SLAB_N + n][e], *ds = &dp[m * SLAB_N + n][e];
        *p = ex2_approx(__fmaf_rn(*p, scale_log2, -lse[e & 1]));
        *ds = *p * (*ds - delta[e & 1]);
      }
  }
}

/* 1 when some row from row0 on sees some key of this warp. */
FA_INLINE int sees_any(const fa_arg_problem *p, const fa_tile *tile, int row0, int key0) {
  if (row0 >= tile->len_q) return 0;
  fa_range keys = fa_visited_keys(p->rule, tile->len_q, tile->len_k, row0, fa_min(row0 + SLAB, tile->len_q));
  return keys.lo < key0 + KEY_ROWS && key0 < keys.hi;
}

FA_INLINE void hide_invisible(float s[][4], float dp[][4], const fa_arg_problem *p, const fa_tile *tile, int row0, int key0) {
  int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < SLAB_N; n++)
#pragma unroll
    for (int c = 0; c < 2; c++) {
      int i = row0 + 8 * n + 2 * (lane & 3) + c, lo = fa_row_lo(p->rule, tile->len_q, tile->len_k, i);
      int hi = i < tile->len_q ? fa_row_hi(p->rule, tile->len_q, tile->len_k, i) : 0;
#pragma unroll
      for (int m = 0; m < KEY_M; m++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
          int j = key0 + 16 * m + 8 * r + (lane >> 2);
          if (j < lo || j >= hi) s[m * SLAB_N + n][2 * r + c] = dp[m * SLAB_N + n][2 * r + c] = 0.0f;
        }
    }
}

/* acc += A B, A = P or dS from its accumulators, B = the slab's rows of dO or Q. */
FA_INLINE void slab_product(float acc[][4], int n_count, float s[][4], uint32_t slab_smem, int row_bytes) {
  int lane = (int)fa_opaque(threadIdx.x % 32);
  fa_tile_operand rows = {slab_smem, FA_BY_COLUMNS, 0, row_bytes};
#pragma unroll
  for (int step = 0; step < SLAB / 16; step++) {
    fa_operand_a a[KEY_M];
#pragma unroll
    for (int m = 0; m < KEY_M; m++) fa_operand_from_accumulator(&a[m], &s[m * SLAB_N], step);
#pragma unroll
    for (int n = 0; n < n_count; n += 2) {
      fa_operand_b b[2];
      fa_load_operand_b(b, rows, lane, 8 * n, step);
#pragma unroll
      for (int m = 0; m < KEY_M; m++) {
        fa_mma(acc[m * n_count + n], &a[m], &b[0]);
        fa_mma(acc[m * n_count + n + 1], &a[m], &b[1]);
      }
    }
  }
}

/* The same, in which an element of A that is 0 takes nothing from B (fa_product_exact). */
FA_INLINE void slab_product_exact(float acc[][4], int n_count, float s[][4], uint32_t slab_smem, int row_bytes, int flags) {
  int lane = (int)fa_opaque(threadIdx.x % 32);
  fa_tile_operand rows = {slab_smem, FA_BY_COLUMNS, 0, row_bytes};
#pragma unroll
  for (int step = 0; step < SLAB / 16; step++) {
    fa_operand_a a[KEY_M];
    uint32_t a_flags[KEY_M][4];
#pragma unroll
    for (int m = 0; m < KEY_M; m++) {
      fa_operand_from_accumulator(&a[m], &s[m * SLAB_N], step);
#pragma unroll
      for (int i = 0; i < 4; i++) a_flags[m][i] = fa_flag_nonzero(a[m].r[i]);
    }
#pragma unroll
    for (int n = 0; n < n_count; n += 2) {
      fa_operand_b b[2];
      fa_load_operand_b(b, rows, lane, 8 * n, step);
#pragma unroll
      for (int half = 0; half < 2; half++)
#pragma unroll
        for (int m = 0; m < KEY_M; m++) fa_mma_finite(acc[m * n_count + n + half], &a[m], 0, a_flags[m], b[half], flags);
    }
  }
}

/* ---- one tile ---- */

FA_INLINE void store_ds(const shared_map *smem, float ds[][4], int stage, int slab) {
  int key0 = threadIdx.x / 32 * KEY_ROWS;
  if (ADD_DQ) {
#pragma unroll
    for (int m = 0; m < KEY_M; m++)
      fa_store_fragments(smem->ds + stage * S_TILE_BYTES, &ds[m * SLAB_N], SLAB_N, key0 + 16 * m, slab, S_ROW_BYTES);
  }
}

/* A tile of which every row sees every key. */
FA_INLINE void full_step(warp_sums *sums, float scale_log2, const shared_map *smem, int stage) {
  int key0 = threadIdx.x / 32 * KEY_ROWS;
  uint32_t q_smem = smem->q + stage * Q_TILE_BYTES, dout_smem = smem->dout + stage * DO_TILE_BYTES;
  fa_tile_operand k = {smem->k, FA_BY_ROWS, key0, K_ROW_BYTES}, v = {smem->v, FA_BY_ROWS, key0, V_ROW_BYTES};
#pragma unroll SLAB_UNROLL
  for (int slab = 0; slab < BLOCK_M; slab += SLAB) {
    float s[KEY_M * SLAB_N][4], dp[KEY_M * SLAB_N][4];
    fa_tile_operand q = {q_smem, FA_BY_ROWS, slab, K_ROW_BYTES}, dout = {dout_smem, FA_BY_ROWS, slab, V_ROW_BYTES};
    clear(s);
    clear(dp);
    fa_product(s, KEY_M, SLAB_N, HEAD_DIM, k, q);
    fa_product(dp, KEY_M, SLAB_N, DIM_V, v, dout);
    weigh(s, dp, scale_log2, smem->statistics + stage * STATISTICS_BYTES + slab * 4);
    slab_product(sums->dv, DV_N, s, dout_smem + slab * V_ROW_BYTES, V_ROW_BYTES);
    slab_product(sums->dk, DK_N, dp, q_smem + slab * K_ROW_BYTES, K_ROW_BYTES);
    store_ds(smem, dp, stage, slab);
  }
}

/* Any other tile. */
FA_INLINE void masked_step(warp_sums *sums, const fa_arg_problem *p, const fa_tile *tile, const shared_map *smem, int m0, int stage) {
  int key0 = threadIdx.x / 32 * KEY_ROWS;
  uint32_t q_smem = smem->q + stage * Q_TILE_BYTES, dout_smem = smem->dout + stage * DO_TILE_BYTES;
  fa_tile_operand k = {smem->k, FA_BY_ROWS, key0, K_ROW_BYTES}, v = {smem->v, FA_BY_ROWS, key0, V_ROW_BYTES};
#pragma unroll 1
  for (int slab = 0; slab < BLOCK_M; slab += SLAB) {
    float s[KEY_M * SLAB_N][4], dp[KEY_M * SLAB_N][4];
    fa_tile_operand q = {q_smem, FA_BY_ROWS, slab, K_ROW_BYTES}, dout = {dout_smem, FA_BY_ROWS, slab, V_ROW_BYTES};
    clear(s);
    clear(dp);
    if (sees_any(p, tile, m0 + slab, tile->m0 + key0)) {
      fa_product(s, KEY_M, SLAB_N, HEAD_DIM, k, q);
      fa_product(dp, KEY_M, SLAB_N, DIM_V, v, dout);
      int poisoned = __any_sync(0xFFFFFFFFu, fa_has_nonfinite(s, KEY_M * SLAB_N) || fa_has_nonfinite(dp, KEY_M * SLAB_N));
      weigh(s, dp, (float)p->scale * LOG2E, smem->statistics + stage * STATISTICS_BYTES + slab * 4);
      hide_invisible(s, dp, p, tile, m0 + slab, tile->m0 + key0);
      if (poisoned) {
        slab_product_exact(sums->dv, DV_N, s, dout_smem + slab * V_ROW_BYTES, V_ROW_BYTES, 1);
        slab_product_exact(sums->dk, DK_N, dp, q_smem + slab * K_ROW_BYTES, K_ROW_BYTES, 0);
      } else {
        slab_product(sums->dv, DV_N, s, dout_smem + slab * V_ROW_BYTES, V_ROW_BYTES);
        slab_product(sums->dk, DK_N, dp, q_smem + slab * K_ROW_BYTES, K_ROW_BYTES);
      }
    }
    store_ds(smem, dp, stage, slab);
  }
}

/* dq_sum += dS^T K, of the tile whose dS is in `stage`. */
FA_INLINE void add_dq(const fa_gradient_args *args, const fa_tile *tile, const fa_query_tile *at, const shared_map *smem, int stage,
                      int poisoned) {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row0 = warp % DQ_WARPS * DQ_ROWS, column0 = warp / DQ_WARPS * DQ_COLUMNS;
  float dq[DQ_M * DQ_N][4];
#pragma unroll
  for (int i = 0; i < DQ_M * DQ_N; i++)
#pragma unroll
    for (int e = 0; e < 4; e++) dq[i][e] = 0.0f;
  fa_tile_operand ds = {smem->ds + stage * S_TILE_BYTES, FA_BY_COLUMNS, row0, S_ROW_BYTES};
  fa_tile_operand k = {smem->k, FA_BY_COLUMNS, column0, K_ROW_BYTES};
  if (poisoned)
    fa_product_exact(dq, DQ_M, DQ_N, BLOCK_N, ds, k, 0);
  else
    fa_product(dq, DQ_M, DQ_N, BLOCK_N, ds, k);
  fa_add_fragments(args, fa_workspace_row(args, tile->b, at->h, tile->q_start) + at->m0 + row0, column0, dq, DQ_M, DQ_N, lane);
}

/* ---- all tiles ---- */

/* 1, in every thread, when some element of this CTA's K is not finite. */
FA_INLINE int keys_are_poisoned(const shared_map *smem) {
  uint32_t flags = 0;
  for (int at = 16 * threadIdx.x; at < K_TILE_BYTES; at += 16 * THREADS) {
    uint32_t word[4];
    ld_shared_v4(word, smem->k + at);
#pragma unroll
    for (int i = 0; i < 4; i++) flags |= fa_flag_nonfinite(&word[i]);
  }
  return __syncthreads_or((int)flags);
}

FA_INLINE void walk_queries(warp_sums *sums, const fa_gradient_args *args, const fa_key_work *work, const shared_map *smem) {
  const fa_arg_problem *p = &args->problem;
  const fa_tile *tile = &work->tile;
  fa_query_tile ahead = fa_start_query_tiles(work), now, done;
  int stage = 0, poisoned = 0;
  fa_next_query_tile(&ahead, p, work);
  if (ahead.h == work->heads_end) return;
  fa_load_key_tiles(args, tile, smem->k, smem->v);
  load_query_side(args, tile, smem, &ahead, 0);
  cp_async_commit_group();
  done.h = -1;

#pragma unroll 1
  while (ahead.h < work->heads_end) {
    now = ahead;
    fa_next_query_tile(&ahead, p, work);
    cp_async_wait_group(0);
    __syncthreads(); /* this tile has landed for all; dS of the last one is complete, and all are done with its Q and dO */
    if (ADD_DQ && done.h < 0) poisoned = keys_are_poisoned(smem);
    if (ahead.h < work->heads_end) load_query_side(args, tile, smem, &ahead, stage ^ 1);
    cp_async_commit_group();
    if (ADD_DQ && done.h >= 0) add_dq(args, tile, &done, smem, stage ^ 1, poisoned);
    fa_range keys = fa_unmasked_keys(p->rule, tile->len_q, tile->len_k, now.m0, fa_min(now.m0 + BLOCK_M, tile->len_q));
    if (keys.lo <= tile->m0 && tile->m0 + BLOCK_N <= keys.hi && now.m0 + BLOCK_M <= tile->len_q)
      full_step(sums, (float)p->scale * LOG2E, smem, stage);
    else
      masked_step(sums, p, tile, smem, now.m0, stage);
    stage ^= 1;
    done = now;
  }
  __syncthreads(); /* dS of the last tile is complete */
  if (ADD_DQ) add_dq(args, tile, &done, smem, stage ^ 1, poisoned);
}

/* This warp's keys. */
FA_INLINE void store_keys(const fa_arg_view *view, const fa_tile *tile, float sum[][4], int count, int dims, float factor) {
  if (!view->data) return;
#pragma unroll
  for (int m = 0; m < KEY_M; m++)
    fa_store_gradient_rows(view, tile, &sum[m * count], count, tile->m0 + threadIdx.x / 32 * KEY_ROWS + 16 * m, 0, dims, factor);
}

extern "C" __global__ void __launch_bounds__(THREADS, CTAS) bwd_keys_sm80(const __grid_constant__ fa_gradient_args args) {
  extern __shared__ __align__(128) unsigned char shared[];
  fa_key_work *work = (fa_key_work *)(shared + WORK_OFFSET);
  if (!fa_find_key_work(&args, work)) return;
  shared_map smem = map_shared(smem_address(shared));
  warp_sums sums;
#pragma unroll
  for (int i = 0; i < KEY_M * DK_N; i++)
#pragma unroll
    for (int e = 0; e < 4; e++) sums.dk[i][e] = 0.0f;
#pragma unroll
  for (int i = 0; i < KEY_M * DV_N; i++)
#pragma unroll
    for (int e = 0; e < 4; e++) sums.dv[i][e] = 0.0f;
  walk_queries(&sums, &args, work, &smem);
  store_keys(&args.dk, &work->tile, sums.dk, DK_N, args.problem.dim_qk, (float)args.problem.scale);
  store_keys(&args.dv, &work->tile, sums.dv, DV_N, args.problem.dim_v, 1.0f);
}
