/* bwd_sm90.cu: the backward pass on Hopper's wgmma and TMA; fp16 and bf16, head dims up to 128.
 *
 * One CTA owns BLOCK_N = 128 keys of one key head. K and V stay; Q and dO of every query tile that sees the keys pass by, for each query head of the
 * group. Scores are computed transposed, keys down and queries across: accumulators of P and dS are then the operands a of dV and dK as they stand,
 * and only dS, for dQ, goes through shared memory.
 *
 *   warp 0: fetches         warpgroups 1, 2: 64 keys each                               warpgroup 3 (ADD_DQ)
 *   K, V once               for each query tile:
 *   what is to be done and      S = K Q^T                         issued
 *   q_full[s], dout_full[s] ->  P = exp2(S - lse)
 *                               dP = V dO^T, dV += P dO           issued
 *                               dS = P (dP - delta)               under dV
 *                               dS to shared memory, ds_full[b] ------------------->    dQ = dS^T K, 64 columns at a time,
 *   empty[s] <----------------  dK += dS Q                        issued                added to dq_sum of the workspace (dq_sum.h)
 *                               (ds_empty[b] before the next dS) <------------------    ds_empty[b]
 *                           dK, dV to global memory
 *
 * The two key warpgroups never wait for each other, so one computes exponentials while the tensor cores work for the other, and dQ fills what is left.
 * A tile takes a warpgroup little more time than its products and its exponentials, so what else is to be decided of it, the producer decides.
 *
 * Shared memory, bytes (every matrix in chunks of 64 columns = rows of 128 bytes, 128-byte swizzle, aligned to 1024):
 *   K        BLOCK_N * 128 * chunks of HEAD_DIM            V    BLOCK_N * 128 * chunks of DIM_V
 *   Q        STAGES * BLOCK_M * 128 * chunks of HEAD_DIM   dO   STAGES * BLOCK_M * 128 * chunks of DIM_V
 *   dS       2 * BLOCK_N * BLOCK_M * 2, a row for each key (ADD_DQ)
 *   what P of a masked tile loses in 16 bits   BLOCK_N * BLOCK_M * 2, 16 bytes of each thread at a time
 *   lse, delta of a query tile   STAGES * 2 * BLOCK_M * 4
 *   key flags    BLOCK_N * 4: what is added to the scores of a key: 0, or NaN where K is not finite
 *   steps        8 * 16: what is to be done with a query tile
 *   fa_key_work  128
 *   barriers     (2 + 3 * STAGES + 4) * 8
 *
 * Pairs that are not visible have P = dS = 0 exactly. 0 * NaN is NaN all the same, so in tiles with such pairs data that is not finite is looked for
 * (mma_bwd.h): K once, before the first product (its finite part stays, and the key's scores become NaN); Q and dO by their products, and then the
 * tile's dV and dK are computed by mma.sync, element by element where it matters.
 *
 * Inputs: rows contiguous, strides multiples of 16 bytes, dims multiples of 8 up to HEAD_DIM, DIM_V (the TMA fills the rest with zeros).
 *
 * What it takes, for bf16, equal dims, compiled by NVRTC 13.0:
 *   sm_90a  HEAD_DIM=64   128 registers  199520 bytes
 *   sm_90a  HEAD_DIM=96   128 registers  215416 bytes
 *   sm_90a  HEAD_DIM=128  128 registers  215416 bytes
 *
 * Constants: DTYPE, HEAD_DIM, DIM_V (64, 96 or 128), BLOCK_M, BLOCK_N, STAGES of Q and dO, ADD_DQ (0: dQ is left to bwd_rows_sm80.cu or not wanted).
 */
#define REAL float
#define ALIGNED 1
#define SCORE 0
#define DROPOUT 0
#define KEY_WARPGROUPS 2
#define WARPS (4 * (1 + KEY_WARPGROUPS + ADD_DQ))

#include "ptx_sm90.h"
#include "schedule_sm90.h"
#include "work_bwd.h"

/* Each set is all that the CTA has. */
#define PRODUCER_REGISTERS 24
#define KEY_REGISTERS (ADD_DQ ? 208 : 240)
#define DQ_REGISTERS 72

#define QK_CHUNKS ((HEAD_DIM + 63) / 64)
#define V_CHUNKS ((DIM_V + 63) / 64)
#define M_CHUNKS (BLOCK_M / 64)
#define K_CHUNK_BYTES (BLOCK_N * 128)
#define Q_CHUNK_BYTES (BLOCK_M * 128)
#define S_FRAGS (BLOCK_M / 8)
#define DK_FRAGS (HEAD_DIM / 8)
#define DV_FRAGS (DIM_V / 8)
#define V_OFFSET (QK_CHUNKS * K_CHUNK_BYTES)
#define Q_OFFSET (V_OFFSET + V_CHUNKS * K_CHUNK_BYTES)
#define DOUT_OFFSET (Q_OFFSET + STAGES * QK_CHUNKS * Q_CHUNK_BYTES)
#define DS_OFFSET (DOUT_OFFSET + STAGES * V_CHUNKS * Q_CHUNK_BYTES)
#define REST_OFFSET (DS_OFFSET + (ADD_DQ ? 2 * M_CHUNKS * K_CHUNK_BYTES : 0))
#define REST_BYTES (BLOCK_N * BLOCK_M * 2)
#define STATISTICS_OFFSET (REST_OFFSET + REST_BYTES)
#define FLAGS_OFFSET (STATISTICS_OFFSET + STAGES * STATISTICS_BYTES)
#define WORK_OFFSET (FLAGS_OFFSET + BLOCK_N * 4)
#define STEPS_OFFSET (WORK_OFFSET + 128)
#define BARRIERS_OFFSET (STEPS_OFFSET + STEP_SLOTS * 16)

/* A step is read by the dQ warpgroup when the producer may be STAGES + 2 steps on. */
#define STEP_SLOTS 8

#define WARPGROUP_BARRIER 1 /* + w: the four warps of key warpgroup w */

DEFINE_WGMMA_SS(wgmma_scores, BLOCK_M, 0, 0)
DEFINE_WGMMA_RS(wgmma_dv, DIM_V, 1)
DEFINE_WGMMA_RS(wgmma_dk, HEAD_DIM, 1)
DEFINE_WGMMA_SS(wgmma_dq, 64, 1, 1)

/* ---- shared memory. Rings: use number i of a ring is of entry i % size, in phase i / size ---- */

FA_INLINE uint32_t bar_smem(uint32_t smem, int i) { return smem + BARRIERS_OFFSET + 8 * i; }
FA_INLINE uint32_t k_full(uint32_t smem) { return bar_smem(smem, 0); }
FA_INLINE uint32_t v_full(uint32_t smem) { return bar_smem(smem, 1); }
FA_INLINE uint32_t ds_full(uint32_t smem, int i) { return bar_smem(smem, 2 + (unsigned)i % 2); }
FA_INLINE uint32_t ds_empty(uint32_t smem, int i) { return bar_smem(smem, 4 + (unsigned)i % 2); }
FA_INLINE uint32_t q_full(uint32_t smem, int i) { return bar_smem(smem, 6 + (unsigned)i % STAGES); }
FA_INLINE uint32_t dout_full(uint32_t smem, int i) { return bar_smem(smem, 6 + STAGES + (unsigned)i % STAGES); }
FA_INLINE uint32_t empty(uint32_t smem, int i) { return bar_smem(smem, 6 + 2 * STAGES + (unsigned)i % STAGES); }
FA_INLINE int parity(int i, int size) { return (unsigned)i / (unsigned)size & 1; }

FA_INLINE uint32_t q_smem(uint32_t smem, int i) { return smem + Q_OFFSET + (unsigned)i % STAGES * (QK_CHUNKS * Q_CHUNK_BYTES); }
FA_INLINE uint32_t dout_smem(uint32_t smem, int i) { return smem + DOUT_OFFSET + (unsigned)i % STAGES * (V_CHUNKS * Q_CHUNK_BYTES); }
FA_INLINE uint32_t ds_smem(uint32_t smem, int i) { return smem + DS_OFFSET + (unsigned)i % 2 * (M_CHUNKS * K_CHUNK_BYTES); }
FA_INLINE uint32_t lse_smem(uint32_t smem, int i) { return smem + STATISTICS_OFFSET + (unsigned)i % STAGES * STATISTICS_BYTES; }

FA_INLINE uint32_t step_smem(uint32_t smem, int i) { return smem + STEPS_OFFSET + (unsigned)i % STEP_SLOTS * 16; }

FA_INLINE void init_barriers(uint32_t smem) {
  mbarrier_init(k_full(smem), 1);
  mbarrier_init(v_full(smem), 1);
  for (int i = 0; i < 2; i++) {
    mbarrier_init(ds_full(smem, i), 4 * KEY_WARPGROUPS);
    mbarrier_init(ds_empty(smem, i), 1);
  }
  for (int i = 0; i < STAGES; i++) {
    mbarrier_init(q_full(smem, i), 1);
    mbarrier_init(dout_full(smem, i), 1);
    mbarrier_init(empty(smem, i), 4 * KEY_WARPGROUPS);
  }
  fence_mbarrier_init();
}

/* The key tile of this CTA. Tiles come in the order of schedule_sm90.h: the first keys, which under a causal mask most queries see, come first. */
FA_INLINE int find_key_work(const fa_gradient_args *args, const fa_schedule *schedule, fa_key_work *work) {
  const fa_arg_problem *p = &args->problem;
  int head, from_end;
  fa_tile tile;
  fa_scheduled_tile(schedule, (int)blockIdx.x, &head, &from_end);
  if (!fa_key_tile_at(p, BLOCK_N, head / p->heads_k, head % p->heads_k, schedule->tiles - 1 - from_end, &tile)) return 0;
  fa_share_key_work(p, &tile, work);
  return 1;
}

/* ---- producer ---- */

/* Rows [row, row + rows) of a matrix, in chunks of 64 columns. */
FA_INLINE void load_rows(uint32_t dst_smem, const fa_tma_map *map, uint32_t full, int chunks, int rows, int row, int h, int b) {
#pragma unroll 1
  for (int c = 0; c < chunks; c++) cp_async_bulk_tensor_load(dst_smem + c * rows * 128, map, full, 64 * c, row, h, b);
}

/* What a warpgroup has to do with a query tile. */
enum { UNSEEN, PARTLY, WHOLE, OVER };

/* WHOLE: every query of the tile sees every key of the 64 from key0 on. UNSEEN: none sees any. */
FA_INLINE int kind_of(const fa_arg_problem *p, const fa_tile *tile, int m0, int key0) {
  int m1 = fa_min(m0 + BLOCK_M, tile->len_q);
  fa_range all = fa_unmasked_keys(p->rule, tile->len_q, tile->len_k, m0, m1),
           any = fa_visited_keys(p->rule, tile->len_q, tile->len_k, m0, m1);
  if (all.lo <= key0 && key0 + 64 <= all.hi && m1 == m0 + BLOCK_M) return WHOLE;
  return any.lo < key0 + 64 && key0 < any.hi ? PARTLY : UNSEEN;
}

FA_INLINE void load_keys(const fa_key_work *work, const fa_tma_map *k_map, const fa_tma_map *v_map, int b, uint32_t smem) {
  int key = (int)work->tile.k_start + work->tile.m0, h = work->tile.h;
  mbarrier_arrive_expect_tx(k_full(smem), QK_CHUNKS * K_CHUNK_BYTES);
  load_rows(smem, k_map, k_full(smem), QK_CHUNKS, BLOCK_N, key, h, b);
  mbarrier_arrive_expect_tx(v_full(smem), V_CHUNKS * K_CHUNK_BYTES);
  load_rows(smem + V_OFFSET, v_map, v_full(smem), V_CHUNKS, BLOCK_N, key, h, b);
}

/* A step is: kind for warpgroup 0, kind for warpgroup 1 << 8; m0; the workspace's row of the tile, 64 bits. */
FA_INLINE void produce(const fa_gradient_args *args, const fa_key_work *work, const fa_tma_map *q_map, const fa_tma_map *k_map,
                       const fa_tma_map *v_map, const fa_tma_map *dout_map, uint32_t smem) {
  const fa_arg_problem *p = &args->problem;
  const fa_tile *tile = &work->tile;
  int b = p->packed ? 0 : tile->b;
  fa_query_tile at = fa_start_query_tiles(work);
#pragma unroll 1
  for (int ring = 0;; ring++) {
    fa_next_query_tile(&at, p, work);
    int over = at.h == work->heads_end;
    if (laneid() == 0) {
      uint32_t step[4] = {OVER * 0x101, (uint32_t)at.m0, 0, 0};
      mbarrier_wait_parity(empty(smem, ring), parity(ring, STAGES) ^ 1); /* every key warp has done with what lay there */
      if (over) {
        st_shared_v4(step_smem(smem, ring), step);
        mbarrier_arrive(q_full(smem, ring));
        return;
      }
      if (ring == 0) load_keys(work, k_map, v_map, b, smem);
      int row = (int)tile->q_start + at.m0;
      int64_t sums_row = fa_workspace_row(args, tile->b, at.h, tile->q_start) + at.m0;
      step[0] = 0;
#pragma unroll 1
      for (int w = KEY_WARPGROUPS - 1; w >= 0; w--) step[0] = step[0] << 8 | kind_of(p, tile, at.m0, tile->m0 + 64 * w);
      step[2] = (uint32_t)sums_row;
      step[3] = (uint32_t)(sums_row >> 32);
      st_shared_v4(step_smem(smem, ring), step);
      mbarrier_arrive_expect_tx(q_full(smem, ring), QK_CHUNKS * Q_CHUNK_BYTES + BLOCK_M * 4);
      load_rows(q_smem(smem, ring), q_map, q_full(smem, ring), QK_CHUNKS, BLOCK_M, row, at.h, b);
      cp_async_bulk_load(lse_smem(smem, ring), (const float *)args->lse_rows + sums_row, BLOCK_M * 4, q_full(smem, ring));
      mbarrier_arrive_expect_tx(dout_full(smem, ring), V_CHUNKS * Q_CHUNK_BYTES + BLOCK_M * 4);
      load_rows(dout_smem(smem, ring), dout_map, dout_full(smem, ring), V_CHUNKS, BLOCK_M, row, at.h, b);
      cp_async_bulk_load(lse_smem(smem, ring) + BLOCK_M * 4, (const float *)args->delta_rows + sums_row, BLOCK_M * 4,
                         dout_full(smem, ring));
    }
    if (over) return;
  }
}

/* ---- key warpgroups ---- */

/* Who this thread is. */
typedef struct {
  const fa_arg_problem *problem;
  const fa_key_work *work;
  uint32_t smem;
  int warp_key; /* first key of the warp within the tile */
  float scale_log2;
} place;

typedef struct {
  float dk[DK_FRAGS][4], dv[DV_FRAGS][4];
} warp_sums;

FA_INLINE int warpgroup(const place *me) { return me->warp_key / 64; }
FA_INLINE int is_leader() { return threadIdx.x % 128 == 0; }

/* Tells the compiler that a value is the same in all lanes, for descriptors in uniform registers. */
FA_INLINE uint32_t uniform(uint32_t x) { return __shfl_sync(0xFFFFFFFFu, x, 0); }

/* S or dP of 64 keys and BLOCK_M queries, in the background: rows of both matrices lie along their head dim. */
FA_INLINE void issue_scores(float s[S_FRAGS][4], uint32_t keys_smem, uint32_t rows_smem, int dims) {
  uint32_t keys = uniform(wgmma_start(keys_smem, 16)), rows = uniform(wgmma_start(rows_smem, 16));
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < dims / 16; k++)
    wgmma_scores(&s[0][0], wgmma_descriptor(keys, k / 4 * K_CHUNK_BYTES + k % 4 * 32),
                 wgmma_descriptor(rows, k / 4 * Q_CHUNK_BYTES + k % 4 * 32), k > 0);
  wgmma_commit_group();
}

/* dV += P dO, dK += dS Q, in the background. */
FA_INLINE void issue_dv(float dv[DV_FRAGS][4], const uint32_t p[2 * S_FRAGS], uint32_t rows_smem) {
  uint32_t rows = uniform(wgmma_start(rows_smem, Q_CHUNK_BYTES));
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < BLOCK_M / 16; k++) wgmma_dv(&dv[0][0], p + 4 * k, wgmma_descriptor(rows, k * 2048), 1);
  wgmma_commit_group();
}
FA_INLINE void issue_dk(float dk[DK_FRAGS][4], const uint32_t ds[2 * S_FRAGS], uint32_t rows_smem) {
  uint32_t rows = uniform(wgmma_start(rows_smem, Q_CHUNK_BYTES));
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < BLOCK_M / 16; k++) wgmma_dk(&dk[0][0], ds + 4 * k, wgmma_descriptor(rows, k * 2048), 1);
  wgmma_commit_group();
}

/* Where the lane's pair of queries of the first fragment has its lse; BLOCK_M floats on, its delta. Computed anew each time, for registers. */
FA_INLINE uint32_t own_statistics(uint32_t statistics_smem) { return statistics_smem + 8 * (laneid() & 3); }

FA_INLINE float low_of(uint32_t pair) { return DTYPE == FA_ARG_BF16 ? __uint_as_float(pair << 16) : cvt_f32_f16((uint16_t)pair); }
FA_INLINE float high_of(uint32_t pair) {
  return DTYPE == FA_ARG_BF16 ? __uint_as_float(pair & 0xFFFF0000u) : cvt_f32_f16((uint16_t)(pair >> 16));
}

/* P in 16 bits, from S. A lane has two queries of each fragment of 8. With `rest_smem` what the weights lose is kept there: where a query has few keys
 * there is nothing for their errors to cancel with in dS. */
FA_INLINE void weigh(uint32_t p[2 * S_FRAGS], const float s[S_FRAGS][4], float scale_log2, uint32_t statistics_smem, uint32_t rest_smem) {
  uint32_t own_smem = own_statistics(statistics_smem), rest[4];
#pragma unroll
  for (int n = 0; n < S_FRAGS; n++) {
    float lse[2], x[4];
    ld_shared_v2_f32(lse, own_smem + 32 * n);
#pragma unroll
    for (int e = 0; e < 4; e++) x[e] = ex2_approx(__fmaf_rn(s[n][e], scale_log2, -lse[e & 1]));
#pragma unroll
    for (int r = 0; r < 2; r++) {
      uint32_t pair = fa_pack(x[2 * r], x[2 * r + 1]);
      p[2 * n + r] = pair;
      if (rest_smem) rest[2 * (n % 2) + r] = fa_pack(x[2 * r] - low_of(pair), x[2 * r + 1] - high_of(pair));
    }
    if (rest_smem && n % 2) st_shared_v4(rest_smem + n / 2 * (128 * 16), rest);
  }
}

/* dS in 16 bits, from P and dP. */
FA_INLINE void differentiate(uint32_t ds[2 * S_FRAGS], const uint32_t p[2 * S_FRAGS], const float dp[S_FRAGS][4], uint32_t statistics_smem,
                             uint32_t rest_smem) {
  uint32_t own_smem = own_statistics(statistics_smem) + BLOCK_M * 4, rest[4] = {0};
#pragma unroll
  for (int n = 0; n < S_FRAGS; n++) {
    float delta[2];
    ld_shared_v2_f32(delta, own_smem + 32 * n);
    if (rest_smem && n % 2 == 0) ld_shared_v4(rest, rest_smem + n / 2 * (128 * 16));
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float low = low_of(p[2 * n + r]), high = high_of(p[2 * n + r]);
      if (rest_smem) low += low_of(rest[2 * (n % 2) + r]), high += high_of(rest[2 * (n % 2) + r]);
      ds[2 * n + r] = fa_pack(low * (dp[n][2 * r] - delta[0]), high * (dp[n][2 * r + 1] - delta[1]));
    }
  }
}

/* Waits until dQ of two tiles ago is made; tells that the warp's dS is there. */
FA_INLINE void await_ds(const place *me, int ring) { mbarrier_wait_parity(ds_empty(me->smem, ring), parity(ring, 2) ^ 1); }
FA_INLINE void pass_ds(const place *me, int ring) {
  __syncwarp();
  if (laneid() == 0) mbarrier_arrive(ds_full(me->smem, ring));
}

/* The warp's 16 keys of dS, for the warpgroup that makes dQ of them. */
FA_INLINE void send_ds(const place *me, const uint32_t ds[2 * S_FRAGS], int ring) {
  if (!ADD_DQ) return;
  int lane = laneid(), row = me->warp_key + lane % 16;
  uint32_t row_smem = ds_smem(me->smem, ring) + row * 128;
  await_ds(me, ring);
#pragma unroll
  for (int n = 0; n < S_FRAGS; n += 2)
    stmatrix_x4(row_smem + n / 8 * K_CHUNK_BYTES + (((n + lane / 16) ^ row) & 7) * 16, ds[2 * n], ds[2 * n + 1], ds[2 * n + 2],
                ds[2 * n + 3]);
  fence_proxy_async(); /* what this lane wrote, for the products that read it */
  pass_ds(me, ring);
}

/* This warp has done with Q, dO, lse and delta: its products have retired. */
FA_INLINE void release(const place *me, int ring) {
  __syncwarp();
  if (laneid() == 0) mbarrier_arrive(empty(me->smem, ring));
}

/* dK += dS Q, and the end of what is in the background. */
FA_INLINE void end_step(const place *me, warp_sums *sums, const uint32_t ds[2 * S_FRAGS], int ring) {
  issue_dk(sums->dk, ds, q_smem(me->smem, ring));
  wgmma_wait_group(0);
  wgmma_hold(&sums->dv[0][0], 4 * DV_FRAGS);
  wgmma_hold(&sums->dk[0][0], 4 * DK_FRAGS);
  release(me, ring);
}

/* A tile of which every query sees every key of the warpgroup. */
FA_INLINE void full_step(const place *me, warp_sums *sums, int ring) {
  float s[S_FRAGS][4], dp[S_FRAGS][4];
  uint32_t p[2 * S_FRAGS], ds[2 * S_FRAGS];
  uint32_t own = 64 * 128 * warpgroup(me), dout = dout_smem(me->smem, ring), statistics = lse_smem(me->smem, ring);
  issue_scores(s, me->smem + own, q_smem(me->smem, ring), HEAD_DIM);
  wgmma_wait_group(0);
  wgmma_hold(&s[0][0], 4 * S_FRAGS);
  weigh(p, s, me->scale_log2, statistics, 0);
  mbarrier_wait_parity(dout_full(me->smem, ring), parity(ring, STAGES));
  issue_scores(dp, me->smem + V_OFFSET + own, dout, DIM_V);
  issue_dv(sums->dv, p, dout);
  wgmma_wait_group(1);
  wgmma_hold(&dp[0][0], 4 * S_FRAGS);
  differentiate(ds, p, dp, statistics, 0);
  send_ds(me, ds, ring);
  end_step(me, sums, ds, ring);
}

/* P or dS of pairs that are not visible become 0, whatever was computed. The queries that see a key are an interval. */
FA_INLINE void hide_invisible(const place *me, uint32_t words[2 * S_FRAGS], int m0) {
  const fa_tile *tile = &me->work->tile;
  int lane = laneid(), query = m0 + 2 * (lane & 3);
#pragma unroll
  for (int r = 0; r < 2; r++) {
    int j = tile->m0 + me->warp_key + (lane >> 2) + 8 * r;
    fa_range rows = fa_visiting_rows(me->problem->rule, tile->len_q, tile->len_k, j, j + 1);
    int lo = rows.lo - query, hi = j < tile->len_k ? rows.hi - query : 0;
#pragma unroll
    for (int n = 0; n < S_FRAGS; n++) {
      uint32_t low = 8 * n >= lo && 8 * n < hi ? 0x0000FFFFu : 0, high = 8 * n + 1 >= lo && 8 * n + 1 < hi ? 0xFFFF0000u : 0;
      words[2 * n + r] &= low | high;
    }
  }
}

/* acc += A B by mma.sync, where an element of A that is 0 takes nothing from B. A = P or dS, B = rows of dO or Q, chunks of 64 columns. */
FA_INLINE void exact_product(float acc[][4], int columns, const uint32_t a_words[2 * S_FRAGS], uint32_t rows_smem, int flags) {
  const float back[2] = {1.0f, 1.0f}; /* 16-bit elements are not scaled */
  int lane = (int)fa_opaque(threadIdx.x % 32);
#pragma unroll
  for (int step = 0; step < BLOCK_M / 16; step++) {
    fa_operand_a a;
    uint32_t a_flags[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      a.r[i] = a_words[4 * step + i];
      a_flags[i] = fa_flag_nonzero(a.r[i]);
    }
#pragma unroll
    for (int n = 0; n < columns / 8; n += 2) {
      __syncwarp(); /* one after the other, for registers */
      fa_tile_operand rows = {rows_smem + n / 8 * Q_CHUNK_BYTES, FA_BY_COLUMNS, 0, 128};
      fa_operand_b b[2];
      fa_load_operand_b(b, rows, lane, n % 8 * 8, step);
      fa_mma_finite(acc[n], &a, back, a_flags, b[0], flags);
      fa_mma_finite(acc[n + 1], &a, back, a_flags, b[1], flags);
    }
  }
}

/* NaN to the scores of keys that are not finite, whose finite part was multiplied. */
FA_INLINE void spoil_flagged(const place *me, float s[S_FRAGS][4]) {
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float flag = __uint_as_float(ld_shared_b32(me->smem + FLAGS_OFFSET + (me->warp_key + laneid() / 4 + 8 * r) * 4));
#pragma unroll
    for (int n = 0; n < S_FRAGS; n++) s[n][2 * r] += flag, s[n][2 * r + 1] += flag;
  }
}

/* A tile of which no query sees any key of the warpgroup. */
FA_INLINE void unseen_step(const place *me, int ring) {
  uint32_t ds[2 * S_FRAGS];
#pragma unroll
  for (int i = 0; i < 2 * S_FRAGS; i++) ds[i] = 0;
  send_ds(me, ds, ring);
  mbarrier_wait_parity(dout_full(me->smem, ring), parity(ring, STAGES));
  release(me, ring);
}

/* Any other tile, or any tile of keys that are not finite. */
FA_INLINE void masked_step(const place *me, warp_sums *sums, int m0, int ring) {
  float s[S_FRAGS][4], dp[S_FRAGS][4];
  uint32_t p[2 * S_FRAGS], ds[2 * S_FRAGS];
  uint32_t own = 64 * 128 * warpgroup(me), q = q_smem(me->smem, ring), dout = dout_smem(me->smem, ring),
           statistics = lse_smem(me->smem, ring),
           rest = me->smem + REST_OFFSET + warpgroup(me) * (REST_BYTES / KEY_WARPGROUPS) + threadIdx.x % 128 * 16;
  issue_scores(s, me->smem + own, q, HEAD_DIM);
  wgmma_wait_group(0);
  wgmma_hold(&s[0][0], 4 * S_FRAGS);
  int nonfinite = fa_has_nonfinite(s, S_FRAGS);
  spoil_flagged(me, s);
  weigh(p, s, me->scale_log2, statistics, rest);
  hide_invisible(me, p, m0);
  mbarrier_wait_parity(dout_full(me->smem, ring), parity(ring, STAGES));
  issue_scores(dp, me->smem + V_OFFSET + own, dout, DIM_V);
  wgmma_wait_group(0);
  wgmma_hold(&dp[0][0], 4 * S_FRAGS);
  nonfinite |= fa_has_nonfinite(dp, S_FRAGS);
  nonfinite = bar_red_or(WARPGROUP_BARRIER + warpgroup(me), 128, nonfinite);
  differentiate(ds, p, dp, statistics, rest);
  hide_invisible(me, ds, m0);
  send_ds(me, ds, ring);
  if (nonfinite) {
    exact_product(sums->dv, DIM_V, p, dout, 1);
    exact_product(sums->dk, HEAD_DIM, ds, q, 0);
    release(me, ring);
  } else {
    issue_dv(sums->dv, p, dout);
    end_step(me, sums, ds, ring);
  }
}

/* Where K is not finite its finite part stays, for dQ of rows that do not see the key, and the key is flagged. Returns 1, in every thread of the
 * warpgroup, when there is such a key. */
FA_INLINE int clean_keys(const place *me) {
  int thread = threadIdx.x % 128, first = 64 * warpgroup(me), found = 0;
  if (thread < 64) st_shared_b32(me->smem + FLAGS_OFFSET + (first + thread) * 4, 0);
  bar_sync(WARPGROUP_BARRIER + warpgroup(me), 128); /* the flags are clear */
#pragma unroll 1
  for (int i = thread; i < QK_CHUNKS * 64 * 8; i += 128) {
    int row = first + i / 8 % 64;
    uint32_t word[4], flags = 0, at_smem = me->smem + i / 512 * K_CHUNK_BYTES + row * 128 + i % 8 * 16;
    ld_shared_v4(word, at_smem);
#pragma unroll
    for (int e = 0; e < 4; e++) flags |= fa_flag_nonfinite(&word[e]);
    if (flags) {
      st_shared_v4(at_smem, word);
      st_shared_b32(me->smem + FLAGS_OFFSET + row * 4, 0x7fffffff);
      found = 1;
    }
  }
  fence_proxy_async(); /* what this lane wrote, for the products that read it */
  return bar_red_or(WARPGROUP_BARRIER + warpgroup(me), 128, found);
}

/* 1 when some row of the sequence does not see all of the tile's keys. */
FA_INLINE int has_invisible(const fa_arg_problem *p, const fa_tile *tile) {
  fa_range keys = fa_unmasked_keys(p->rule, tile->len_q, tile->len_k, 0, tile->len_q);
  return keys.lo > tile->m0 || tile->m0 + BLOCK_N > keys.hi || tile->len_q % BLOCK_M != 0;
}

FA_INLINE void walk_queries(const place *me, warp_sums *sums) {
  int poisoned = 0;
#pragma unroll 1
  for (int ring = 0;; ring++) {
    uint32_t step[4];
    mbarrier_wait_parity(q_full(me->smem, ring), parity(ring, STAGES));
    ld_shared_v4(step, step_smem(me->smem, ring));
    int kind = (int)uniform(step[0]) >> 8 * warpgroup(me) & 0xFF;
    if (kind == OVER) {
      if (ADD_DQ) await_ds(me, ring);
      if (ADD_DQ) pass_ds(me, ring);
      return;
    }
    if (ring == 0) {
      mbarrier_wait_parity(k_full(me->smem), 0);
      mbarrier_wait_parity(v_full(me->smem), 0);
      if (has_invisible(me->problem, &me->work->tile)) poisoned = clean_keys(me);
    }
    if (kind == UNSEEN)
      unseen_step(me, ring);
    else if (kind == WHOLE && !poisoned)
      full_step(me, sums, ring);
    else
      masked_step(me, sums, (int)step[1], ring);
  }
}

FA_INLINE void make_keys(const fa_gradient_args *args, const fa_key_work *work, uint32_t smem, float scale_log2) {
  place me = {&args->problem, work, smem, (int)uniform(threadIdx.x / 32 * 16 - 64), scale_log2};
  warp_sums sums;
#pragma unroll
  for (int n = 0; n < DK_FRAGS; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) sums.dk[n][e] = 0.0f;
#pragma unroll
  for (int n = 0; n < DV_FRAGS; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) sums.dv[n][e] = 0.0f;
  walk_queries(&me, &sums);
  int key0 = work->tile.m0 + me.warp_key;
  if (args->dk.data)
    fa_store_gradient_rows(&args->dk, &work->tile, sums.dk, DK_FRAGS, key0, 0, args->problem.dim_qk, (float)args->problem.scale);
  if (args->dv.data) fa_store_gradient_rows(&args->dv, &work->tile, sums.dv, DV_FRAGS, key0, 0, args->problem.dim_v, 1.0f);
}

/* ---- dQ warpgroup ---- */

/* Columns from 64 c on of dQ of 64 queries, from 64 m on. Past HEAD_DIM there are zeros. */
FA_INLINE void add_dq(uint32_t smem, int ring, int m, int c, float *sum_gmem) {
  uint32_t ds = uniform(wgmma_start(ds_smem(smem, ring) + m * K_CHUNK_BYTES, 16)),
           keys = uniform(wgmma_start(smem + c * K_CHUNK_BYTES, 16));
  float dq[8][4];
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < BLOCK_N / 16; k++) wgmma_dq(&dq[0][0], wgmma_descriptor(ds, k * 2048), wgmma_descriptor(keys, k * 2048), k > 0);
  wgmma_commit_group();
  wgmma_wait_group(0);
  wgmma_hold(&dq[0][0], 32);
#pragma unroll
  for (int n = 0; n < fa_min(8, HEAD_DIM / 8 - 8 * c); n++)
    fa_add_fragment(sum_gmem + m * 64 * HEAD_DIM + (8 * c + n) * FA_FRAGMENT, threadIdx.x % 32, dq[n]);
}

FA_INLINE void make_dq(const fa_gradient_args *args, uint32_t smem) {
#pragma unroll 1
  for (int ring = 0;; ring++) {
    uint32_t step[4];
    mbarrier_wait_parity(ds_full(smem, ring), parity(ring, 2)); /* every warp has written its keys; so K has landed as well */
    ld_shared_v4(step, step_smem(smem, ring));
    if (uniform(step[0]) == OVER * 0x101) return;
    int64_t row = ((int64_t)step[3] << 32 | step[2]) + threadIdx.x / 32 % 4 * 16;
    float *sum_gmem = (float *)args->dq_sum + row * HEAD_DIM;
#pragma unroll 1
    for (int m = 0; m < M_CHUNKS; m++)
#pragma unroll(HEAD_DIM == 128 ? 1 : 2)
      for (int c = 0; c < QK_CHUNKS; c++) add_dq(smem, ring, m, c, sum_gmem);
    if (is_leader()) mbarrier_arrive(ds_empty(smem, ring)); /* the products have retired for the whole warpgroup */
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    bwd_sm90(const __grid_constant__ fa_gradient_args args, const __grid_constant__ fa_schedule schedule,
             const __grid_constant__ fa_tma_map q_map, const __grid_constant__ fa_tma_map k_map, const __grid_constant__ fa_tma_map v_map,
             const __grid_constant__ fa_tma_map dout_map) {
  extern __shared__ __align__(1024) unsigned char shared[];
  uint32_t smem = smem_address(shared);
  fa_key_work *work = (fa_key_work *)(shared + WORK_OFFSET);
  if (threadIdx.x == 0) init_barriers(smem);
  if (!find_key_work(&args, &schedule, work)) return; /* its barrier also makes the others known to all */
  if (threadIdx.x < 128) {
    setmaxnreg_dec(PRODUCER_REGISTERS);
    if (threadIdx.x < 32) produce(&args, work, &q_map, &k_map, &v_map, &dout_map, smem);
  } else if (!ADD_DQ || threadIdx.x < 128 * (1 + KEY_WARPGROUPS)) {
    setmaxnreg_inc(KEY_REGISTERS);
    make_keys(&args, work, smem, schedule.scale_log2);
  } else {
    setmaxnreg_dec(DQ_REGISTERS);
    make_dq(&args, smem);
  }
}
