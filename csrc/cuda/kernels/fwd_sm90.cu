/* fwd_sm90.cu: forward attention on Hopper's wgmma and TMA; fp16 and bf16.
 *
 * One persistent CTA per SM. A producer warp fetches, WARPGROUPS consumer warpgroups compute 64 query rows each, BLOCK_M = 64 * WARPGROUPS in all.
 *
 *   warp 0                               warpgroup w = 0, 1 (, 2, 3)
 *   takes a tile from the queue
 *   tile_full[4]  ---------------------->  reads it                                        tile_empty[4] back, once O is written
 *   K(last), Q of every warpgroup,         S = Q K(last)^T; softmax                        (first_step)
 *   V(last), K(last-1), V(last-1) ...      for n = last-1 ... first:                       (step)
 *   q_full[w], k_full[s], v_full[s] ---->    S = Q K(n)^T   issued                         the tensor cores work on both
 *                                            O += P V(n+1)  issued                         through the softmax of S
 *                                            S done: where a block is masked the mask and the maxima; first part of the exponentials
 *   v_empty[s] <-------------------------    O done: the rest of them, P = S in 16 bits (registers, the operand a of the next product)
 *   k_empty[s], q_empty[w] <-------------    the weights fit, or else: S once more
 *                                          O += P V(first), statistics meanwhile           (last_step)
 *   q_empty[w] (TMA_STORE) <-------------    O / sum to global memory                        (leave)
 *
 * With PINGPONG the warpgroups issue their products in turns (named barriers 1, 2, ...), so that one computes exponentials while the tensor cores
 * work for another. Keys go from last to first: ragged and diagonal blocks come first, and only blocks that some row of the warpgroup sees in
 * part are masked element by element. A warpgroup that sees less than its CTA lets the surplus blocks pass.
 *
 * Weights of a plain block go by the maxima of the blocks before it. Whether that was good enough their sums tell afterwards, which are needed anyway. Where
 * they are too large for 16 bits, rarely, the weights are scaled down; where one is infinite the warp multiplies its rows again, from Q and K, which are
 * still there: so no block costs the time to look for maxima, but the first of a tile and masked ones.
 *
 * With TMA_STORE each warp puts its rows of O where its warpgroup's Q lay and has the TMA store them; that place is free for another Q once they are
 * read, which is looked after when the next tile's first product runs. Two stages of Q make that late enough not to be waited for.
 *
 * Shared memory, bytes (every matrix in chunks of 64 columns = rows of 128 bytes, 128-byte swizzle, aligned to 1024):
 *   Q         Q_STAGES * WARPGROUPS * SLAB_BYTES   64 rows for each warpgroup
 *   K         STAGES * K_BYTES                     BLOCK_N rows
 *   V         STAGES * V_BYTES                     BLOCK_N rows
 *   shifts    4096 for each consumer warp          bias or mask of a key block, SCORE 3 alone
 *   tiles     4 * 48                               what the producer tells of a tile, and 4 for each stage of K: its block (BLOCK_MASK)
 *   barriers  (2 * WARPGROUPS * Q_STAGES + 4 * STAGES + 8) * 8
 *
 *     dims      warpgroups x block   Q          K and V     registers: S      P      O   of consumer   producer
 *      64       3 x 128               48 KB     64 KB                64     32     32      160          32
 *      64       4 x 64                64 KB     64 KB                32     16     32      112          32
 *      64       3 x 112               48 KB     56 KB                56     28     32      152          56
 *      96       3 x 96                96 KB     96 KB                48     24     48      152          56
 *      96       2 x 128               64 KB    128 KB                64     32     48      232          40   (likewise below)
 *     128       2 x 128               64 KB    128 KB                64     32     64
 *     128       2 x 160               64 KB    160 KB                80     40     64
 *     128       2 x 176               32 KB    176 KB                88     44     64
 *     192       2 x 112               48 KB    168 KB                56     28     96
 *     256       2 x 80                64 KB    160 KB                40     20    128
 *
 * What limits: from dim 128 on the power of the tensor cores; at 64 the issue of instructions around the exponential; below seqlen 2,048 what a
 * tile does before its first and after its last product.
 *
 * Inputs: rows contiguous, strides multiples of 16 bytes, dims multiples of 8 up to HEAD_DIM, DIM_V (the TMA fills the rest with zeros).
 *
 * A weight of 0 times a value of infinity or NaN is NaN, though the pair was masked. Nothing in the loop guards against that: rows whose O is not
 * finite are computed again, one at a time, from their visible keys alone.
 *
 * Constants: DTYPE, HEAD_DIM, DIM_V, BLOCK_N, WARPGROUPS, STAGES, Q_STAGES; TMA_STORE (needs two stages of Q, rows of a tile that end where the
 * tensor does, and DIM_V up to HEAD_DIM); to measure what they are worth, PINGPONG, OVERLAP (0: S waits for O), LAZY_RESCALE (0: O is multiplied every
 * time), QUEUE (0: tiles are dealt out); MASKING (1: causal or window), SCORE (1: softcap, ALiBi, or a scale that is not positive; 2: these, bias and
 * mask; 3: as 2, bias or mask by way of shared memory), DROPOUT, VARLEN (1: cu_seqlens or seqused), BLOCK_MASK (1: there is one, in multiples of
 * BLOCK_M and BLOCK_N), FEW_ROWS (1: for few query rows against many keys: the keys of a tile may be split, and combine.cu puts the parts together; its
 * rows may be those of several heads, work_sm90.h).
 */
#define REAL float
#define ALIGNED 1
#define BLOCK_M (64 * WARPGROUPS)
#define SLAB_CHUNK_BYTES (64 * 128) /* 64 rows of Q, and of O on its way out */

#include "output_sm90.h"
#include "scores_sm90.h"

#define THREADS (128 * (WARPGROUPS + 1))
/* Each pair is all that the CTA has. A lone consumer warpgroup has enough from the start. */
#define PRODUCER_REGISTERS (WARPGROUPS == 2 ? 40 : WARPGROUPS == 3 && BLOCK_N <= 112 ? 56 : 32)
#define CONSUMER_REGISTERS (WARPGROUPS == 2 ? 232 : WARPGROUPS == 4 ? 112 : BLOCK_N <= 112 ? 152 : 160)

#define QK_CHUNKS ((HEAD_DIM + 63) / 64)
#define V_CHUNKS ((DIM_V + 63) / 64)
#define K_BYTES (BLOCK_N * 128 * QK_CHUNKS)
#define V_BYTES (BLOCK_N * 128 * V_CHUNKS)
#define SLAB_BYTES (SLAB_CHUNK_BYTES * QK_CHUNKS)

/* Fragments of S that become weights before O is waited for: by then it is done, and the rest hides the packing of P. */
#define WAIT_FRAGS (DIM_V <= 64 ? S_FRAGS / 4 * 2 : S_FRAGS * 3 / 8 * 2)

#define TILE_SLOTS 4
#define K_OFFSET (Q_STAGES * WARPGROUPS * SLAB_BYTES)
#define V_OFFSET (K_OFFSET + STAGES * K_BYTES)
#define SHIFTS_OFFSET (V_OFFSET + STAGES * V_BYTES)
#define TILES_OFFSET (SHIFTS_OFFSET + (SCORE == SCORE_AND_TILES ? 4 * WARPGROUPS * SHIFT_BYTES : 0))
#define BLOCKS_OFFSET (TILES_OFFSET + TILE_SLOTS * WORK_BYTES)
#define BARRIERS_OFFSET (BLOCKS_OFFSET + (STAGES + 1) / 2 * 8)

/* A step looks whether its successor's K and V have landed, so that it need not ask, which takes 200 cycles. Under masks ptxas makes worse loops of that. */
#define TEST_EARLY (!MASKING && !BLOCK_MASK)

/* Named barriers, one for each warpgroup w. */
#define TURN_BARRIER 1                           /* + w: its turn to issue products */
#define PASS_BARRIER (TURN_BARRIER + WARPGROUPS) /* + w: its four warps have seen a block that they do not use */

DEFINE_WGMMA_SS(wgmma_q_k, BLOCK_N, 0, 0)
DEFINE_WGMMA_RS(wgmma_p_v, DIM_V, 1)

/* ---- shared memory. Rings: use number i of a ring is of entry i % size, in phase i / size ---- */

FA_INLINE uint32_t bar_smem(uint32_t smem, int i) { return smem + BARRIERS_OFFSET + 8 * i; }
FA_INLINE uint32_t k_full(uint32_t smem, int i) { return bar_smem(smem, (unsigned)i % STAGES); }
FA_INLINE uint32_t k_empty(uint32_t smem, int i) { return bar_smem(smem, STAGES + (unsigned)i % STAGES); }
FA_INLINE uint32_t v_full(uint32_t smem, int i) { return bar_smem(smem, 2 * STAGES + (unsigned)i % STAGES); }
FA_INLINE uint32_t v_empty(uint32_t smem, int i) { return bar_smem(smem, 3 * STAGES + (unsigned)i % STAGES); }
FA_INLINE uint32_t tile_full(uint32_t smem, int i) { return bar_smem(smem, 4 * STAGES + (unsigned)i % TILE_SLOTS); }
FA_INLINE uint32_t tile_empty(uint32_t smem, int i) { return bar_smem(smem, 4 * STAGES + TILE_SLOTS + (unsigned)i % TILE_SLOTS); }
FA_INLINE uint32_t q_bar(uint32_t smem, int w, int i) {
  return bar_smem(smem, 4 * STAGES + 2 * TILE_SLOTS + 2 * (w * Q_STAGES + (unsigned)i % Q_STAGES));
}
FA_INLINE uint32_t q_full(uint32_t smem, int w, int i) { return q_bar(smem, w, i); }
FA_INLINE uint32_t q_empty(uint32_t smem, int w, int i) { return q_bar(smem, w, i) + 8; }
FA_INLINE int parity(int i, int size) { return (unsigned)i / (unsigned)size & 1; }

FA_INLINE uint32_t q_smem(uint32_t smem, int w, int i) { return smem + ((unsigned)i % Q_STAGES * WARPGROUPS + w) * SLAB_BYTES; }
FA_INLINE uint32_t k_smem(uint32_t smem, int i) { return smem + K_OFFSET + (unsigned)i % STAGES * K_BYTES; }
FA_INLINE uint32_t v_smem(uint32_t smem, int i) { return smem + V_OFFSET + (unsigned)i % STAGES * V_BYTES; }
FA_INLINE uint32_t block_smem(uint32_t smem, int i) { return smem + BLOCKS_OFFSET + (unsigned)i % STAGES * 4; }
FA_INLINE uint32_t slot_smem(uint32_t smem, int i) { return smem + TILES_OFFSET + (unsigned)i % TILE_SLOTS * WORK_BYTES; }

FA_INLINE void init_barriers(uint32_t smem) {
  for (int s = 0; s < STAGES; s++) {
    mbarrier_init(k_full(smem, s), 1);
    mbarrier_init(v_full(smem, s), 1);
    mbarrier_init(k_empty(smem, s), 4 * WARPGROUPS);
    mbarrier_init(v_empty(smem, s), WARPGROUPS);
  }
  for (int i = 0; i < TILE_SLOTS; i++) {
    mbarrier_init(tile_full(smem, i), 1);
    mbarrier_init(tile_empty(smem, i), 4 * WARPGROUPS);
  }
  for (int w = 0; w < WARPGROUPS; w++)
    for (int i = 0; i < Q_STAGES; i++) {
      mbarrier_init(q_full(smem, w, i), 1);
      mbarrier_init(q_empty(smem, w, i), 4);
    }
  fence_mbarrier_init();
}

/* ---- producer ---- */

/* Rows [row, row + rows) of a matrix, in chunks of 64 columns. */
FA_INLINE void load_rows(uint32_t dst_smem, const fa_tma_map *map, uint32_t full, int chunks, int rows, int row, int h, int b) {
  mbarrier_arrive_expect_tx(full, chunks * rows * 128);
#pragma unroll 1
  for (int c = 0; c < chunks; c++) cp_async_bulk_tensor_load(dst_smem + c * rows * 128, map, full, 64 * c, row, h, b);
}

/* 64 rows of Q from `position` on, of one head or all of a group: (dim, head of the group, position, group, batch). */
FA_INLINE void load_group(uint32_t dst_smem, const fa_tma_map *map, uint32_t full, int position, const work *t, int b, int group) {
  mbarrier_arrive_expect_tx(full, SLAB_BYTES);
#pragma unroll 1
  for (int c = 0; c < QK_CHUNKS; c++)
    cp_async_bulk_tensor_load_5d(dst_smem + c * 64 * 128, map, full, 64 * c, t->h % group, position, t->h / group, b);
}

/* Q of tile `turn`, 64 rows for each warpgroup. */
FA_INLINE void load_q(const fa_arg_problem *p, const fa_tma_map *q_map, uint32_t smem, const work *t, int turn) {
#pragma unroll 1
  for (int w = 0; w < WARPGROUPS; w++) {
    int position = t->q_start + t->m0 + positions_of(p, 64 * w), b = VARLEN && p->packed ? 0 : t->b;
    mbarrier_wait_parity(q_empty(smem, w, turn), parity(turn, Q_STAGES) ^ 1); /* it has multiplied with the Q that lay there */
    if (FEW_ROWS)
      load_group(q_smem(smem, w, turn), q_map, q_full(smem, w, turn), position, t, b, p->group);
    else
      load_rows(q_smem(smem, w, turn), q_map, q_full(smem, w, turn), QK_CHUNKS, 64, position, t->h, b);
  }
}

/* Number of this CTA's tile after `number`. */
FA_INLINE int take_tile(const fa_schedule *schedule, int number) {
  return (QUEUE && schedule->next ? atomicAdd(schedule->next, 1) : number) + (int)gridDim.x;
}

/* One lane issues all loads of a tile, all lanes look for its blocks. `ring` counts the blocks of this CTA. *number becomes that of the next tile, in
 * the one lane; it is taken as late as the loads allow, since a tile that waits behind a long one waits for this CTA though others may be free. */
FA_INLINE int load_tile(const fa_arg_problem *p, const fa_schedule *schedule, const fa_tma_map *q_map, const fa_tma_map *k_map,
                        const fa_tma_map *v_map, uint32_t smem, work *t, int k_start, int ring, int turn, int *number) {
  int n = next_block(p, t, t->last), b = VARLEN && p->packed ? 0 : t->b, h_k = t->h / p->group;
  if (t->blocks == 0 && laneid() == 0) {
    *number = take_tile(schedule, *number);
    load_q(p, q_map, smem, t, turn);
  }
#pragma unroll 1
  for (int left = t->blocks; left > 0; left--, ring++) {
    int free = parity(ring, STAGES) ^ 1, row = k_start + n * BLOCK_N;
    if (laneid() == 0) {
      if (left == 1) *number = take_tile(schedule, *number);
      mbarrier_wait_parity(k_empty(smem, ring), free); /* every warp has done with the K that lay there */
      if (BLOCK_MASK) st_shared_b32(block_smem(smem, ring), (uint32_t)n);
      load_rows(k_smem(smem, ring), k_map, k_full(smem, ring), QK_CHUNKS, BLOCK_N, row, h_k, b);
      if (left == t->blocks) load_q(p, q_map, smem, t, turn);
    }
    if (BLOCK_MASK) __syncwarp();
    n = next_block(p, t, n - 1);
    if (laneid() == 0) {
      mbarrier_wait_parity(v_empty(smem, ring), free); /* every warpgroup has multiplied with the V that lay there */
      load_rows(v_smem(smem, ring), v_map, v_full(smem, ring), V_CHUNKS, BLOCK_N, row, h_k, b);
    }
  }
  return ring;
}

FA_INLINE void produce(const fa_arg_problem *p, const fa_schedule *schedule, const fa_tma_map *q_map, const fa_tma_map *k_map,
                       const fa_tma_map *v_map, uint32_t smem) {
  int number = (int)blockIdx.x, ring = 0, k_start = 0;
#pragma unroll 1
  for (int turn = 0;;) {
    work t = find_work(p, schedule, number, &k_start);
    int over = number >= schedule->total;
    if (t.b >= 0 || over) {
      if (laneid() == 0) {
        mbarrier_wait_parity(tile_empty(smem, turn), parity(turn, TILE_SLOTS) ^ 1); /* every consumer warp has written that tile's O */
        send_work(slot_smem(smem, turn), &t);
        mbarrier_arrive(tile_full(smem, turn));
      }
      if (over) return;
      ring = load_tile(p, schedule, q_map, k_map, v_map, smem, &t, k_start, ring, turn++, &number);
      __syncwarp();
    } else if (laneid() == 0) {
      number = take_tile(schedule, number);
    }
    number = __shfl_sync(0xFFFFFFFFu, number, 0);
  }
}

/* ---- consumer ---- */

/* Who this thread is. */
typedef struct {
  const fa_forward_args *args;
  const fa_tma_map *out_map;
  uint32_t smem;
  int warp_row;      /* first row of the warp within BLOCK_M */
  float to_log2;     /* what scores, or products when they are scores but for their scale, are multiplied with for exp2 */
  fa_philox_key key; /* DROPOUT */
} place;

FA_INLINE uint32_t shift_smem(const place *me) { return me->smem + SHIFTS_OFFSET + me->warp_row / 16 * SHIFT_BYTES; }
FA_INLINE int args_zero(const place *me) { return me->args->problem.zero; }
FA_INLINE int warpgroup(const place *me) { return me->warp_row / 64; }

/* The warpgroup's part of a tile: blocks from last down to first (BLOCK_MASK: as many), none when last < first, after `ahead` of the CTA's blocks
 * that it does not see. Those from plain_first to plain_end - 1 need no mask. */
typedef struct {
  int first, last, ahead, plain_first, plain_end;
} part;

FA_INLINE part part_of(const place *me, const work *t) {
  const fa_arg_problem *p = &me->args->problem;
  int m0 = t->m0 + positions_of(p, 64 * warpgroup(me)), m1 = fa_min(m0 + positions_of(p, 64), t->len_q);
  part own = {0, -1, 0, 0, t->len_k / BLOCK_N};
  if (BLOCK_MASK) {
    own.last = m1 > m0 ? t->blocks - 1 : -1;
    own.ahead = m1 > m0 ? 0 : t->blocks;
  } else {
    seen_blocks(p, t->len_q, t->len_k, m0, m1, &own.first, &own.last);
    if (FEW_ROWS) own.first = fa_max(own.first, t->first), own.last = fa_min(own.last, t->last);
    own.ahead = own.last < own.first ? t->blocks : t->last - own.last;
  }
  if (MASKING) {
    fa_range plain = fa_unmasked_keys(p->rule, t->len_q, t->len_k, m0, m1);
    own.plain_first = fa_ceil_div(plain.lo, BLOCK_N);
    own.plain_end = fa_max(plain.hi, 0) / BLOCK_N;
  }
  return own;
}

FA_INLINE int is_leader() { return threadIdx.x % 128 == 0; }

/* Waits for the turn to issue; the turn goes round, so every warpgroup takes and passes it once for each key block of the CTA. */
FA_INLINE void take_turn(const place *me) {
  if (PINGPONG) bar_sync(TURN_BARRIER + warpgroup(me), 256);
}
FA_INLINE void pass_turn(const place *me) {
  if (PINGPONG) bar_arrive(TURN_BARRIER + ((warpgroup(me) + 1) % WARPGROUPS), 256);
}

/* Wait until use number `i` of K, V or Q has landed; give its place back. wgmma has retired for the whole warpgroup when its wait returns, so one
 * thread may speak for all about V. Q and K may be wanted once more (multiply_again): each warp gives them back. With TMA_STORE the place of Q is O's in
 * the end, and given back when the warp's rows have left it (release_slab). */
FA_INLINE void await_k(const place *me, int i) { mbarrier_wait_parity(k_full(me->smem, i), parity(i, STAGES)); }
FA_INLINE void await_v(const place *me, int i) { mbarrier_wait_parity(v_full(me->smem, i), parity(i, STAGES)); }
FA_INLINE void await_q(const place *me, int i) { mbarrier_wait_parity(q_full(me->smem, warpgroup(me), i), parity(i, Q_STAGES)); }
FA_INLINE int have_landed(const place *me, int ring) { /* the operands of the step of block number `ring` */
  return mbarrier_test_wait_parity(k_full(me->smem, ring), parity(ring, STAGES)) &
         mbarrier_test_wait_parity(v_full(me->smem, ring - 1), parity(ring - 1, STAGES));
}
FA_INLINE void release_k(const place *me, int i) {
  if (laneid() == 0) mbarrier_arrive(k_empty(me->smem, i));
}
FA_INLINE void release_v(const place *me, int i) {
  if (is_leader()) mbarrier_arrive(v_empty(me->smem, i));
}
FA_INLINE void release_q(const place *me, int i, int last_use) {
  if (!TMA_STORE && last_use && laneid() == 0) mbarrier_arrive(q_empty(me->smem, warpgroup(me), i));
}
FA_INLINE void release_slab(const place *me, int i) {
  if (TMA_STORE && laneid() == 0) {
    cp_async_bulk_wait_group_read();
    mbarrier_arrive(q_empty(me->smem, warpgroup(me), i));
  }
}

/* Where the operands of a product start, for its descriptors. */
FA_INLINE uint32_t q_start(const place *me, int turn) { return uniform(wgmma_start(q_smem(me->smem, warpgroup(me), turn), 16)); }
FA_INLINE uint32_t k_start(const place *me, int ring) { return uniform(wgmma_start(k_smem(me->smem, ring), 16)); }
FA_INLINE uint32_t v_start(const place *me, int ring) { return uniform(wgmma_start(v_smem(me->smem, ring), BLOCK_N * 128)); }

/* S = Q K^T, in the background. */
FA_INLINE void issue_scores(float s[S_FRAGS][4], uint32_t q, uint32_t keys) {
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < HEAD_DIM / 16; k++)
    wgmma_q_k(&s[0][0], wgmma_descriptor(q, k / 4 * (64 * 128) + k % 4 * 32), wgmma_descriptor(keys, k / 4 * (BLOCK_N * 128) + k % 4 * 32),
              k > 0);
  wgmma_commit_group();
}

/* O += P V, or O = P V when there is none yet, in the background. */
FA_INLINE void issue_values(float o[O_FRAGS][4], const uint32_t p[2 * S_FRAGS], uint32_t values, int add) {
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < BLOCK_N / 16; k++) wgmma_p_v(&o[0][0], p + 4 * k, wgmma_descriptor(values, k * 2048), k > 0 || add);
  wgmma_commit_group();
}

FA_INLINE void mma_m16n8k16(float d[4], const uint32_t a[4], const uint32_t b[2]) {
  if (DTYPE == FA_ARG_BF16)
    mma_m16n8k16_bf16(d, a, b);
  else
    mma_m16n8k16_f16(d, a, b);
}

/* S = Q K^T once more, of this warp's rows alone. */
FA_INLINE void multiply_again(const place *me, int turn, int ring, float s[S_FRAGS][4]) {
  int lane = laneid(), row = me->warp_row % 64 + lane % 16, key = lane / 16 * 8 + lane % 8;
  uint32_t rows = q_smem(me->smem, warpgroup(me), turn) + row * 128, keys = k_smem(me->smem, ring) + key * 128;
#pragma unroll
  for (int n = 0; n < S_FRAGS; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) s[n][e] = 0.0f;
#pragma unroll 1
  for (int k = 0; k < HEAD_DIM / 16; k++) {
    uint32_t a[4], b[4]; /* 16 rows; 16 keys */
    ldmatrix_x4(a, rows + k / 4 * (64 * 128) + (((k % 4 * 2 + lane / 16) ^ row) & 7) * 16);
#pragma unroll
    for (int n = 0; n < S_FRAGS; n += 2) {
      ldmatrix_x4(b, keys + k / 4 * (BLOCK_N * 128) + n * (8 * 128) + (((k % 4 * 2 + lane / 8 % 2) ^ key) & 7) * 16);
      mma_m16n8k16(s[n], a, b);
      mma_m16n8k16(s[n + 1], a, b + 2);
    }
  }
}

/* ptxas would put the wait for O ahead of the exponentials, which it cannot see to be the point of the exercise. It keeps the order of memory
 * accesses: this one hangs on sums of weights, and never happens. Those of one block alone it would know to be positive. */
FA_INLINE void after_weights(const place *me, float sum0, float sum1) { st_shared_if_negative(me->smem, sum0 + sum1); }

FA_INLINE void rescale_output(float o[O_FRAGS][4], const float rescale[2]) {
#pragma unroll
  for (int d = 0; d < O_FRAGS; d++)
#pragma unroll
    for (int e = 0; e < 4; e++) o[d][e] *= rescale[e >> 1];
}

/* Blocks that this warpgroup does not see: they still have to land before their places can be given back, and every warp has to see that, or the
 * phase after the next would look like this one to a warp that lags behind. */
FA_INLINE int let_pass(const place *me, int ring, int count) {
#pragma unroll 1
  for (; count > 0; count--, ring++) {
    take_turn(me);
    pass_turn(me);
    await_k(me, ring);
    await_v(me, ring);
    bar_sync(PASS_BARRIER + warpgroup(me), 128);
    release_k(me, ring);
    release_v(me, ring);
  }
  return ring;
}

/* The block that is number `ring` of the CTA: n, or as the producer says. */
FA_INLINE int block_of(const place *me, int n, int ring) { return BLOCK_MASK ? uniform(ld_shared_b32(block_smem(me->smem, ring))) : n; }

FA_INLINE int needs_mask(const part *own, int n) { return n >= own->plain_end || n < own->plain_first; }

/* The first block of a tile after none: nothing to overlap with. *landed: the next step's operands have. */
FA_INLINE void first_step(const place *me, const part *own, int turn, int ring, uint32_t p[2 * S_FRAGS], float max[2], float sum[2],
                          int *landed) {
  float s[S_FRAGS][4], rescale[2];
  uint32_t kept[KEPT_WORDS];
  await_k(me, ring);
  int n = block_of(me, own->last, ring);
  const block_place at = {&me->args->problem,
                          slot_smem(me->smem, turn),
                          me->warp_row,
                          n * BLOCK_N,
                          me->key,
                          shift_smem(me),
                          n > own->first ? (n - 1) * BLOCK_N : -1};
  if (SCORE == SCORE_AND_TILES) fetch_shifts(at.problem, at.tile_smem, at.shift_smem, at.warp_row, at.n0);
  uint32_t q = q_start(me, turn), keys = k_start(me, ring);
  take_turn(me);
  issue_scores(s, q, keys);
  pass_turn(me);
  if (turn > 0) release_slab(me, turn - 1);
  if (DROPOUT) draw_kept(kept, &at);
  wgmma_wait_group(0);
  wgmma_hold(&s[0][0], 4 * S_FRAGS);
  release_k(me, ring);
  release_q(me, turn, own->last == own->first);
  if (SCORE) change_scores(s, &at);
  if (needs_mask(own, n)) mask_scores(s, &at);
  move_maxima(s, me->to_log2, max, rescale);
  weighing w = weighing_from(max, 1);
  if (TEST_EARLY && own->last > own->first) *landed = have_landed(me, ring + 1);
  weigh(s, 0, S_FRAGS, me->to_log2, &w, sum, args_zero(me));
  pack_weights(p, s);
  if (DROPOUT) drop_weights(p, kept);
}

/* Block n, number `ring`, while O takes up the weights of the block before. */
FA_INLINE void step(const place *me, const part *own, int n, int turn, int ring, float o[O_FRAGS][4], uint32_t p[2 * S_FRAGS], float max[2],
                    float sum[2], int *landed) {
  float s[S_FRAGS][4], rescale[2] = {1.0f, 1.0f}, added[2] = {0.0f, 0.0f};
  uint32_t kept[KEPT_WORDS];
  int last_use = n == own->first, add = n + 1 < own->last;
  if (!TEST_EARLY || !*landed) {
    await_k(me, ring);
    await_v(me, ring - 1);
  }
  uint32_t q = q_start(me, turn), keys = k_start(me, ring), values = v_start(me, ring - 1);
  take_turn(me);
  if (OVERLAP) issue_scores(s, q, keys);
  issue_values(o, p, values, add);
  if (!OVERLAP) {
    wgmma_wait_group(0);
    wgmma_hold(&o[0][0], 4 * O_FRAGS);
    release_v(me, ring - 1);
    issue_scores(s, q, keys);
  }
  pass_turn(me);
  n = block_of(me, n, ring);
  const block_place at = {&me->args->problem, slot_smem(me->smem, turn),        me->warp_row, n * BLOCK_N, me->key,
                          shift_smem(me),     last_use ? -1 : (n - 1) * BLOCK_N};
  if (DROPOUT) draw_kept(kept, &at);
  if (OVERLAP)
    wgmma_wait_group(1);
  else
    wgmma_wait_group(0);
  wgmma_hold(&s[0][0], 4 * S_FRAGS);
  int moved = prepare_scores(s, &at, me->to_log2, (MASKING || BLOCK_MASK) && needs_mask(own, n), max, rescale);
  weighing w = weighing_from(max, moved);
  weigh(s, 0, WAIT_FRAGS, me->to_log2, &w, added, args_zero(me));
  if (OVERLAP) {
    after_weights(me, sum[0] + added[0], added[1]);
    wgmma_wait_group(0);
    wgmma_hold(&o[0][0], 4 * O_FRAGS);
    release_v(me, ring - 1);
  }
  if (TEST_EARLY && !last_use) *landed = have_landed(me, ring + 1);
  weigh(s, WAIT_FRAGS, S_FRAGS, me->to_log2, &w, added, args_zero(me));
  pack_weights(p, s);
  if (!SCORE && !moved && !weights_are_within(MOST_WEIGHT, added)) {
    if (weights_are_within(SHRINKABLE, added)) {
      shrink_weights(s, max, added, rescale);
    } else {
      multiply_again(me, turn, ring, s);
      move_maxima(s, me->to_log2, max, rescale);
      w = weighing_from(max, 1);
      added[0] = added[1] = 0.0f;
      weigh(s, 0, S_FRAGS, me->to_log2, &w, added, args_zero(me));
    }
    pack_weights(p, s);
    moved = 1;
  }
  release_k(me, ring);
  release_q(me, turn, last_use);
  if (DROPOUT) drop_weights(p, kept);
#pragma unroll
  for (int r = 0; r < 2; r++) sum[r] = sum[r] * rescale[r] + added[r];
  if (moved) rescale_output(o, rescale);
}

/* ---- from tile to tile ---- */

/* The last product of a tile, block number `ring`. Ends the statistics under it. */
FA_INLINE void last_step(const place *me, const part *own, int turn, int ring, float o[O_FRAGS][4], const uint32_t p[2 * S_FRAGS],
                         const float max[2], const float sum[2], float factor[2]) {
  await_v(me, ring);
  issue_values(o, p, v_start(me, ring), own->first < own->last);
  work t = receive_work(&me->args->problem, slot_smem(me->smem, turn));
  end_statistics(me->args, &t, me->warp_row, max, sum, factor);
  wgmma_wait_group(0);
  wgmma_hold(&o[0][0], 4 * O_FRAGS);
  release_v(me, ring);
}

/* The warpgroup's share of tile `turn` up to O and what it is to be multiplied with. Returns the count of key blocks so far. */
FA_INLINE int attend(const place *me, int turn, int ring, float o[O_FRAGS][4], float factor[2]) {
  const fa_arg_problem *problem = &me->args->problem;
  uint32_t p[2 * S_FRAGS], tile_smem = slot_smem(me->smem, turn);
  work t = receive_work(problem, tile_smem);
  part own = part_of(me, &t);
  int n = own.last, landed = 0;
  float max[2] = {MINUS_INFINITY, MINUS_INFINITY}, sum[2] = {0.0f, 0.0f};
  ring = let_pass(me, ring, own.ahead);
  await_q(me, turn);
  if (n < own.first) {
    bar_sync(PASS_BARRIER + warpgroup(me), 128); /* every warp has seen Q land */
    release_q(me, turn, 1);
    if (turn > 0) release_slab(me, turn - 1);
    end_statistics(me->args, &t, me->warp_row, max, sum, factor);
    return ring;
  }
  first_step(me, &own, turn, ring, p, max, sum, &landed);
#pragma unroll 1
  for (ring++; --n >= own.first; ring++) step(me, &own, n, turn, ring, o, p, max, sum, &landed);
  last_step(me, &own, turn, ring - 1, o, p, max, sum, factor);
  return BLOCK_MASK ? ring : let_pass(me, ring, own.first - receive_work(problem, tile_smem).first);
}

/* Writes O and repairs it; then the tile's slot may be used again. */
FA_INLINE void leave(const place *me, int turn, float o[O_FRAGS][4], const float factor[2]) {
  work t = receive_work(&me->args->problem, slot_smem(me->smem, turn));
  unsigned repair = rows_not_finite(o, factor);
  if (TMA_STORE)
    store_output(me->out_map, &t, me->warp_row, q_smem(me->smem, warpgroup(me), turn), o, factor);
  else if (is_partial(me->args))
    write_partial_output(me->args, &t, me->warp_row, o, factor);
  else
    write_output(me->args, &t, me->warp_row, o, factor);
  if (repair) {
    if (TMA_STORE) cp_async_bulk_wait_group(); /* or it would come over the repaired rows */
    repair_rows(me->args, &t, me->warp_row, repair);
  }
  __syncwarp(); /* all lanes have read the tile */
  if (laneid() == 0) mbarrier_arrive(tile_empty(me->smem, turn));
}

FA_INLINE void consume(const fa_forward_args *args, const fa_schedule *schedule, const fa_tma_map *out_map, uint32_t smem) {
  place me = {args, out_map, smem, uniform((int)threadIdx.x / 32 * 16 - 64), SCORE ? LOG2E : schedule->scale_log2, {{0, 0}}};
  if (DROPOUT) me.key = fa_dropout_key_of(&args->problem);
  float o[O_FRAGS][4], factor[2];
  int ring = 0;
  if (PINGPONG && warpgroup(&me) == 0) bar_arrive(TURN_BARRIER, 256); /* the first turn */
#pragma unroll 1
  for (int turn = 0;; turn++) {
    mbarrier_wait_parity(tile_full(smem, turn), parity(turn, TILE_SLOTS));
    if (ld_shared_b32(slot_smem(smem, turn)) == (uint32_t)NO_MORE_TILES) break;
    ring = attend(&me, turn, ring, o, factor);
    leave(&me, turn, o, factor);
  }
  if (TMA_STORE) cp_async_bulk_wait_group_read(); /* shared memory lives until then */
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    fwd_sm90(const __grid_constant__ fa_forward_args args, const __grid_constant__ fa_schedule schedule,
             const __grid_constant__ fa_tma_map q_map, const __grid_constant__ fa_tma_map k_map, const __grid_constant__ fa_tma_map v_map,
             const __grid_constant__ fa_tma_map out_map) {
  extern __shared__ __align__(1024) unsigned char shared[];
  uint32_t smem = smem_address(shared);
  if (threadIdx.x == 0) init_barriers(smem);
  __syncthreads(); /* the barriers exist */
  if (threadIdx.x < 128) {
    if (WARPGROUPS > 1) setmaxnreg_dec(PRODUCER_REGISTERS);
    if (threadIdx.x < 32) produce(&args.problem, &schedule, &q_map, &k_map, &v_map, smem);
  } else {
    if (WARPGROUPS > 1) setmaxnreg_inc(CONSUMER_REGISTERS);
    consume(&args, &schedule, &out_map, smem);
  }
}
