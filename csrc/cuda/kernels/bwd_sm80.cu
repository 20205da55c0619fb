/* bwd_sm80.cu: gradients of K and V, and dQ by addition, on mma.sync, for sm_80 and every later GPU; fp16, bf16, and fp32 in pairs
 * of fp16.
 *
 * One CTA owns BLOCK_N keys of one key head. K and V stay; Q and dO of every query tile that sees them pass by, for each query head of the
 * group, so dK and dV are complete in registers at the end and are written once: no atomics, bitwise stable.
 *
 *          queries -->  m      m+1     m+2            each step, for one tile of BLOCK_M rows:
 *            +-------+-------+-------+                   S = Q K^T   dP = dO V^T               S_WARPS warps split the rows
 *    BLOCK_N |       |       |       |                   P = exp(S - lse)   dS = P (dP - delta)   in registers, then in shared memory
 *      keys  |   S   |   S   |   S   |  head h           --- barrier ---
 *            |       |       |       |                   dV += P^T dO   dK += dS^T Q           KV_WARPS warps split the keys
 *            +-------+-------+-------+                   dQ = dS K, added to dq_sum            DQ_WARPS warps split the rows
 *               ...then head h + 1 of the group          (the other warps split the columns)
 *
 * Shared memory, bytes, in this order (rows swizzled, tile.h; fp32: 4 more for each row of the first four, which are split in place, split.h):
 *   K    BLOCK_N * HEAD_DIM * size                V    BLOCK_N * DIM_V * size
 *   Q    STAGES * BLOCK_M * HEAD_DIM * size       dO   STAGES * BLOCK_M * DIM_V * size
 *   P    BLOCK_M * BLOCK_N * size                 dS   the same; both twice with three stages
 *   lse, delta   STAGES * 2 * BLOCK_M * 4, with two stages or three and one CTA on an SM
 *   exchange     BLOCK_M * BLOCK_N * 4 with PAIRED; cta_work 96
 * bf16, dim 128, 64 x 128, three stages: 32 + 32 + 48 + 48 + 32 + 32 KiB, and 1.6 KiB of the rest.
 *
 * Order of work:
 *   STAGES 1, 2  walk_in_turn: scores, barrier, products, barrier. With two stages Q and dO of the next tile are requested (cp.async)
 *                behind the barrier that ends a tile and have a whole step to arrive; with one stage at the end of the step.
 *   PAIRED       S and dP by two warps each (paired_gradient_tile).
 *   STAGES 3     walk_overlapped: scores of tile t and products of tile t - 1 between the same two barriers; half of the warps begin
 *                with the one, half with the other, so that the tensor cores have work while exponentials are taken.
 *
 * Registers a thread: dK and dV take BLOCK_N * (HEAD_DIM + DIM_V) / THREADS, S and dP 2 * BLOCK_M * BLOCK_N / THREADS, dQ reuses the
 * room of the latter: 128 + 64 at dim 128, and all 255 are used. tiles_bwd.def keeps the sum at 192 or less. What limits: the
 * shared-memory reads of the five products (about 2 cycles a mma, against 1.6 of the tensor cores on sm_90), and waiting at barriers
 * with eight warps on an SM.
 *
 * What it takes, for bf16, equal dims, no feature of its own, compiled by NVRTC 13.0:
 *   sm_80   HEAD_DIM=64   255 registers  166016 bytes
 *   sm_80   HEAD_DIM=128  255 registers  164992 bytes
 *   sm_100  HEAD_DIM=128  255 registers  231040 bytes
 *   sm_100  HEAD_DIM=192  255 registers  231040 bytes
 *   sm_100  HEAD_DIM=256  255 registers  230528 bytes
 *
 * Constants: DTYPE, HEAD_DIM and DIM_V (padded to 32), BLOCK_M, BLOCK_N, WARPS, S_WARPS, KV_WARPS, DQ_WARPS, STAGES, CTAS (on an SM),
 * PAIRED, ALIGNED, SCORE, DROPOUT, ADD_DQ (0: dQ is left to bwd_rows_sm80.cu or not wanted).
 */
#define REAL float
/* fp32: more of them side by side take registers that dK and dV need. */
#define STEP_UNROLL (DTYPE != 1 ? 64 : HEAD_DIM <= 128 ? 2 : 1)

#include "work_bwd.h"

#define S_ROW_BYTES (BLOCK_N * ELEMENT_BYTES)
#define S_TILE_BYTES (BLOCK_M * S_ROW_BYTES)
#define SCORE_TILES (STAGES == 3 ? 4 : 2)            /* P and dS, of one tile or of two */
#define SHARED_STATISTICS (STAGES >= 2 && CTAS == 1) /* lse and delta come along with Q and dO; else each lane reads its own */

/* What a warp owns of S and dP, of dK and dV, of dQ; fragments of 16 rows by 8 columns. */
#define S_ROWS (BLOCK_M / S_WARPS)
#define S_PARTS (PAIRED ? WARPS / 2 : WARPS)
#define S_COLUMN_WARPS (S_PARTS / S_WARPS < BLOCK_N / 16 ? S_PARTS / S_WARPS : BLOCK_N / 16)
#define S_COLUMNS (BLOCK_N / S_COLUMN_WARPS)
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
  uint32_t statistics; /* [STAGES][lse, delta][BLOCK_M] f32, with SHARED_STATISTICS */
  uint32_t exchange;
} shared_map;

#define EXCHANGE_BYTES (PAIRED * BLOCK_M * BLOCK_N * 4) /* the halves of S and dP that change hands */

#define WORK_OFFSET                                                                                     \
  (K_TILE_BYTES + V_TILE_BYTES + STAGES * (Q_TILE_BYTES + DO_TILE_BYTES) + SCORE_TILES * S_TILE_BYTES + \
   SHARED_STATISTICS * STAGES * STATISTICS_BYTES + EXCHANGE_BYTES)

FA_INLINE shared_map map_shared(uint32_t base) {
  shared_map smem;
  smem.k = base;
  smem.v = smem.k + K_TILE_BYTES;
  smem.q = smem.v + V_TILE_BYTES;
  smem.dout = smem.q + STAGES * Q_TILE_BYTES;
  smem.p = smem.dout + STAGES * DO_TILE_BYTES;
  smem.ds = smem.p + S_TILE_BYTES;
  smem.statistics = smem.p + SCORE_TILES * S_TILE_BYTES;
  smem.exchange = smem.statistics + SHARED_STATISTICS * STAGES * STATISTICS_BYTES;
  return smem;
}

typedef struct {
  fa_key_work keys;
  fa_query_tile queue[4]; /* tile t in entry t % 4, for walk_overlapped */
} cta_work;

FA_INLINE void load_query_side(const fa_gradient_args *args, const fa_tile *tile, const shared_map *smem, const fa_query_tile *at,
                               int stage) {
  fa_load_query_tiles(args, tile, at, smem->q + stage * Q_TILE_BYTES, smem->dout + stage * DO_TILE_BYTES);
  if (SHARED_STATISTICS) fa_load_statistics(args, tile, at, smem->statistics + stage * STATISTICS_BYTES);
}

/* Of m_count times 16 rows from row0 on of the tile at m0. */
FA_INLINE void read_statistics(const fa_gradient_args *args, const fa_tile *tile, int h, const shared_map *smem, int m0, int stage,
                               int row0, int m_count, float lse[][2], float delta[][2]) {
  int lane = threadIdx.x % 32;
  if (SHARED_STATISTICS) {
    uint32_t lse_smem = smem->statistics + stage * STATISTICS_BYTES + (row0 + (lane >> 2)) * 4, delta_smem = lse_smem + BLOCK_M * 4;
#pragma unroll
    for (int i = 0; i < 2 * m_count; i++) {
      lse[i / 2][i % 2] = __uint_as_float(ld_shared_b32(lse_smem + 32 * i));
      delta[i / 2][i % 2] = __uint_as_float(ld_shared_b32(delta_smem + 32 * i));
    }
  } else {
    int64_t row = fa_workspace_row(args, tile->b, h, tile->q_start) + m0 + row0 + (lane >> 2);
#pragma unroll
    for (int m = 0; m < m_count; m++) fa_read_row_statistics(args, row + 16 * m, lse[m], delta[m]);
  }
}

/* S, dP -> P, dS in shared memory, m_count times 16 rows from row0 on and S_COLUMNS columns from column0 on. Returns 1 when this thread saw
 * data that is not finite in a tile with invisible pairs. */
FA_INLINE int weigh(const fa_gradient_args *args, const fa_gradient_head *head, const fa_tile *tile, const shared_map *smem, int m0,
                    int buffer, float s[][4], float dp[][4], int m_count, int row0, int column0, float lse[][2], float delta[][2]) {
  int full = fa_tile_is_full(&args->problem, head, m0, BLOCK_M, tile->m0, BLOCK_N), poisoned = 0;
  fa_gradient_wish wish = {0, 0};
  if (SCORE || !full) poisoned = fa_has_nonfinite(s, m_count * S_N) || fa_has_nonfinite(dp, m_count * S_N);
#pragma unroll
  for (int m = 0; m < m_count; m++) {
    int row = m0 + row0 + 16 * m + (threadIdx.x % 32 >> 2), column = tile->m0 + column0;
    fa_gradient_fragments(&s[m * S_N], &dp[m * S_N], S_N, &args->problem, head, row, column, full, lse[m], delta[m], wish);
    fa_store_fragments(smem->p + buffer * 2 * S_TILE_BYTES, &s[m * S_N], S_N, row0 + 16 * m, column0, S_ROW_BYTES);
    fa_store_fragments(smem->ds + buffer * 2 * S_TILE_BYTES, &dp[m * S_N], S_N, row0 + 16 * m, column0, S_ROW_BYTES);
  }
  return poisoned;
}

/* One tile; returns what weigh does. */
FA_INLINE int gradient_tile(const fa_gradient_args *args, const fa_gradient_head *head, const fa_tile *tile, const shared_map *smem, int m0,
                            int stage, int buffer) {
  int warp = threadIdx.x / 32, row0 = warp % S_WARPS * S_ROWS, column0 = warp / S_WARPS * S_COLUMNS;
  if (warp >= S_WARPS * S_COLUMN_WARPS) return 0; /* small tiles have fewer parts than there are warps */
  float s[S_M * S_N][4], dp[S_M * S_N][4], lse[S_M][2], delta[S_M][2];
  fa_tile_operand q = {smem->q + stage * Q_TILE_BYTES, FA_BY_ROWS, row0, K_ROW_BYTES, BLOCK_M},
                  k = {smem->k, FA_BY_ROWS, column0, K_ROW_BYTES, BLOCK_N};
  fa_tile_operand dout = {smem->dout + stage * DO_TILE_BYTES, FA_BY_ROWS, row0, V_ROW_BYTES, BLOCK_M},
                  v = {smem->v, FA_BY_ROWS, column0, V_ROW_BYTES, BLOCK_N};
  fa_product_of_rows(s, S_M, S_N, HEAD_DIM, q, k);
  if (!SHARED_STATISTICS) read_statistics(args, tile, head->h, smem, m0, stage, row0, S_M, lse, delta); /* they arrive during dO V^T */
  fa_product_of_rows(dp, S_M, S_N, DIM_V, dout, v);
  if (SHARED_STATISTICS) read_statistics(args, tile, head->h, smem, m0, stage, row0, S_M, lse, delta);
  return weigh(args, head, tile, smem, m0, buffer, s, dp, S_M, row0, column0, lse, delta);
}

/* The same with warps w and w + WARPS / 2 on one part of 32 rows: the one multiplies Q K^T, the other dO V^T, which takes fewer reads
 * than half of both; then each has 16 of the rows. */
FA_INLINE int paired_gradient_tile(const fa_gradient_args *args, const fa_gradient_head *head, const fa_tile *tile, const shared_map *smem,
                                   int m0, int stage, int buffer) {
  int lane = threadIdx.x % 32, half = threadIdx.x / 32 / S_PARTS, pair = threadIdx.x / 32 % S_PARTS;
  int row0 = pair % S_WARPS * S_ROWS, column0 = pair / S_WARPS * S_COLUMNS;
  float product[2 * S_N][4], s[S_N][4], dp[S_N][4], lse[1][2], delta[1][2];
  if (half) {
    fa_tile_operand dout = {smem->dout + stage * DO_TILE_BYTES, FA_BY_ROWS, row0, V_ROW_BYTES, BLOCK_M};
    fa_tile_operand v = {smem->v, FA_BY_ROWS, column0, V_ROW_BYTES, BLOCK_N};
    fa_product_of_rows(product, 2, S_N, DIM_V, dout, v);
  } else {
    fa_tile_operand q = {smem->q + stage * Q_TILE_BYTES, FA_BY_ROWS, row0, K_ROW_BYTES, BLOCK_M};
    fa_tile_operand k = {smem->k, FA_BY_ROWS, column0, K_ROW_BYTES, BLOCK_N};
    fa_product_of_rows(product, 2, S_N, HEAD_DIM, q, k);
  }
  uint32_t exchange_smem = smem->exchange + pair * (S_N * 1024) + lane * 16;
#pragma unroll
  for (int n = 0; n < S_N; n++) {
    uint32_t given[4];
#pragma unroll
    for (int e = 0; e < 4; e++) given[e] = __float_as_uint(half ? product[n][e] : product[S_N + n][e]);
    st_shared_v4(exchange_smem + (half * S_N + n) * 512, given);
  }
  row0 += 16 * half;
  read_statistics(args, tile, head->h, smem, m0, stage, row0, 1, lse, delta);
  bar_sync(1 + pair, 64); /* each of the pair has what the other gave; it reads it before the next __syncthreads */
#pragma unroll
  for (int n = 0; n < S_N; n++) {
    uint32_t got[4];
    ld_shared_v4(got, exchange_smem + ((half ^ 1) * S_N + n) * 512);
#pragma unroll
    for (int e = 0; e < 4; e++) {
      float kept = half ? product[S_N + n][e] : product[n][e], other = __uint_as_float(got[e]);
      s[n][e] = half ? other : kept;
      dp[n][e] = half ? kept : other;
    }
  }
  return weigh(args, head, tile, smem, m0, buffer, s, dp, 1, row0, column0, lse, delta);
}

/* dq_sum += dS K, in fragment order: each lane adds its four numbers of a fragment at once. */
FA_INLINE void add_dq(const fa_gradient_args *args, const fa_tile *tile, int h, const shared_map *smem, int m0, int buffer, int poisoned) {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row0 = warp % DQ_WARPS * DQ_ROWS, column0 = warp / DQ_WARPS * DQ_COLUMNS;
  float dq[DQ_M * DQ_N][4];
#pragma unroll
  for (int i = 0; i < DQ_M * DQ_N; i++)
#pragma unroll
    for (int e = 0; e < 4; e++) dq[i][e] = 0.0f;
  fa_tile_operand ds = {smem->ds + buffer * 2 * S_TILE_BYTES, FA_BY_ROWS, row0, S_ROW_BYTES, BLOCK_M},
                  k = {smem->k, FA_BY_COLUMNS, column0, K_ROW_BYTES, BLOCK_N};
  if (poisoned)
    fa_product_exact(dq, DQ_M, DQ_N, BLOCK_N, ds, k, 0);
  else
    fa_product(dq, DQ_M, DQ_N, BLOCK_N, ds, k);
  fa_add_fragments(args, fa_workspace_row(args, tile->b, h, tile->q_start) + m0 + row0, column0, dq, DQ_M, DQ_N, lane);
}

/* dV += P^T dO, dK += dS^T Q. */
FA_INLINE void accumulate(warp_sums *sums, const shared_map *smem, int stage, int buffer, int poisoned) {
  int warp = threadIdx.x / 32, key0 = warp % KV_WARPS * KV_ROWS, part = warp / KV_WARPS;
  uint32_t p_smem = smem->p + buffer * 2 * S_TILE_BYTES, ds_smem = smem->ds + buffer * 2 * S_TILE_BYTES;
  fa_tile_operand p = {p_smem, FA_BY_COLUMNS, key0, S_ROW_BYTES, BLOCK_M}, ds = {ds_smem, FA_BY_COLUMNS, key0, S_ROW_BYTES, BLOCK_M};
  fa_tile_operand dout = {smem->dout + stage * DO_TILE_BYTES, FA_BY_COLUMNS, part * DV_COLUMNS, V_ROW_BYTES, BLOCK_M};
  fa_tile_operand q = {smem->q + stage * Q_TILE_BYTES, FA_BY_COLUMNS, part * DK_COLUMNS, K_ROW_BYTES, BLOCK_M};
  if (poisoned) {
    fa_product_exact(sums->dv, KV_M, DV_N, BLOCK_M, p, dout, 1);
    fa_product_exact(sums->dk, KV_M, DK_N, BLOCK_M, ds, q, 0);
  } else {
    fa_product(sums->dv, KV_M, DV_N, BLOCK_M, p, dout);
    fa_product(sums->dk, KV_M, DK_N, BLOCK_M, ds, q);
  }
}

/* All products of a tile. One branch around them all, not one in each, lets the compiler begin the next while the last one ends. */
FA_INLINE void multiply(warp_sums *sums, const fa_gradient_args *args, const fa_tile *tile, const fa_query_tile *at, const shared_map *smem,
                        int stage, int buffer, int poisoned) {
  if (poisoned) {
    accumulate(sums, smem, stage, buffer, 1);
    if (ADD_DQ) add_dq(args, tile, at->h, smem, at->m0, buffer, 1);
  } else {
    accumulate(sums, smem, stage, buffer, 0);
    if (ADD_DQ) add_dq(args, tile, at->h, smem, at->m0, buffer, 0);
  }
}

/* This warp's part of dK or dV, times factor. */
FA_INLINE void store_keys(const fa_arg_view *view, const fa_tile *tile, float sum[][4], int columns, int dims, float factor) {
  int warp = threadIdx.x / 32, n_count = columns / 8;
  if (!view->data) return;
#pragma unroll
  for (int m = 0; m < KV_M; m++)
    fa_store_gradient_rows(view, tile, &sum[m * n_count], n_count, tile->m0 + warp % KV_WARPS * KV_ROWS + 16 * m, warp / KV_WARPS * columns,
                           dims, factor);
}

/* Walks over the query tiles with dK and dV in registers: one tile after the other. */
FA_INLINE void walk_in_turn(warp_sums *sums, const fa_gradient_args *args, const fa_key_work *work, const shared_map *smem) {
  const fa_arg_problem *p = &args->problem;
  const fa_tile *tile = &work->tile;
  fa_gradient_head head;
  fa_query_tile walk = fa_start_query_tiles(work);
  int stage = 0, h = -1, first = 1;
  fa_next_query_tile(&walk, p, work);
  if (walk.h == work->heads_end) return;
  fa_load_key_tiles(args, tile, smem->k, smem->v);
  load_query_side(args, tile, smem, &walk, 0);
  cp_async_commit_group();

  while (walk.h < work->heads_end) {
    const fa_query_tile now = walk;
    if (h != walk.h || (!SCORE && !DROPOUT)) head = fa_gradient_of_head(p, tile, walk.h);
    h = walk.h;
    fa_next_query_tile(&walk, p, work);
    int more = walk.h < work->heads_end;
    cp_async_wait_group(0);
    if (first) fa_split_tiles(smem->k, smem->v, BLOCK_N);
    first = 0;
    fa_split_tiles(smem->q + stage * Q_TILE_BYTES, smem->dout + stage * DO_TILE_BYTES, BLOCK_M);
    __syncthreads(); /* Q and dO of this tile have landed for all; all warps are done with P, dS and the other stage */
    if (STAGES == 2 && more) load_query_side(args, tile, smem, &walk, stage ^ 1);
    cp_async_commit_group();
    int poisoned =
        PAIRED ? paired_gradient_tile(args, &head, tile, smem, now.m0, stage, 0) : gradient_tile(args, &head, tile, smem, now.m0, stage, 0);
    poisoned = __syncthreads_or(poisoned); /* P and dS are complete for all */
    if (STAGES == 2) {
      multiply(sums, args, tile, &now, smem, stage, 0, poisoned);
      stage ^= 1;
    } else {
      accumulate(sums, smem, stage, 0, poisoned);
      __syncthreads(); /* all warps are done with Q and dO */
      if (more) load_query_side(args, tile, smem, &walk, 0);
      cp_async_commit_group();
      if (ADD_DQ) add_dq(args, tile, now.h, smem, now.m0, 0, poisoned);
    }
  }
}

/* The same with P and dS of tile t beside the products of tile t - 1. One barrier a tile. */
FA_INLINE void walk_overlapped(warp_sums *sums, const fa_gradient_args *args, cta_work *cta, const shared_map *smem) {
  const fa_arg_problem *p = &args->problem;
  const fa_key_work *work = &cta->keys;
  const fa_tile *tile = &work->tile;
  int products_first = threadIdx.x / 32 >= WARPS / 2, end = work->heads_end, poisoned = 0;
  fa_query_tile walk = fa_start_query_tiles(work);
#pragma unroll 1
  for (int t = 0; t < 2; t++) {
    if (walk.h < end) fa_next_query_tile(&walk, p, work);
    if (threadIdx.x == 0) cta->queue[t] = walk;
    if (t == 0 && walk.h < end) fa_load_key_tiles(args, tile, smem->k, smem->v);
    if (walk.h < end) load_query_side(args, tile, smem, &walk, t);
    cp_async_commit_group();
  }
  fa_gradient_head head;
  head.h = -1;
#pragma unroll 1
  for (int t = 0; t == 0 || cta->queue[(t - 1) & 3].h < end; t++) {
    if (t == 0) {
      cp_async_wait_group(1);
    } else {
      if (walk.h < end) fa_next_query_tile(&walk, p, work);
      if (threadIdx.x == 0) cta->queue[(t + 1) & 3] = walk;
      cp_async_wait_group(0);
    }
    /* P and dS of tile t - 1 are complete, tile t has landed, and all warps are done with the products of tile t - 2. */
    poisoned = __syncthreads_or(poisoned);
    if (t > 0 && walk.h < end) load_query_side(args, tile, smem, &walk, (t + 1) % 3);
    cp_async_commit_group();
    int poisoned_ahead = 0;
#pragma unroll 1
    for (int half = 0; half < 2; half++) {
      const fa_query_tile *done = &cta->queue[(t - 1) & 3], *ahead = &cta->queue[t & 3];
      if (half == !products_first) {
        if (t == 0) continue;
        multiply(sums, args, tile, done, smem, (t + 2) % 3, (t + 1) & 1, poisoned);
      } else if (ahead->h < end) {
        if (ahead->h != head.h) head = fa_gradient_of_head(p, tile, ahead->h);
        poisoned_ahead = gradient_tile(args, &head, tile, smem, ahead->m0, t % 3, t & 1);
      }
    }
    poisoned = poisoned_ahead;
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, CTAS) bwd_sm80(const __grid_constant__ fa_gradient_args args) {
  extern __shared__ __align__(128) unsigned char shared[];
  cta_work *cta = (cta_work *)(shared + WORK_OFFSET);
  if (!fa_find_key_work(&args, &cta->keys)) return;
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
  if (STAGES == 3)
    walk_overlapped(&sums, &args, cta, &smem);
  else
    walk_in_turn(&sums, &args, &cta->keys, &smem);
  store_keys(&args.dk, &cta->keys.tile, sums.dk, DK_COLUMNS, args.problem.dim_qk, (float)args.problem.scale);
  store_keys(&args.dv, &cta->keys.tile, sums.dv, DV_COLUMNS, args.problem.dim_v, 1.0f);
}
