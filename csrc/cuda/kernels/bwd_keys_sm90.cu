/* bwd_keys_sm90.cu: dK and dV on Hopper's wgmma and TMA, for head dims above 128; fp16 and bf16. bwd_rows_sm90.cu computes dQ.
 *
 * One persistent CTA per SM owns 64 keys of a key head at a time; every query tile that sees them passes by, for each query head of the group.
 * Scores are computed transposed, keys down and queries across, so that P and dS are left operands as they stand.
 *
 *   warp 0 (producer)                 warpgroup 1: weights                     warpgroup 2: gradients
 *   takes a tile from the queue
 *   tile_full[2]  ------------------>  reads it                                 reads it
 *   K, V                               first step: S = K Q^T alone              dP = V dO^T alone
 *   Q + lse, dO + delta of each step
 *   q_full[s], dout_full[s] -------->  S = K Q(r)^T            issued           dK += dS(r-1) Q(r-1)    issued
 *                                      dV += P(r-1) dO(r-1)    issued           dP = V dO(r)^T          issued
 *                                      S done: P = exp2(S - lse)                dK done  -----> q_empty[s]
 *   q_empty[s] <---------------------  P(r) to shared memory ---- p_full[2] --> dP done: dS = P (dP - delta)
 *   dout_empty[s] <------------------  dV done                                  -----> p_empty[2], dout_empty[s]
 *   k_empty, v_empty <---------------  last S done                              last dP done
 *                                      last step: dV; to global memory          dK; to global memory
 *
 * So each product is computed once, the two warpgroups fill the tensor cores for each other, and the sums of 64 x 256 take 128 registers in each.
 *
 * Shared memory, bytes (matrices of 64 rows in chunks of 64 columns = rows of 128 bytes, 128-byte swizzle, aligned to 1024):
 *   K         QK_BYTES                V         V_BYTES
 *   Q         STAGES * QK_BYTES       dO        STAGES * V_BYTES
 *   P         P_STAGES * 8192         16-bit, thread after thread of the warpgroup
 *   steps     STAGES * 528            lse and delta of the queries, and which they are
 *   tiles     2 * 48                  what the producer tells of a tile
 *   barriers  (4 * STAGES + 2 * P_STAGES + 8) * 8
 *
 * What limits: shared memory, which the products with 64 columns read as fast as it can; the dims beyond make up for it (dV, dK).
 *
 * Inputs: rows contiguous, strides multiples of 16 bytes, dims multiples of 8 up to HEAD_DIM, DIM_V (the TMA fills the rest with zeros).
 *
 * What it takes, for bf16, equal dims, compiled by NVRTC 13.0 (registers before the warpgroups share them out):
 *   sm_90a  HEAD_DIM=192  168 registers  214864 bytes
 *   sm_90a  HEAD_DIM=256  168 registers  214304 bytes
 *
 * Constants: DTYPE, HEAD_DIM and DIM_V (multiples of 64), STAGES, MASKING (1: causal or window).
 */
#define REAL float
#define ALIGNED 1
#define BLOCK_M 64
#define BLOCK_N 64

#include "gradient_sm90.h"
#include "schedule_sm90.h"

#define THREADS 384
#define PRODUCER_REGISTERS 56
#define CONSUMER_REGISTERS 224

#define DK_FRAGS (HEAD_DIM / 8)
#define DV_FRAGS (DIM_V / 8)

#define P_STAGES 2
#define P_BYTES (BLOCK_M * BLOCK_N * 2)
#define STEP_BYTES 528 /* lse, delta, 16 for the number of the step's queries */
#define TILE_SLOTS 2
#define TILE_BYTES 48

#define V_OFFSET QK_BYTES
#define Q_OFFSET (V_OFFSET + V_BYTES)
#define DOUT_OFFSET (Q_OFFSET + STAGES * QK_BYTES)
#define P_OFFSET (DOUT_OFFSET + STAGES * V_BYTES)
#define STEPS_OFFSET (P_OFFSET + P_STAGES * P_BYTES)
#define TILES_OFFSET (STEPS_OFFSET + STAGES * STEP_BYTES)
#define BARRIERS_OFFSET (TILES_OFFSET + TILE_SLOTS * TILE_BYTES)

DEFINE_WGMMA_RS(wgmma_p_dout, DIM_V, 1)
DEFINE_WGMMA_RS(wgmma_ds_q, HEAD_DIM, 1)

/* ---- shared memory ---- */

FA_INLINE uint32_t bar_smem(uint32_t smem, int i) { return smem + BARRIERS_OFFSET + 8 * i; }
FA_INLINE uint32_t q_full(uint32_t smem, int i) { return bar_smem(smem, (unsigned)i % STAGES); }
FA_INLINE uint32_t q_empty(uint32_t smem, int i) { return bar_smem(smem, STAGES + (unsigned)i % STAGES); }
FA_INLINE uint32_t dout_full(uint32_t smem, int i) { return bar_smem(smem, 2 * STAGES + (unsigned)i % STAGES); }
FA_INLINE uint32_t dout_empty(uint32_t smem, int i) { return bar_smem(smem, 3 * STAGES + (unsigned)i % STAGES); }
FA_INLINE uint32_t p_full(uint32_t smem, int i) { return bar_smem(smem, 4 * STAGES + (unsigned)i % P_STAGES); }
FA_INLINE uint32_t p_empty(uint32_t smem, int i) { return bar_smem(smem, 4 * STAGES + P_STAGES + (unsigned)i % P_STAGES); }
FA_INLINE uint32_t tile_full(uint32_t smem, int i) { return bar_smem(smem, 4 * STAGES + 2 * P_STAGES + (unsigned)i % TILE_SLOTS); }
FA_INLINE uint32_t tile_empty(uint32_t smem, int i) {
  return bar_smem(smem, 4 * STAGES + 2 * P_STAGES + TILE_SLOTS + (unsigned)i % TILE_SLOTS);
}
FA_INLINE uint32_t key_bar(uint32_t smem, int i) { return bar_smem(smem, 4 * STAGES + 2 * P_STAGES + 2 * TILE_SLOTS + i); }
FA_INLINE uint32_t k_full(uint32_t smem) { return key_bar(smem, 0); }
FA_INLINE uint32_t v_full(uint32_t smem) { return key_bar(smem, 1); }
FA_INLINE uint32_t k_empty(uint32_t smem) { return key_bar(smem, 2); }
FA_INLINE uint32_t v_empty(uint32_t smem) { return key_bar(smem, 3); }

FA_INLINE uint32_t q_smem(uint32_t smem, int i) { return smem + Q_OFFSET + (unsigned)i % STAGES * QK_BYTES; }
FA_INLINE uint32_t dout_smem(uint32_t smem, int i) { return smem + DOUT_OFFSET + (unsigned)i % STAGES * V_BYTES; }
FA_INLINE uint32_t p_smem(uint32_t smem, int i) { return smem + P_OFFSET + (unsigned)i % P_STAGES * P_BYTES; }
FA_INLINE uint32_t lse_smem(uint32_t smem, int i) { return smem + STEPS_OFFSET + (unsigned)i % STAGES * STEP_BYTES; }
FA_INLINE uint32_t delta_smem(uint32_t smem, int i) { return lse_smem(smem, i) + 4 * BLOCK_M; }
FA_INLINE uint32_t queries_smem(uint32_t smem, int i) { return lse_smem(smem, i) + 8 * BLOCK_M; }
FA_INLINE uint32_t slot_smem(uint32_t smem, int i) { return smem + TILES_OFFSET + (unsigned)i % TILE_SLOTS * TILE_BYTES; }

/* Each consumer warp speaks for itself. */
FA_INLINE void init_barriers(uint32_t smem) {
  for (int s = 0; s < STAGES; s++) {
    mbarrier_init(q_full(smem, s), 1);
    mbarrier_init(dout_full(smem, s), 1);
    mbarrier_init(q_empty(smem, s), 8);
    mbarrier_init(dout_empty(smem, s), 8);
  }
  for (int s = 0; s < P_STAGES; s++) {
    mbarrier_init(p_full(smem, s), 4);
    mbarrier_init(p_empty(smem, s), 4);
  }
  for (int i = 0; i < TILE_SLOTS; i++) {
    mbarrier_init(tile_full(smem, i), 1);
    mbarrier_init(tile_empty(smem, i), 8);
  }
  mbarrier_init(k_full(smem), 1);
  mbarrier_init(v_full(smem), 1);
  mbarrier_init(k_empty(smem), 4);
  mbarrier_init(v_empty(smem), 4);
  fence_mbarrier_init();
}

/* ---- a tile of keys, from the producer, who finds it, to the consumers ---- */

#define NO_MORE_TILES -1

typedef struct {
  fa_tile of;     /* b, or NO_MORE_TILES; h and m0: the key head, the first key */
  int steps;      /* query tiles, of all heads of the group */
  int first, end; /* rows of a head in steps of BLOCK_M: producer only */
} key_tile;

FA_INLINE void send_tile(uint32_t at_smem, const key_tile *t) {
  const uint32_t place[4] = {(uint32_t)t->of.b, (uint32_t)t->of.h, (uint32_t)t->of.m0, (uint32_t)t->steps};
  const uint32_t lengths[4] = {(uint32_t)t->of.len_q, (uint32_t)t->of.len_k, (uint32_t)t->of.slot_k, 0};
  const uint32_t starts[4] = {(uint32_t)t->of.q_start, (uint32_t)t->of.k_start, 0, 0};
  st_shared_v4(at_smem, place);
  st_shared_v4(at_smem + 16, lengths);
  st_shared_v4(at_smem + 32, starts);
}

FA_INLINE key_tile receive_tile(uint32_t at_smem) {
  uint32_t place[4], lengths[4], starts[4];
  ld_shared_v4(place, at_smem);
  ld_shared_v4(lengths, at_smem + 16);
  ld_shared_v4(starts, at_smem + 32);
  key_tile t = {{same_in_warp(place[0]), same_in_warp(place[1]), same_in_warp(place[2]), 0, 0, same_in_warp(lengths[2]),
                 same_in_warp(lengths[0]), same_in_warp(lengths[1]), same_in_warp(starts[0]), same_in_warp(starts[1])},
                same_in_warp(place[3]),
                0,
                0};
  return t;
}

/* ---- producer ---- */

/* The next query tile from row m0 of head h on that sees the keys, or h == the end of the group. All lanes take part. */
FA_INLINE void next_queries(const fa_arg_problem *p, const key_tile *t, int *h, int *m0) {
  int end = (t->of.h + 1) * p->group;
  for (; *h < end; ++*h, *m0 = t->first)
    for (; *m0 < t->end; *m0 += 32 * BLOCK_M) {
      if (!p->block_size) return;
      int mine = *m0 + laneid() * BLOCK_M;
      unsigned seen = __ballot_sync(0xFFFFFFFFu, mine < t->end && fa_in_block_mask(p, t->of.b, *h, mine, t->of.m0));
      if (seen) {
        *m0 += (__ffs((int)seen) - 1) * BLOCK_M;
        return;
      }
    }
}

FA_INLINE int count_steps(const fa_arg_problem *p, const key_tile *t) {
  int steps = 0, h = t->of.h * p->group, m0 = t->first;
  if (!p->block_size) return p->group * fa_ceil_div(fa_max(0, t->end - t->first), BLOCK_M);
  for (next_queries(p, t, &h, &m0); h < (t->of.h + 1) * p->group; next_queries(p, t, &h, &m0), steps++) m0 += BLOCK_M;
  return steps;
}

/* Tile `number` of the schedule; b < 0 when there is none. All lanes of the warp take part. */
FA_INLINE key_tile find_tile(const fa_arg_problem *p, const fa_schedule *schedule, int number) {
  int head, index, of_sequence;
  key_tile t = {{NO_MORE_TILES, 0, 0, 0, 0, 0, 0, 0, 0, 0}, 0, 0, 0};
  if (number >= schedule->total) return t;
  fa_scheduled_tile(schedule, number, &head, &index);
  index = schedule->tiles - 1 - index; /* under a causal mask the first keys are seen by the most queries */
  fa_tile found = {head / p->heads_k, head % p->heads_k, index * BLOCK_N, 0, 0, 0, 0, 0, 0, 0};
  if (p->packed && !fa_find_sequence(p->cu_k, p->batch, BLOCK_N, index, &found.b, &index, &of_sequence)) {
    if (!fa_slack_keys(p, index * BLOCK_N, &found)) return t;
  } else {
    found.m0 = index * BLOCK_N;
    fa_read_lengths(p, &found);
    if (found.m0 >= found.slot_k) return t;
    fa_range rows = fa_visiting_rows(p->rule, found.len_q, found.len_k, found.m0, fa_min(found.m0 + BLOCK_N, found.len_k));
    t.first = rows.lo / BLOCK_M * BLOCK_M;
    t.end = found.m0 < found.len_k ? rows.hi : 0;
  }
  t.of = found;
  t.steps = count_steps(p, &t);
  return t;
}

/* One lane issues all loads of a tile, all lanes look for its queries. `ring` counts the steps of this CTA, `use` its tiles that have any. */
FA_INLINE int load_tile(const fa_gradient_args *args, const fa_tma_map *q_map, const fa_tma_map *k_map, const fa_tma_map *v_map,
                        const fa_tma_map *dout_map, uint32_t smem, const key_tile *t, int ring, int use) {
  const fa_arg_problem *p = &args->problem;
  int b = p->packed ? 0 : t->of.b, key_row = (int)t->of.k_start + t->of.m0, h = t->of.h * p->group, m0 = t->first;
  if (t->steps > 0 && laneid() == 0) {
    mbarrier_wait_parity(k_empty(smem), parity(use, 1) ^ 1); /* the weights of the tile before have been multiplied with its K */
    load_box(smem, k_map, k_full(smem), QK_CHUNKS, key_row, t->of.h, b, 0);
  }
#pragma unroll 1
  for (int left = t->steps; left > 0; left--, ring++, m0 += BLOCK_M) {
    if (p->block_size) __syncwarp();
    next_queries(p, t, &h, &m0);
    if (laneid() == 0) {
      int64_t row = fa_workspace_row(args, t->of.b, h, t->of.q_start) + m0;
      fa_range plain = fa_unmasked_keys(p->rule, t->of.len_q, t->of.len_k, m0, fa_min(m0 + BLOCK_M, t->of.len_q));
      int is_plain = plain.lo <= t->of.m0 && fa_min(t->of.m0 + BLOCK_N, t->of.len_k) <= plain.hi;
      mbarrier_wait_parity(q_empty(smem, ring), parity(ring, STAGES) ^ 1); /* both warpgroups have multiplied with the Q that lay there */
      if (MASKING) st_shared_b32(queries_smem(smem, ring), (uint32_t)(is_plain ? -1 : m0));
      load_box(q_smem(smem, ring), q_map, q_full(smem, ring), QK_CHUNKS, (int)t->of.q_start + m0, h, b, 4 * BLOCK_M);
      cp_async_bulk_load(lse_smem(smem, ring), (const float *)args->lse_rows + row, 4 * BLOCK_M, q_full(smem, ring));
      if (m0 + STEPS_AHEAD * BLOCK_M < t->end && asks_ahead(m0 / BLOCK_M, t->of.m0 / BLOCK_N)) {
        prefetch_chunks(q_map, QK_CHUNKS, (int)t->of.q_start + m0 + STEPS_AHEAD * BLOCK_M, h, b);
        prefetch_chunks(dout_map, V_CHUNKS, (int)t->of.q_start + m0 + STEPS_AHEAD * BLOCK_M, h, b);
      }
      if (left == t->steps) {
        mbarrier_wait_parity(v_empty(smem), parity(use, 1) ^ 1); /* the products with the V of the tile before are done */
        load_box(smem + V_OFFSET, v_map, v_full(smem), V_CHUNKS, key_row, t->of.h, b, 0);
      }
      mbarrier_wait_parity(dout_empty(smem, ring), parity(ring, STAGES) ^ 1); /* both have multiplied with the dO that lay there */
      load_box(dout_smem(smem, ring), dout_map, dout_full(smem, ring), V_CHUNKS, (int)t->of.q_start + m0, h, b, 4 * BLOCK_M);
      cp_async_bulk_load(delta_smem(smem, ring), (const float *)args->delta_rows + row, 4 * BLOCK_M, dout_full(smem, ring));
    }
  }
  return ring;
}

FA_INLINE void produce(const fa_gradient_args *args, const fa_schedule *schedule, const fa_tma_map *q_map, const fa_tma_map *k_map,
                       const fa_tma_map *v_map, const fa_tma_map *dout_map, uint32_t smem) {
  int number = (int)blockIdx.x, ring = 0, use = 0;
#pragma unroll 1
  for (int turn = 0;;) {
    key_tile t = find_tile(&args->problem, schedule, number);
    int over = number >= schedule->total;
    if (t.of.b >= 0 || over) {
      if (laneid() == 0) {
        mbarrier_wait_parity(tile_empty(smem, turn), parity(turn, TILE_SLOTS) ^ 1); /* every consumer warp has written that tile's sums */
        send_tile(slot_smem(smem, turn), &t);
        mbarrier_arrive(tile_full(smem, turn));
      }
      if (over) return;
      ring = load_tile(args, q_map, k_map, v_map, dout_map, smem, &t, ring, use);
      use += t.steps > 0;
      turn++;
      __syncwarp();
    }
    /* Taken late: a tile that waits behind a long one waits for this CTA though others may be free. */
    if (schedule->next && laneid() == 0) number = atomicAdd(schedule->next, 1);
    number = __shfl_sync(0xFFFFFFFFu, number, 0) + (int)gridDim.x;
  }
}

/* ---- products ---- */

/* dV += P dO, or dV = P dO when there is none yet. */
FA_INLINE void issue_dv(float dv[DV_FRAGS][4], const uint32_t p[2 * S_FRAGS], uint32_t rows_smem, int add) {
  uint32_t b = same_in_warp(wgmma_start(rows_smem, BOX_ROWS * 128));
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < BLOCK_M / 16; k++) wgmma_p_dout(&dv[0][0], p + 4 * k, wgmma_descriptor(b, k * 2048), k > 0 || add);
  wgmma_commit_group();
}

FA_INLINE void issue_dk(float dk[DK_FRAGS][4], const uint32_t ds[2 * S_FRAGS], uint32_t rows_smem, int add) {
  uint32_t b = same_in_warp(wgmma_start(rows_smem, BOX_ROWS * 128));
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < BLOCK_M / 16; k++) wgmma_ds_q(&dk[0][0], ds + 4 * k, wgmma_descriptor(b, k * 2048), k > 0 || add);
  wgmma_commit_group();
}

/* ---- warpgroup 1: S, P, dV ---- */

/* S becomes P. */
FA_INLINE void weigh(float s[S_FRAGS][4], uint32_t lse_at_smem, float scale_log2) {
#pragma unroll
  for (int n = 0; n < S_FRAGS; n++) {
    float lse[2];
    ld_shared_v2_f32(lse, lse_at_smem + 8 * (laneid() & 3) + 32 * n);
#pragma unroll
    for (int e = 0; e < 4; e++) s[n][e] = ex2_approx(__fmaf_rn(s[n][e], scale_log2, -lse[e & 1]));
  }
}

/* Pairs outside the rules get the weight 0. */
FA_INLINE void hide_invisible(float s[S_FRAGS][4], const fa_arg_problem *p, uint32_t tile_smem, int m0) {
  key_tile t = receive_tile(tile_smem);
  int lane = laneid(), column0 = m0 + 2 * (lane & 3);
#pragma unroll
  for (int r = 0; r < 2; r++) {
    int j = t.of.m0 + threadIdx.x % 128 / 32 * 16 + (lane >> 2) + 8 * r;
    fa_range rows = fa_visiting_rows(p->rule, t.of.len_q, t.of.len_k, j, j + 1);
#pragma unroll
    for (int n = 0; n < S_FRAGS; n++)
#pragma unroll
      for (int e = 0; e < 2; e++)
        if (8 * n + e < rows.lo - column0 || 8 * n + e >= rows.hi - column0) s[n][2 * r + e] = 0.0f;
  }
}

/* S of step `ring` becomes P, which goes to the other warpgroup. */
FA_INLINE void make_weights(const fa_gradient_args *args, uint32_t smem, float s[S_FRAGS][4], float scale_log2, int turn, int ring) {
  uint32_t sent[2 * S_FRAGS];
  weigh(s, lse_smem(smem, ring), scale_log2);
  if (MASKING) {
    int m0 = same_in_warp(ld_shared_b32(queries_smem(smem, ring)));
    if (m0 >= 0) hide_invisible(s, &args->problem, slot_smem(smem, turn), m0);
  }
  arrive_as_warp(q_empty(smem, ring));
  pack_all(sent, s);
  uint32_t mine_smem = p_smem(smem, ring) + threadIdx.x % 128 * 16;
  mbarrier_wait_parity(p_empty(smem, ring), parity(ring, P_STAGES) ^ 1); /* the other warpgroup has read the weights that lay there */
#pragma unroll
  for (int i = 0; i < 2 * S_FRAGS; i += 4) st_shared_v4(mine_smem + 512 * i, sent + i);
  arrive_as_warp(p_full(smem, ring));
}

FA_INLINE int make_dv(const fa_gradient_args *args, uint32_t smem, float dv[DV_FRAGS][4], float scale_log2, int steps, int turn, int ring,
                      int use) {
  float s[S_FRAGS][4];
  uint32_t p[2 * S_FRAGS];
  mbarrier_wait_parity(k_full(smem), parity(use, 1));
  mbarrier_wait_parity(q_full(smem, ring), parity(ring, STAGES));
  issue_scores(s, smem, q_smem(smem, ring), HEAD_DIM);
  wgmma_wait_group(0);
  wgmma_hold(&s[0][0], 4 * S_FRAGS);
  make_weights(args, smem, s, scale_log2, turn, ring++);
  pack_all(p, s);
#pragma unroll 1
  for (int step = 1; step < steps; step++, ring++) {
    mbarrier_wait_parity(q_full(smem, ring), parity(ring, STAGES));
    issue_scores(s, smem, q_smem(smem, ring), HEAD_DIM);
    mbarrier_wait_parity(dout_full(smem, ring - 1), parity(ring - 1, STAGES));
    issue_dv(dv, p, dout_smem(smem, ring - 1), step > 1);
    wgmma_wait_group(1);
    wgmma_hold(&s[0][0], 4 * S_FRAGS);
    make_weights(args, smem, s, scale_log2, turn, ring);
    wgmma_wait_group(0);
    wgmma_hold(&dv[0][0], 4 * DV_FRAGS);
    arrive_as_warp(dout_empty(smem, ring - 1));
    wgmma_hold(&s[0][0], 4 * S_FRAGS); /* packed anew: what was sent lies in other registers, or the product above would be waited for */
    pack_all(p, s);
  }
  arrive_as_warp(k_empty(smem));
  mbarrier_wait_parity(dout_full(smem, ring - 1), parity(ring - 1, STAGES));
  issue_dv(dv, p, dout_smem(smem, ring - 1), steps > 1);
  wgmma_wait_group(0);
  wgmma_hold(&dv[0][0], 4 * DV_FRAGS);
  arrive_as_warp(dout_empty(smem, ring - 1));
  return ring;
}

/* ---- warpgroup 2: dP, dS, dK ---- */

/* dS of step `ring`, once dP is there. */
FA_INLINE void make_gradients(uint32_t smem, float dp[S_FRAGS][4], int ring) {
  uint32_t mine_smem = p_smem(smem, ring) + threadIdx.x % 128 * 16, p[2 * S_FRAGS];
  mbarrier_wait_parity(p_full(smem, ring), parity(ring, P_STAGES));
#pragma unroll
  for (int i = 0; i < 2 * S_FRAGS; i += 4) ld_shared_v4(p + i, mine_smem + 512 * i);
#pragma unroll
  for (int n = 0; n < S_FRAGS; n++) {
    float delta[2], weight[4];
    ld_shared_v2_f32(delta, delta_smem(smem, ring) + 8 * (laneid() & 3) + 32 * n);
    unpack_pair(weight, p[2 * n]);
    unpack_pair(weight + 2, p[2 * n + 1]);
#pragma unroll
    for (int e = 0; e < 4; e++) dp[n][e] = weight[e] * (dp[n][e] - delta[e & 1]);
  }
  arrive_as_warp(p_empty(smem, ring));
  if (laneid() == 0) mbarrier_arrive(dout_empty(smem, ring));
}

FA_INLINE int make_dk(uint32_t smem, float dk[DK_FRAGS][4], int steps, int ring, int use) {
  float dp[S_FRAGS][4];
  uint32_t ds[2 * S_FRAGS];
  mbarrier_wait_parity(v_full(smem), parity(use, 1));
  mbarrier_wait_parity(dout_full(smem, ring), parity(ring, STAGES));
  issue_scores(dp, smem + V_OFFSET, dout_smem(smem, ring), DIM_V);
  wgmma_wait_group(0);
  wgmma_hold(&dp[0][0], 4 * S_FRAGS);
  make_gradients(smem, dp, ring++);
  pack_all(ds, dp);
#pragma unroll 1
  for (int step = 1; step < steps; step++, ring++) {
    mbarrier_wait_parity(q_full(smem, ring - 1), parity(ring - 1, STAGES));
    issue_dk(dk, ds, q_smem(smem, ring - 1), step > 1);
    mbarrier_wait_parity(dout_full(smem, ring), parity(ring, STAGES));
    issue_scores(dp, smem + V_OFFSET, dout_smem(smem, ring), DIM_V);
    wgmma_wait_group(1);
    wgmma_hold(&dk[0][0], 4 * DK_FRAGS);
    arrive_as_warp(q_empty(smem, ring - 1));
    wgmma_wait_group(0);
    wgmma_hold(&dp[0][0], 4 * S_FRAGS);
    make_gradients(smem, dp, ring);
    pack_all(ds, dp);
  }
  arrive_as_warp(v_empty(smem));
  mbarrier_wait_parity(q_full(smem, ring - 1), parity(ring - 1, STAGES));
  issue_dk(dk, ds, q_smem(smem, ring - 1), steps > 1);
  wgmma_wait_group(0);
  wgmma_hold(&dk[0][0], 4 * DK_FRAGS);
  arrive_as_warp(q_empty(smem, ring - 1));
  return ring;
}

/* ---- from tile to tile ---- */

/* Writes a warp's 16 keys of dV or, with of_k, of dK, and repairs them. */
FA_INLINE void leave(const fa_gradient_args *args, const key_tile *t, float (*sum)[4], int count, int of_k) {
  const fa_arg_view *view = of_k ? &args->dk : &args->dv;
  int j0 = t->of.m0 + threadIdx.x % 128 / 32 * 16, used = t->steps > 0 ? t->of.len_k - j0 : 0;
  if (!view->data) return;
  char *row0_gmem = fa_head_base(view, 2, t->of.b, t->of.h, t->of.k_start + j0);
  store_rows(row0_gmem, view->s * 2, sum, count, used, t->of.slot_k - j0, of_k ? args->problem.dim_qk : args->problem.dim_v,
             of_k ? (float)args->problem.scale : 1.0f);
  unsigned rows = rows_not_finite(sum, count) & (used > 0 ? (used >= 16 ? 0xFFFFu : (1u << used) - 1) : 0u);
  if (rows) forget_origin(args); /* or what can be computed ahead of the main loop is, and takes registers there */
  __syncwarp();                  /* the rows below were written by other lanes */
#pragma unroll 1
  for (; rows; rows &= rows - 1) repair_key(args, &t->of, t->of.h, j0 + __ffs((int)rows) - 1, of_k);
}

FA_INLINE void consume_weights(const fa_gradient_args *args, const fa_schedule *schedule, uint32_t smem) {
  float dv[DV_FRAGS][4], scale_log2 = schedule->scale_log2;
  int ring = 0, use = 0;
#pragma unroll 1
  for (int turn = 0;; turn++) {
    mbarrier_wait_parity(tile_full(smem, turn), parity(turn, TILE_SLOTS));
    int steps = same_in_warp(ld_shared_b32(slot_smem(smem, turn) + 12));
    if (ld_shared_b32(slot_smem(smem, turn)) == (uint32_t)NO_MORE_TILES) break;
    if (steps > 0) ring = make_dv(args, smem, dv, scale_log2, steps, turn, ring, use++);
    key_tile t = receive_tile(slot_smem(smem, turn));
    leave(args, &t, dv, DV_FRAGS, 0);
    arrive_as_warp(tile_empty(smem, turn));
  }
}

FA_INLINE void consume_gradients(const fa_gradient_args *args, uint32_t smem) {
  float dk[DK_FRAGS][4];
  int ring = 0, use = 0;
#pragma unroll 1
  for (int turn = 0;; turn++) {
    mbarrier_wait_parity(tile_full(smem, turn), parity(turn, TILE_SLOTS));
    int steps = same_in_warp(ld_shared_b32(slot_smem(smem, turn) + 12));
    if (ld_shared_b32(slot_smem(smem, turn)) == (uint32_t)NO_MORE_TILES) break;
    if (steps > 0) ring = make_dk(smem, dk, steps, ring, use++);
    key_tile t = receive_tile(slot_smem(smem, turn));
    leave(args, &t, dk, DK_FRAGS, 1);
    arrive_as_warp(tile_empty(smem, turn));
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    bwd_keys_sm90(const __grid_constant__ fa_gradient_args args, const __grid_constant__ fa_schedule schedule,
                  const __grid_constant__ fa_tma_map q_map, const __grid_constant__ fa_tma_map k_map,
                  const __grid_constant__ fa_tma_map v_map, const __grid_constant__ fa_tma_map dout_map) {
  extern __shared__ __align__(1024) unsigned char shared[];
  uint32_t smem = smem_address(shared);
  if (threadIdx.x == 0) init_barriers(smem);
  __syncthreads();                    /* the barriers exist */
  griddepcontrol_wait();              /* bwd_prep has ended */
  griddepcontrol_launch_dependents(); /* bwd_rows_sm90 needs nothing of this kernel but its SMs */
  if (threadIdx.x < 128) {
    setmaxnreg_dec(PRODUCER_REGISTERS);
    if (threadIdx.x < 32) produce(&args, &schedule, &q_map, &k_map, &v_map, &dout_map, smem);
  } else if (threadIdx.x < 256) {
    setmaxnreg_inc(CONSUMER_REGISTERS);
    consume_weights(&args, &schedule, smem);
  } else {
    setmaxnreg_inc(CONSUMER_REGISTERS);
    consume_gradients(&args, smem);
  }
}
