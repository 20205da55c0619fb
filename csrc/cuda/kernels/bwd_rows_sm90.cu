/* bwd_rows_sm90.cu: dQ on Hopper's wgmma and TMA, for head dims above 128; fp16 and bf16. bwd_keys_sm90.cu computes dK and dV.
 *
 * One persistent CTA per SM owns 128 query rows of a head at a time, each of two consumer warpgroups 64 of them; the keys that some of them see pass
 * by, from last to first. Nothing is added up in memory, so the result is the same from run to run.
 *
 *   warp 0 (producer)                    warpgroup w = 0, 1
 *   takes a tile from the queue
 *   tile_full[2]  --------------------->  reads it, and lse and delta of its rows
 *   K(last), Q and dO of every            S = Q K(last)^T, dP = dO V(last)^T               (the first step)
 *   warpgroup, V(last), K(last-1) ...     for n = last-1 ... first:
 *   rows_full[w], k_full[s], v_full[s] ->   dQ += dS(n+1) K(n+1)     issued                the tensor cores work on dP
 *                                           S = Q K(n)^T             issued                through the exponentials
 *                                           dP = dO V(n)^T           issued
 *   k_empty[s] <------------------------    S and dQ done: P = exp2(S - lse)
 *   v_empty[s] <------------------------    dP done: dS = P (dP - delta), in 16 bits (registers, the left operand of the next product)
 *   rows_empty[w] <---------------------  dQ += dS(first) K(first)
 *   tile_empty[2] <---------------------  dQ to global memory
 *
 * A warpgroup that sees less than its CTA lets the surplus blocks pass.
 *
 * Shared memory, bytes (every matrix in chunks of 64 columns = rows of 128 bytes, 128-byte swizzle, aligned to 1024):
 *   Q         2 * QK_BYTES              dO        2 * V_BYTES           64 rows for each warpgroup
 *   K         K_STAGES * QK_BYTES       V         V_STAGES * V_BYTES    64 keys
 *   tiles     2 * 48                    what the producer tells of a tile
 *   blocks    K_STAGES * 4              which keys are in a stage of K, and what each warpgroup sees of them
 *   barriers  (2 * K_STAGES + 2 * V_STAGES + 8) * 8
 *
 * What limits: shared memory, which the products with 64 columns read as fast as it can, then power.
 *
 * Inputs: rows contiguous, strides multiples of 16 bytes, dims multiples of 8 up to HEAD_DIM, DIM_V (the TMA fills the rest with zeros).
 *
 * What it takes, for bf16, equal dims, compiled by NVRTC 13.0 (registers before the warpgroups share them out):
 *   sm_90a  HEAD_DIM=192  168 registers  196840 bytes
 *   sm_90a  HEAD_DIM=256  168 registers  229592 bytes
 *
 * Constants: DTYPE, HEAD_DIM and DIM_V (multiples of 64), K_STAGES, V_STAGES, MASKING (1: causal or window), VARLEN (1: cu_seqlens or seqused),
 * BLOCK_MASK (1: there is one, in multiples of 128).
 */
#define REAL float
#define ALIGNED 1
#define BLOCK_M 128
#define BLOCK_N 64
#define FEW_ROWS 0

#include "gradient_sm90.h"
#include "work_sm90.h"

#define THREADS 384
#define PRODUCER_REGISTERS 24
#define CONSUMER_REGISTERS 240

#define DQ_FRAGS (HEAD_DIM / 8)

#define TILE_SLOTS 2
#define DOUT_OFFSET (2 * QK_BYTES)
#define K_OFFSET (DOUT_OFFSET + 2 * V_BYTES)
#define V_OFFSET (K_OFFSET + K_STAGES * QK_BYTES)
#define TILES_OFFSET (V_OFFSET + V_STAGES * V_BYTES)
#define BLOCKS_OFFSET (TILES_OFFSET + TILE_SLOTS * WORK_BYTES)
#define BARRIERS_OFFSET (BLOCKS_OFFSET + (K_STAGES + 1) / 2 * 8)

#define PASS_BARRIER 1 /* named, + w: its four warps have seen a block that they do not use */

DEFINE_WGMMA_RS(wgmma_ds_k, HEAD_DIM, 1)

/* ---- shared memory ---- */

FA_INLINE uint32_t bar_smem(uint32_t smem, int i) { return smem + BARRIERS_OFFSET + 8 * i; }
FA_INLINE uint32_t k_full(uint32_t smem, int i) { return bar_smem(smem, (unsigned)i % K_STAGES); }
FA_INLINE uint32_t k_empty(uint32_t smem, int i) { return bar_smem(smem, K_STAGES + (unsigned)i % K_STAGES); }
FA_INLINE uint32_t v_full(uint32_t smem, int i) { return bar_smem(smem, 2 * K_STAGES + (unsigned)i % V_STAGES); }
FA_INLINE uint32_t v_empty(uint32_t smem, int i) { return bar_smem(smem, 2 * K_STAGES + V_STAGES + (unsigned)i % V_STAGES); }
FA_INLINE uint32_t other_bar(uint32_t smem, int i) { return bar_smem(smem, 2 * K_STAGES + 2 * V_STAGES + i); }
FA_INLINE uint32_t rows_full(uint32_t smem, int w) { return other_bar(smem, w); }
FA_INLINE uint32_t rows_empty(uint32_t smem, int w) { return other_bar(smem, 2 + w); }
FA_INLINE uint32_t tile_full(uint32_t smem, int i) { return other_bar(smem, 4 + (unsigned)i % TILE_SLOTS); }
FA_INLINE uint32_t tile_empty(uint32_t smem, int i) { return other_bar(smem, 4 + TILE_SLOTS + (unsigned)i % TILE_SLOTS); }

FA_INLINE uint32_t q_smem(uint32_t smem, int w) { return smem + w * QK_BYTES; }
FA_INLINE uint32_t dout_smem(uint32_t smem, int w) { return smem + DOUT_OFFSET + w * V_BYTES; }
FA_INLINE uint32_t k_smem(uint32_t smem, int i) { return smem + K_OFFSET + (unsigned)i % K_STAGES * QK_BYTES; }
FA_INLINE uint32_t v_smem(uint32_t smem, int i) { return smem + V_OFFSET + (unsigned)i % V_STAGES * V_BYTES; }
FA_INLINE uint32_t slot_smem(uint32_t smem, int i) { return smem + TILES_OFFSET + (unsigned)i % TILE_SLOTS * WORK_BYTES; }
FA_INLINE uint32_t block_smem(uint32_t smem, int i) { return smem + BLOCKS_OFFSET + (unsigned)i % K_STAGES * 4; }

/* Each consumer warp speaks for itself. */
FA_INLINE void init_barriers(uint32_t smem) {
  for (int s = 0; s < K_STAGES; s++) {
    mbarrier_init(k_full(smem, s), 1);
    mbarrier_init(k_empty(smem, s), 8);
  }
  for (int s = 0; s < V_STAGES; s++) {
    mbarrier_init(v_full(smem, s), 1);
    mbarrier_init(v_empty(smem, s), 8);
  }
  for (int w = 0; w < 2; w++) {
    mbarrier_init(rows_full(smem, w), 1);
    mbarrier_init(rows_empty(smem, w), 4);
  }
  for (int i = 0; i < TILE_SLOTS; i++) {
    mbarrier_init(tile_full(smem, i), 1);
    mbarrier_init(tile_empty(smem, i), 8);
  }
  fence_mbarrier_init();
}

/* ---- producer ---- */

/* Q and dO of both warpgroups; `turn` counts the tiles of this CTA. */
FA_INLINE void load_queries(const fa_arg_problem *p, const fa_tma_map *q_map, const fa_tma_map *dout_map, uint32_t smem, const work *t,
                            int turn) {
  int b = VARLEN && p->packed ? 0 : t->b;
#pragma unroll 1
  for (int w = 0; w < 2; w++) {
    int row = t->q_start + t->m0 + 64 * w;
    mbarrier_wait_parity(rows_empty(smem, w), parity(turn, 1) ^ 1); /* it has multiplied with the rows that lay there */
    load_box(q_smem(smem, w), q_map, rows_full(smem, w), QK_CHUNKS, row, t->h, b, V_BYTES);
    load_chunks(dout_smem(smem, w), dout_map, rows_full(smem, w), V_CHUNKS, row, t->h, b);
  }
}

/* What a warpgroup sees of a block. */
enum { NOTHING, SOME, ALL };

/* Which blocks the rows of a warpgroup see: those from first to last, and as a whole those from plain_first to plain_end - 1. */
typedef struct {
  int first, last, plain_first, plain_end;
} part;

FA_INLINE part part_of(const fa_arg_problem *p, const work *t, int w) {
  int m0 = t->m0 + 64 * w, m1 = fa_min(m0 + 64, t->len_q);
  part own = {0, -1, 0, t->len_k / BLOCK_N};
  seen_blocks(p, t->len_q, t->len_k, m0, m1, &own.first, &own.last);
  if (MASKING) {
    fa_range plain = fa_unmasked_keys(p->rule, t->len_q, t->len_k, m0, m1);
    own.plain_first = fa_ceil_div(plain.lo, BLOCK_N);
    own.plain_end = fa_max(plain.hi, 0) / BLOCK_N;
  }
  return own;
}

/* Block n and what both warpgroups see of it, as block_smem tells it. Lane w speaks for warpgroup w. */
FA_INLINE uint32_t describe_block(const part *own, int n) {
  int sees = n < own->first || n > own->last ? NOTHING : n < own->plain_first || n >= own->plain_end ? SOME : ALL;
  return (uint32_t)(n << 4 | __shfl_sync(0xFFFFFFFFu, sees, 1) << 2 | __shfl_sync(0xFFFFFFFFu, sees, 0));
}

/* One lane issues all loads of a tile, all lanes look for its blocks. `ring` counts the blocks of this CTA. */
FA_INLINE int load_tile(const fa_arg_problem *p, const fa_tma_map *q_map, const fa_tma_map *k_map, const fa_tma_map *v_map,
                        const fa_tma_map *dout_map, uint32_t smem, work *t, int k_start, int ring, int turn) {
  int n = next_block(p, t, t->last), b = VARLEN && p->packed ? 0 : t->b, h_k = t->h / p->group;
  part own = part_of(p, t, laneid() & 1);
#pragma unroll 1
  for (int with_queries = 1; n >= t->first; with_queries = 0, ring++) {
    int row = k_start + n * BLOCK_N;
    uint32_t block = describe_block(&own, n);
    if (laneid() == 0) {
      mbarrier_wait_parity(k_empty(smem, ring), parity(ring, K_STAGES) ^ 1); /* both warpgroups have multiplied with the K that lay there */
      st_shared_b32(block_smem(smem, ring), block);
      load_box(k_smem(smem, ring), k_map, k_full(smem, ring), QK_CHUNKS, row, h_k, b, 0);
      if (with_queries) load_queries(p, q_map, dout_map, smem, t, turn);
      if (n - STEPS_AHEAD >= t->first && asks_ahead(n, t->m0 / BLOCK_M)) {
        prefetch_chunks(k_map, QK_CHUNKS, row - STEPS_AHEAD * BLOCK_N, h_k, b);
        prefetch_chunks(v_map, V_CHUNKS, row - STEPS_AHEAD * BLOCK_N, h_k, b);
      }
    }
    __syncwarp();
    n = next_block(p, t, n - 1);
    if (laneid() == 0) {
      mbarrier_wait_parity(v_empty(smem, ring), parity(ring, V_STAGES) ^ 1); /* both have multiplied with the V that lay there */
      load_box(v_smem(smem, ring), v_map, v_full(smem, ring), V_CHUNKS, row, h_k, b, 0);
    }
  }
  return ring;
}

FA_INLINE void produce(const fa_arg_problem *p, const fa_schedule *schedule, const fa_tma_map *q_map, const fa_tma_map *k_map,
                       const fa_tma_map *v_map, const fa_tma_map *dout_map, uint32_t smem) {
  int number = (int)blockIdx.x, ring = 0, k_start = 0, loaded = 0;
#pragma unroll 1
  for (int turn = 0;;) {
    work t = find_work(p, schedule, number, &k_start);
    int over = number >= schedule->total;
    if (t.b >= 0 || over) {
      if (laneid() == 0) {
        mbarrier_wait_parity(tile_empty(smem, turn), parity(turn, TILE_SLOTS) ^ 1); /* every consumer warp has written that tile's dQ */
        send_work(slot_smem(smem, turn), &t);
        mbarrier_arrive(tile_full(smem, turn));
      }
      if (over) return;
      ring = load_tile(p, q_map, k_map, v_map, dout_map, smem, &t, k_start, ring, loaded);
      loaded += t.blocks > 0;
      turn++;
      __syncwarp();
    }
    /* Taken late: a tile that waits behind a long one waits for this CTA though others may be free. */
    if (schedule->next && laneid() == 0) number = atomicAdd(schedule->next, 1);
    number = __shfl_sync(0xFFFFFFFFu, number, 0) + (int)gridDim.x;
  }
}

/* ---- consumer ---- */

/* Who this thread is. */
typedef struct {
  const fa_gradient_args *args;
  uint32_t smem;
  int warp_row; /* first row of the warp within BLOCK_M */
  float scale_log2;
} place;

FA_INLINE int warpgroup(const place *me) { return me->warp_row / 64; }

FA_INLINE void release_k(const place *me, int i) { arrive_as_warp(k_empty(me->smem, i)); }
FA_INLINE void release_v(const place *me, int i) { arrive_as_warp(v_empty(me->smem, i)); }

/* dQ += dS K, or dQ = dS K when there is none yet. */
FA_INLINE void issue_dq(const place *me, float dq[DQ_FRAGS][4], const uint32_t ds[2 * S_FRAGS], int ring, int add) {
  uint32_t b = same_in_warp(wgmma_start(k_smem(me->smem, ring), BOX_ROWS * 128));
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < BLOCK_N / 16; k++) wgmma_ds_k(&dq[0][0], ds + 4 * k, wgmma_descriptor(b, k * 2048), k > 0 || add);
  wgmma_commit_group();
}

/* S becomes P. */
FA_INLINE void weigh(float s[S_FRAGS][4], float scale_log2, const float lse[2]) {
#pragma unroll
  for (int n = 0; n < S_FRAGS; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) s[n][e] = ex2_approx(__fmaf_rn(s[n][e], scale_log2, -lse[e >> 1]));
}

/* Pairs outside the rules, or past the sequence, get the weight 0. */
FA_INLINE void hide_invisible(const place *me, float s[S_FRAGS][4], int turn, int ring) {
  work t = receive_work(&me->args->problem, slot_smem(me->smem, turn));
  int lane = laneid(), n = (int)ld_shared_b32(block_smem(me->smem, ring)) >> 4, column0 = n * BLOCK_N + 2 * (lane & 3);
#pragma unroll
  for (int r = 0; r < 2; r++) {
    int i = t.m0 + me->warp_row + (lane >> 2) + 8 * r, lo = 0, hi = t.len_k;
    if (MASKING) {
      lo = fa_row_lo(me->args->problem.rule, t.len_q, t.len_k, i);
      hi = fa_row_hi(me->args->problem.rule, t.len_q, t.len_k, i);
    }
#pragma unroll
    for (int f = 0; f < S_FRAGS; f++)
#pragma unroll
      for (int e = 0; e < 2; e++)
        if (8 * f + e < lo - column0 || 8 * f + e >= hi - column0) s[f][2 * r + e] = 0.0f;
  }
}

/* dS of P and dP, as the left operand of the next product. */
FA_INLINE void pack_gradients(uint32_t ds[2 * S_FRAGS], float p[S_FRAGS][4], float dp[S_FRAGS][4], const float delta[2]) {
#pragma unroll
  for (int n = 0; n < S_FRAGS; n++)
#pragma unroll
    for (int r = 0; r < 2; r++)
      ds[2 * n + r] = fa_pack(p[n][2 * r] * (dp[n][2 * r] - delta[r]), p[n][2 * r + 1] * (dp[n][2 * r + 1] - delta[r]));
}

/* What the warpgroup sees of block number `ring`, once it is there. */
FA_INLINE int await_block(const place *me, int ring) {
  mbarrier_wait_parity(k_full(me->smem, ring), parity(ring, K_STAGES));
  return same_in_warp(ld_shared_b32(block_smem(me->smem, ring)) >> 2 * warpgroup(me)) & 3;
}

/* The next of `left` blocks that the warpgroup sees, or that after the last. Others still have to land before their places can be given back, and every
 * warp has to see that, or the phase after the next would look like this one to a warp that lags behind. */
FA_INLINE int let_pass(const place *me, int ring, int *left) {
#pragma unroll 1
  for (; *left > 0 && await_block(me, ring) == NOTHING; --*left, ring++) {
    mbarrier_wait_parity(v_full(me->smem, ring), parity(ring, V_STAGES));
    bar_sync(PASS_BARRIER + warpgroup(me), 128);
    release_k(me, ring);
    release_v(me, ring);
  }
  return ring;
}

/* Block number `ring` of the CTA, while dQ takes up the gradients of the block before. is_first: there is none before; add: there is one before that. */
FA_INLINE void step(const place *me, int turn, int ring, int sees, int is_first, int add, float dq[DQ_FRAGS][4], uint32_t ds[2 * S_FRAGS],
                    const float lse[2], const float delta[2]) {
  float s[S_FRAGS][4], dp[S_FRAGS][4];
  uint32_t smem = me->smem;
  int w = warpgroup(me);
  if (!is_first) issue_dq(me, dq, ds, ring - 1, add);
  issue_scores(s, q_smem(smem, w), k_smem(smem, ring), HEAD_DIM);
  mbarrier_wait_parity(v_full(smem, ring), parity(ring, V_STAGES));
  issue_scores(dp, dout_smem(smem, w), v_smem(smem, ring), DIM_V);
  wgmma_wait_group(1);
  wgmma_hold(&s[0][0], 4 * S_FRAGS);
  if (!is_first) {
    wgmma_hold(&dq[0][0], 4 * DQ_FRAGS);
    release_k(me, ring - 1);
  }
  weigh(s, me->scale_log2, lse);
  if (sees == SOME) hide_invisible(me, s, turn, ring);
  wgmma_wait_group(0);
  wgmma_hold(&dp[0][0], 4 * S_FRAGS);
  release_v(me, ring);
  pack_gradients(ds, s, dp, delta);
}

/* lse and delta of this lane's two rows. */
FA_INLINE void read_statistics(const place *me, const work *t, float lse[2], float delta[2]) {
  int64_t row = fa_workspace_row(me->args, t->b, t->h, t->q_start) + t->m0 + me->warp_row + (laneid() >> 2);
  fa_read_row_statistics(me->args, row, lse, delta);
}

/* The warpgroup's share of tile `turn`, which has `left` blocks. Returns the count of key blocks so far. */
FA_INLINE int differentiate(const place *me, int turn, int ring, int loaded, int left, float dq[DQ_FRAGS][4], int *has_sum) {
  uint32_t ds[2 * S_FRAGS], rows = rows_empty(me->smem, warpgroup(me));
  work t = receive_work(&me->args->problem, slot_smem(me->smem, turn));
  float lse[2], delta[2];
  int sees;
  read_statistics(me, &t, lse, delta);
  ring = let_pass(me, ring, &left);
  mbarrier_wait_parity(rows_full(me->smem, warpgroup(me)), parity(loaded, 1));
  *has_sum = left > 0;
  if (left == 0) {
    bar_sync(PASS_BARRIER + warpgroup(me), 128); /* every warp has seen the rows land */
    arrive_as_warp(rows);
    return ring;
  }
  step(me, turn, ring, await_block(me, ring), 1, 0, dq, ds, lse, delta);
  int add = 0;
#pragma unroll 1
  for (ring++; --left > 0 && (sees = await_block(me, ring)) != NOTHING; ring++, add = 1)
    step(me, turn, ring, sees, 0, add, dq, ds, lse, delta);
  arrive_as_warp(rows);
  issue_dq(me, dq, ds, ring - 1, add);
  wgmma_wait_group(0);
  wgmma_hold(&dq[0][0], 4 * DQ_FRAGS);
  release_k(me, ring - 1);
  return let_pass(me, ring, &left);
}

/* Writes the warp's 16 rows of dQ and repairs them. */
FA_INLINE void leave(const place *me, int turn, float dq[DQ_FRAGS][4], int has_sum) {
  const fa_gradient_args *args = me->args;
  const fa_arg_problem *p = &args->problem;
  work t = receive_work(p, slot_smem(me->smem, turn));
  int row0 = t.m0 + me->warp_row, used = has_sum ? t.len_q - row0 : 0;
  char *row0_gmem = fa_head_base(&args->dq, 2, t.b, t.h, t.q_start + row0);
  store_rows(row0_gmem, args->dq.s * 2, dq, DQ_FRAGS, used, t.slot_q - row0, p->dim_qk, (float)p->scale);
  unsigned rows = rows_not_finite(dq, DQ_FRAGS) & (used > 0 ? (used >= 16 ? 0xFFFFu : (1u << used) - 1) : 0u);
  __syncwarp(); /* the rows below were written by other lanes */
  if (rows) {
    fa_tile tile = {t.b, t.h, 0, 0, 0, 0, 0, 0, 0, 0};
    forget_origin(args); /* or what can be computed ahead of the main loop is, and takes registers there */
    fa_read_lengths(&args->problem, &tile);
#pragma unroll 1
    for (; rows; rows &= rows - 1) repair_query(args, &tile, t.h, row0 + __ffs((int)rows) - 1);
  }
  arrive_as_warp(tile_empty(me->smem, turn));
}

FA_INLINE void consume(const fa_gradient_args *args, const fa_schedule *schedule, uint32_t smem) {
  place me = {args, smem, same_in_warp((int)threadIdx.x / 32 * 16 - 64), schedule->scale_log2};
  float dq[DQ_FRAGS][4];
  int ring = 0, loaded = 0;
#pragma unroll 1
  for (int turn = 0;; turn++) {
    int has_sum = 0;
    mbarrier_wait_parity(tile_full(smem, turn), parity(turn, TILE_SLOTS));
    if (ld_shared_b32(slot_smem(smem, turn)) == (uint32_t)NO_MORE_TILES) break;
    int blocks = receive_work(&args->problem, slot_smem(smem, turn)).blocks;
    if (blocks > 0) ring = differentiate(&me, turn, ring, loaded++, blocks, dq, &has_sum);
    leave(&me, turn, dq, has_sum);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    bwd_rows_sm90(const __grid_constant__ fa_gradient_args args, const __grid_constant__ fa_schedule schedule,
                  const __grid_constant__ fa_tma_map q_map, const __grid_constant__ fa_tma_map k_map,
                  const __grid_constant__ fa_tma_map v_map, const __grid_constant__ fa_tma_map dout_map) {
  extern __shared__ __align__(1024) unsigned char shared[];
  uint32_t smem = smem_address(shared);
  if (threadIdx.x == 0) init_barriers(smem);
  __syncthreads(); /* the barriers exist */
  if (threadIdx.x < 128) {
    setmaxnreg_dec(PRODUCER_REGISTERS);
    if (threadIdx.x < 32) produce(&args.problem, &schedule, &q_map, &k_map, &v_map, &dout_map, smem);
  } else {
    setmaxnreg_inc(CONSUMER_REGISTERS);
    consume(&args, &schedule, smem);
  }
  griddepcontrol_wait(); /* whoever waits for this kernel also means bwd_keys_sm90, beside which its first CTAs may have run */
}
