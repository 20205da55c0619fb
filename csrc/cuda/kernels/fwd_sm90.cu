/* fwd_sm90.cu: forward attention on Hopper's wgmma and TMA; fp16 and bf16.
 *
 * One persistent CTA per SM. A producer warp fetches, WARPGROUPS consumer warpgroups compute 64 query rows each, BLOCK_M = 64 * WARPGROUPS in all.
 *
 *   warp 0                               warpgroup w = 0, 1 (, 2)
 *   takes a tile from the queue
 *   tile_full[2]  ---------------------->  reads it                                   tile_empty[2] back
 *   K(last), Q of every warpgroup,         S = Q K(last)^T; softmax
 *   V(last), K(last-1), V(last-1) ...      for n = last-1 ... first:
 *   q_full[w], k_full[s], v_full[s] ---->    S = Q K(n)^T   issued       the tensor cores work on both
 *                                            O += P V(n+1)  issued       through the softmax of S
 *   k_empty[s] <--------------------------   S done: mask, maxima, exponentials
 *   v_empty[s] <--------------------------   O done: rescale, P = S in 16 bits (registers, the operand a of the next product)
 *                                          O += P V(first); O / sum -> own rows of Q -> TMA store
 *   q_empty[w] <-------------------------- when the store has read them
 *
 * With PINGPONG the warpgroups issue their products in turns (named barriers 1, 2, 3), so that one computes exponentials while the tensor cores
 * work for another. Keys go from last to first: ragged and diagonal blocks come first, and only blocks that some row of the warpgroup sees
 * in part are masked element by element. A warpgroup that sees less than its CTA lets the surplus blocks pass.
 *
 * Shared memory, bytes (every matrix in chunks of 64 columns = rows of 128 bytes, 128-byte swizzle, aligned to 1024):
 *   Q and O   Q_STAGES * WARPGROUPS * SLAB_BYTES   64 rows; slab of warpgroup w is read and, as O, written by w alone
 *   K         STAGES * K_BYTES                     BLOCK_N rows
 *   V         STAGES * V_BYTES                     BLOCK_N rows
 *   barriers  (2 * WARPGROUPS * Q_STAGES + 4 * STAGES + 4) * 8, and two tile descriptions of 64
 *
 *     dims      warpgroups x block   Q and O   K and V     registers: S      P      O   of consumer   producer
 *      64       3 x 128               48 KB     64 KB                64     32     32      160          32
 *      64       3 x 112               48 KB     56 KB                56     28     32      152          56
 *      96       2 x 128               64 KB    128 KB                64     32     48      240          24   (VARLEN: 232, 40)
 *     128       2 x 128, 2 x 160      64 KB    128, 160 KB       64, 80  32, 40    64      240          24   (likewise below)
 *     192       2 x 112               48 KB    168 KB                56     28     96      240          24
 *     256       2 x 80                64 KB    160 KB                40     20    128      240          24
 *
 * What limits: from dim 128 on the power of the tensor cores; at 64 the exponential and the latency around it; below seqlen 2,048 what a tile does
 * before its first and after its last product.
 *
 * Inputs: rows contiguous, strides multiples of 16 bytes, dims multiples of 8 up to HEAD_DIM, DIM_V (the TMA fills the rest with zeros).
 *
 * A weight of 0 times a value of infinity or NaN is NaN, though the pair was masked. Nothing in the loop guards against that: rows whose O is not
 * finite are computed again, one at a time, from their visible keys alone.
 *
 * Constants: DTYPE, HEAD_DIM, DIM_V, BLOCK_N, WARPGROUPS, STAGES, Q_STAGES, PINGPONG, OVERLAP (0: S waits for O), LAZY_RESCALE (0: O is multiplied
 * every time), MASKING (1: causal or window), SCORE (1: softcap, ALiBi, or a scale that is not positive), VARLEN (1: cu_seqlens or seqused).
 */
#define REAL float
#define ALIGNED 1

#include "ptx_sm90.h"
#include "schedule_sm90.h"
#include "score.h"
#include "softmax.h"

#define BLOCK_M (64 * WARPGROUPS)
#define THREADS (128 * (WARPGROUPS + 1))
/* Each pair is all that the CTA has. Finding a tile among packed sequences takes the producer more. */
#define PRODUCER_REGISTERS (WARPGROUPS == 2 ? (VARLEN ? 40 : 24) : BLOCK_N <= 112 ? 56 : 32)
#define CONSUMER_REGISTERS (WARPGROUPS == 2 ? (VARLEN ? 232 : 240) : BLOCK_N <= 112 ? 152 : 160)
#define S_FRAGS (BLOCK_N / 8)
#define O_FRAGS (DIM_V / 8)

#define QK_CHUNKS ((HEAD_DIM + 63) / 64)
#define V_CHUNKS ((DIM_V + 63) / 64)
#define K_BYTES (BLOCK_N * 128 * QK_CHUNKS)
#define V_BYTES (BLOCK_N * 128 * V_CHUNKS)
#define SLAB_BYTES (64 * 128 * (QK_CHUNKS > V_CHUNKS ? QK_CHUNKS : V_CHUNKS))

#define K_OFFSET (Q_STAGES * WARPGROUPS * SLAB_BYTES)
#define V_OFFSET (K_OFFSET + STAGES * K_BYTES)
#define TILES_OFFSET (V_OFFSET + STAGES * V_BYTES)
#define TILE_BYTES 64
#define BARRIERS_OFFSET (TILES_OFFSET + 2 * TILE_BYTES)

/* Named barriers, one for each warpgroup w. */
#define TURN_BARRIER 1                           /* + w: its turn to issue products */
#define PASS_BARRIER (TURN_BARRIER + WARPGROUPS) /* + w: its four warps have seen a block that they do not use */

DEFINE_WGMMA_SS(wgmma_q_k, BLOCK_N, 0, 0)
DEFINE_WGMMA_RS(wgmma_p_v, DIM_V, 1)

/* ---- barriers in shared memory ---- */

FA_INLINE uint32_t bar_smem(uint32_t smem, int i) { return smem + BARRIERS_OFFSET + 8 * i; }
FA_INLINE uint32_t k_full(uint32_t smem, int s) { return bar_smem(smem, s); }
FA_INLINE uint32_t k_empty(uint32_t smem, int s) { return bar_smem(smem, STAGES + s); }
FA_INLINE uint32_t v_full(uint32_t smem, int s) { return bar_smem(smem, 2 * STAGES + s); }
FA_INLINE uint32_t v_empty(uint32_t smem, int s) { return bar_smem(smem, 3 * STAGES + s); }
FA_INLINE uint32_t tile_full(uint32_t smem, int i) { return bar_smem(smem, 4 * STAGES + i); }
FA_INLINE uint32_t tile_empty(uint32_t smem, int i) { return bar_smem(smem, 4 * STAGES + 2 + i); }
FA_INLINE uint32_t q_full(uint32_t smem, int w, int i) { return bar_smem(smem, 4 * STAGES + 4 + 2 * (w * Q_STAGES + i)); }
FA_INLINE uint32_t q_empty(uint32_t smem, int w, int i) { return bar_smem(smem, 4 * STAGES + 5 + 2 * (w * Q_STAGES + i)); }

FA_INLINE void init_barriers(uint32_t smem) {
  for (int s = 0; s < STAGES; s++) {
    mbarrier_init(k_full(smem, s), 1);
    mbarrier_init(v_full(smem, s), 1);
    mbarrier_init(k_empty(smem, s), WARPGROUPS);
    mbarrier_init(v_empty(smem, s), WARPGROUPS);
  }
  for (int i = 0; i < 2; i++) {
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

/* Tells the compiler that a value is the same in all lanes. Descriptors made from it live in uniform registers, where wgmma wants them: otherwise
 * each product needs four moves there, and each warp 16 registers more. */
FA_INLINE int uniform(uint32_t x) { return (int)__shfl_sync(0xFFFFFFFFu, x, 0); }

/* Use number `i` of a ring of `stages` entries: its entry, and the parity of its phase. */
FA_INLINE int ring_entry(int i, int stages) { return i % stages; }
FA_INLINE int ring_parity(int i, int stages) { return i / stages & 1; }

/* ---- the tile, from the producer to the consumers ---- */

typedef struct {
  int b, h, m0;     /* batch entry, head, first row within the sequence */
  int first, last;  /* key blocks that some row sees; none when last < first. b < 0: no more tiles */
  int len_q, len_k; /* lengths of the sequence, and rows of it that the tensors hold: VARLEN only */
  int slot_q;
  int q_start; /* where the sequence starts in the tensors: VARLEN only */
} work;

FA_INLINE void send_tile(uint32_t slot_smem, const work *t) {
  uint32_t words[12] = {(uint32_t)t->b,
                        (uint32_t)t->h,
                        (uint32_t)t->m0,
                        (uint32_t)t->first,
                        (uint32_t)t->last,
                        (uint32_t)t->len_q,
                        (uint32_t)t->len_k,
                        (uint32_t)t->slot_q,
                        (uint32_t)t->q_start,
                        0,
                        0,
                        0};
  st_shared_v4(slot_smem, words);
  st_shared_v4(slot_smem + 16, words + 4);
  if (VARLEN) st_shared_v4(slot_smem + 32, words + 8);
}

FA_INLINE work receive_tile(const fa_arg_problem *p, uint32_t slot_smem) {
  uint32_t x[4], y[4];
  ld_shared_v4(x, slot_smem);
  ld_shared_v4(y, slot_smem + 16);
  work t = {uniform(x[0]), uniform(x[1]), uniform(x[2]), uniform(x[3]), uniform(y[0]), p->seqlen_q, p->seqlen_k, p->seqlen_q, 0};
  if (VARLEN) {
    t.len_q = uniform(y[1]);
    t.len_k = uniform(y[2]);
    t.slot_q = uniform(y[3]);
    t.q_start = uniform(ld_shared_b32(slot_smem + 32));
  }
  return t;
}

/* Key blocks [first, last] that the rows [m0, m1) see. */
FA_INLINE void seen_blocks(const fa_arg_problem *p, int len_q, int len_k, int m0, int m1, int *first, int *last) {
  fa_range seen = {0, len_k};
  if (MASKING) seen = fa_visited_keys(p->rule, len_q, len_k, m0, m1);
  *first = seen.lo / BLOCK_N;
  *last = m1 > m0 && seen.hi > 0 ? fa_ceil_div(seen.hi, BLOCK_N) - 1 : -1;
}

/* ---- producer ---- */

/* Tile `number`, or the next that exists; returns its number, total when there is none. All lanes of the warp take part. */
FA_INLINE int find_tile(const fa_arg_problem *p, const fa_schedule *schedule, int number, work *t, int *k_start) {
  int head, tile;
  fa_tile found;
  t->b = -1;
  if (number >= schedule->total) return number;
  fa_scheduled_tile(schedule, number, &head, &tile);
  found.h = head % p->heads_q;
  found.b = head / p->heads_q;
  if (p->packed) {
    int of_sequence;
    if (!fa_find_sequence(p->cu_q, p->batch, BLOCK_M, schedule->tiles - 1 - tile, &found.b, &tile, &of_sequence)) return number;
    tile = of_sequence - 1 - tile;
  }
  if (VARLEN)
    fa_read_lengths(p, &found);
  else
    found.q_start = found.k_start = 0, found.slot_q = found.len_q = p->seqlen_q, found.len_k = p->seqlen_k;
  work w = {found.b, found.h, tile * BLOCK_M, 0, 0, found.len_q, found.len_k, found.slot_q, (int)found.q_start};
  seen_blocks(p, w.len_q, w.len_k, w.m0, fa_min(w.m0 + BLOCK_M, w.len_q), &w.first, &w.last);
  *k_start = (int)found.k_start;
  *t = w;
  return number;
}

/* Rows [row, row + rows) of a matrix, in chunks of 64 columns. */
FA_INLINE void load_rows(uint32_t dst_smem, const fa_tma_map *map, uint32_t full, int chunks, int rows, int row, int h, int b) {
  mbarrier_arrive_expect_tx(full, chunks * rows * 128);
#pragma unroll 1
  for (int c = 0; c < chunks; c++) cp_async_bulk_tensor_load(dst_smem + c * rows * 128, map, full, 64 * c, row, h, b);
}

/* One lane issues all loads of a tile. `ring` counts the key blocks of this CTA so far, `turn` its tiles. */
FA_INLINE int load_tile(const fa_arg_problem *p, const fa_tma_map *q_map, const fa_tma_map *k_map, const fa_tma_map *v_map, uint32_t smem,
                        const work *t, int k_start, int ring, int turn) {
  int b = p->packed ? 0 : t->b, h_k = t->h / p->group, q_stage = ring_entry(turn, Q_STAGES);
  for (int n = t->last; n >= t->first || n == t->last; n--) {
    int stage = ring_entry(ring, STAGES), parity = ring_parity(ring, STAGES) ^ 1, has_keys = n >= t->first;
    if (has_keys) {
      mbarrier_wait_parity(k_empty(smem, stage), parity); /* every warpgroup has multiplied with the K that lay there */
      load_rows(smem + K_OFFSET + stage * K_BYTES, k_map, k_full(smem, stage), QK_CHUNKS, BLOCK_N, k_start + n * BLOCK_N, h_k, b);
    }
    if (n == t->last) {
#pragma unroll 1
      for (int w = 0; w < WARPGROUPS; w++) {
        mbarrier_wait_parity(q_empty(smem, w, q_stage), ring_parity(turn, Q_STAGES) ^ 1); /* the O that lay there has left */
        load_rows(smem + (q_stage * WARPGROUPS + w) * SLAB_BYTES, q_map, q_full(smem, w, q_stage), QK_CHUNKS, 64,
                  t->q_start + t->m0 + 64 * w, t->h, b);
      }
    }
    if (!has_keys) break;
    mbarrier_wait_parity(v_empty(smem, stage), parity); /* every warpgroup has multiplied with the V that lay there */
    load_rows(smem + V_OFFSET + stage * V_BYTES, v_map, v_full(smem, stage), V_CHUNKS, BLOCK_N, k_start + n * BLOCK_N, h_k, b);
    ring++;
  }
  return ring;
}

FA_INLINE void produce(const fa_arg_problem *p, const fa_schedule *schedule, const fa_tma_map *q_map, const fa_tma_map *k_map,
                       const fa_tma_map *v_map, uint32_t smem) {
  int number = (int)blockIdx.x, ring = 0, k_start = 0;
  for (int turn = 0;;) {
    work t;
    number = find_tile(p, schedule, number, &t, &k_start);
    int taken = 0, over = number >= schedule->total;
    if (schedule->next && !over && laneid() == 0) taken = atomicAdd(schedule->next, 1);
    if (t.b >= 0 || over) {
      if (laneid() == 0) {
        mbarrier_wait_parity(tile_empty(smem, turn & 1), (turn >> 1 & 1) ^ 1); /* every consumer warp has read the tile before last */
        send_tile(smem + TILES_OFFSET + (turn & 1) * TILE_BYTES, &t);
        mbarrier_arrive(tile_full(smem, turn & 1));
        if (!over) ring = load_tile(p, q_map, k_map, v_map, smem, &t, k_start, ring, turn);
      }
      turn++;
      __syncwarp();
    }
    if (over) return;
    number = schedule->next ? (int)gridDim.x + __shfl_sync(0xFFFFFFFFu, taken, 0) : number + (int)gridDim.x;
  }
}

/* ---- consumer ---- */

/* Who this thread is, and where its warpgroup's matrices lie. */
typedef struct {
  uint32_t smem;
  int w;            /* warpgroup */
  int warp_row;     /* first row of the warp within the warpgroup */
  float scale_log2; /* scale * log2(e) */
} place;

FA_INLINE int is_leader() { return threadIdx.x % 128 == 0; }

/* Waits for the turn to issue; the turn goes round, so every warpgroup takes and passes it once for each key block of the CTA. */
FA_INLINE void take_turn(const place *me) {
  if (PINGPONG) bar_sync(TURN_BARRIER + me->w, 256);
}
FA_INLINE void pass_turn(const place *me) {
  if (PINGPONG) bar_arrive(TURN_BARRIER + (me->w + 1 == WARPGROUPS ? 0 : me->w + 1), 256);
}

/* S = Q K^T, in the background. */
FA_INLINE void issue_scores(float s[S_FRAGS][4], uint32_t q_smem, uint32_t k_smem) {
  q_smem = uniform(q_smem);
  k_smem = uniform(k_smem);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < HEAD_DIM / 16; k++) {
    uint64_t q = wgmma_descriptor(q_smem + k / 4 * (64 * 128) + k % 4 * 32, 16);
    uint64_t keys = wgmma_descriptor(k_smem + k / 4 * (BLOCK_N * 128) + k % 4 * 32, 16);
    wgmma_q_k(&s[0][0], q, keys, k > 0);
  }
  wgmma_commit_group();
}

/* O = or += P V, in the background. */
FA_INLINE void issue_values(float o[O_FRAGS][4], const uint32_t p[2 * S_FRAGS], uint32_t v_smem, int accumulate) {
  v_smem = uniform(v_smem);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < BLOCK_N / 16; k++)
    wgmma_p_v(&o[0][0], p + 4 * k, wgmma_descriptor(v_smem + k * 2048, BLOCK_N * 128), k > 0 || accumulate);
  wgmma_commit_group();
}

/* Scale, softcap, ALiBi. */
FA_INLINE void change_scores(float s[S_FRAGS][4], const fa_arg_problem *p, const work *t, int row0, int n0) {
  fa_tile tile = {t->b, t->h, 0, 0, 0, 0, t->len_q, t->len_k, 0, 0};
  fa_score_head head = fa_score_of_head(p, &tile);
  int lane = laneid(), column = n0 + 2 * (lane & 3);
#pragma unroll
  for (int n = 0; n < S_FRAGS; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) s[n][e] = fa_cap(&head, s[n][e]);
#pragma unroll
  for (int r = 0; r < 2; r++) {
    int row = row0 + (lane >> 2) + 8 * r;
    if (head.slope != 0.0f) {
      float distance = (float)(row + head.off - column);
#pragma unroll
      for (int n = 0; n < S_FRAGS; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) s[n][2 * r + e] -= head.slope * fabsf(distance - (float)(8 * n + e));
    }
  }
}

/* Scores outside the rows' intervals of keys become -infinity. */
FA_INLINE void mask_scores(float s[S_FRAGS][4], const fa_arg_problem *p, const work *t, int row0, int n0) {
  int lane = laneid(), column = n0 + 2 * (lane & 3); /* limits of rows are computed here, not kept through the loop */
#pragma unroll
  for (int r = 0; r < 2; r++) {
    int row = row0 + (lane >> 2) + 8 * r;
    int hi = (MASKING ? fa_row_hi(p->rule, t->len_q, t->len_k, row) : t->len_k) - column;
#pragma unroll
    for (int n = 0; n < S_FRAGS; n++)
#pragma unroll
      for (int e = 0; e < 2; e++)
        if (8 * n + e >= hi) s[n][2 * r + e] = MINUS_INFINITY;
    if (MASKING && p->rule.window_left >= 0) {
      int lo = fa_row_lo(p->rule, t->len_q, t->len_k, row) - column;
#pragma unroll
      for (int n = 0; n < S_FRAGS; n++)
#pragma unroll
        for (int e = 0; e < 2; e++)
          if (8 * n + e < lo) s[n][2 * r + e] = MINUS_INFINITY;
    }
  }
}

/* Scores of one block become weights; `rescale` is what O has to be multiplied with before these are added. */
FA_INLINE void weigh_scores(float s[S_FRAGS][4], const fa_arg_problem *p, const work *t, const place *me, int row0, int n0, int masked,
                            float max[2], float sum[2], float rescale[2]) {
  float to_log2 = SCORE ? LOG2E : me->scale_log2;
  if (SCORE) change_scores(s, p, t, row0, n0);
  if (masked) mask_scores(s, p, t, row0, n0);
  fa_move_maxima(s, S_FRAGS, to_log2, max, rescale);
  sum[0] *= rescale[0];
  sum[1] *= rescale[1];
  fa_weigh(s, S_FRAGS, to_log2, max, sum);
}

/* ptxas would put the wait for O ahead of the exponentials, which it cannot see to be the point of the exercise. A warp barrier stays between the two
 * when its mask, always all ones, hangs on the sums. `zero` is 0, which only the host knows. */
FA_INLINE void after_weights(const float sum[2], int zero) { bar_warp_sync(~(__float_as_uint(sum[0] + sum[1]) & (uint32_t)zero)); }

FA_INLINE void pack_weights(uint32_t p[2 * S_FRAGS], float s[S_FRAGS][4]) {
#pragma unroll
  for (int n = 0; n < S_FRAGS; n++) {
    p[2 * n] = fa_pack(s[n][0], s[n][1]);
    p[2 * n + 1] = fa_pack(s[n][2], s[n][3]);
  }
}

FA_INLINE void rescale_output(float o[O_FRAGS][4], const float rescale[2]) {
  int moved = rescale[0] != 1.0f || rescale[1] != 1.0f;
  if (LAZY_RESCALE && !__any_sync(0xFFFFFFFFu, moved)) return;
#pragma unroll
  for (int d = 0; d < O_FRAGS; d++)
#pragma unroll
    for (int e = 0; e < 4; e++) o[d][e] *= rescale[e >> 1];
}

/* Wait until the block number `ring` of K or V has landed; give its place back. wgmma has retired for the whole warpgroup when its wait
 * returns, so one thread may speak for all. */
FA_INLINE void await_k(const place *me, int ring) {
  mbarrier_wait_parity(k_full(me->smem, ring_entry(ring, STAGES)), ring_parity(ring, STAGES));
}
FA_INLINE void await_v(const place *me, int ring) {
  mbarrier_wait_parity(v_full(me->smem, ring_entry(ring, STAGES)), ring_parity(ring, STAGES));
}
FA_INLINE void release_k(const place *me, int ring) {
  if (is_leader()) mbarrier_arrive(k_empty(me->smem, ring_entry(ring, STAGES)));
}
FA_INLINE void release_v(const place *me, int ring) {
  if (is_leader()) mbarrier_arrive(v_empty(me->smem, ring_entry(ring, STAGES)));
}
FA_INLINE uint32_t k_smem(const place *me, int ring) { return me->smem + K_OFFSET + ring_entry(ring, STAGES) * K_BYTES; }
FA_INLINE uint32_t v_smem(const place *me, int ring) { return me->smem + V_OFFSET + ring_entry(ring, STAGES) * V_BYTES; }

/* A block that this warpgroup does not see: it still has to land before its place can be given back, and every warp has to see that, or the
 * phase after the next would look like this one to a warp that lags behind. */
FA_INLINE void let_pass(const place *me, int ring) {
  take_turn(me);
  pass_turn(me);
  await_k(me, ring);
  await_v(me, ring);
  bar_sync(PASS_BARRIER + me->w, 128);
  release_k(me, ring);
  release_v(me, ring);
}

/* The first block of a tile: nothing to overlap with. */
FA_INLINE void first_step(const fa_arg_problem *args, const work *t, const place *me, uint32_t q_smem, int row0, int n, int ring,
                          uint32_t p[2 * S_FRAGS], float max[2], float sum[2]) {
  float s[S_FRAGS][4], rescale[2];
  await_k(me, ring);
  take_turn(me);
  issue_scores(s, q_smem, k_smem(me, ring));
  pass_turn(me);
  wgmma_wait_group(0);
  wgmma_hold(&s[0][0], 4 * S_FRAGS);
  release_k(me, ring);
  weigh_scores(s, args, t, me, row0, n * BLOCK_N, 1, max, sum, rescale);
  pack_weights(p, s);
}

/* Block n, number `ring`, while O takes up the weights of the block before. */
FA_INLINE void step(const fa_arg_problem *args, const work *t, const place *me, uint32_t q_smem, int row0, int n, int ring, int masked,
                    int accumulate, float o[O_FRAGS][4], uint32_t p[2 * S_FRAGS], float max[2], float sum[2]) {
  float s[S_FRAGS][4], rescale[2];
  await_k(me, ring);
  take_turn(me);
  if (OVERLAP) issue_scores(s, q_smem, k_smem(me, ring));
  await_v(me, ring - 1);
  issue_values(o, p, v_smem(me, ring - 1), accumulate);
  if (!OVERLAP) {
    wgmma_wait_group(0);
    wgmma_hold(&o[0][0], 4 * O_FRAGS);
    release_v(me, ring - 1);
    issue_scores(s, q_smem, k_smem(me, ring));
  }
  pass_turn(me);
  if (OVERLAP)
    wgmma_wait_group(1);
  else
    wgmma_wait_group(0);
  wgmma_hold(&s[0][0], 4 * S_FRAGS);
  release_k(me, ring);
  weigh_scores(s, args, t, me, row0, n * BLOCK_N, masked, max, sum, rescale);
  if (OVERLAP) {
    after_weights(sum, args->zero);
    wgmma_wait_group(0);
    wgmma_hold(&o[0][0], 4 * O_FRAGS);
    release_v(me, ring - 1);
  }
  rescale_output(o, rescale);
  pack_weights(p, s);
}

/* ---- rows that are not finite ---- */

/* One row again, from its visible keys alone, by one warp; lane i computes columns i, i + 32, ... */
FA_INLINE void repair_row(const fa_forward_args *args, const work *t, int lane, int row, float max, float factor, uint32_t row_smem) {
  forget_origin(args); /* or what can be computed ahead of the main loop is, and takes registers there */
  const fa_arg_problem *p = &args->problem;
  fa_tile tile = {t->b, t->h, 0, 0, 0, 0, 0, 0, 0, 0};
  fa_read_lengths(p, &tile);
  fa_score_head head = fa_score_of_head(p, &tile);
  const char *q_gmem = fa_head_base(&args->q, 2, t->b, t->h, tile.q_start + row);
  const char *k_gmem = fa_head_base(&args->k, 2, t->b, t->h / p->group, tile.k_start);
  const char *v_gmem = fa_head_base(&args->v, 2, t->b, t->h / p->group, tile.k_start);
  int lo = fa_row_lo(p->rule, tile.len_q, tile.len_k, row), hi = fa_row_hi(p->rule, tile.len_q, tile.len_k, row);
  float o[(DIM_V + 31) / 32] = {0};
#pragma unroll 1
  for (int j0 = lo & ~31; j0 < hi; j0 += 32) {
    int j = j0 + lane;
    float weight = 0.0f;
    int seen = j >= lo && j < hi;
    if (seen) {
      float product = 0.0f;
#pragma unroll 1
      for (int d = 0; d < p->dim_qk; d++) product += fa_load_f32(q_gmem, DTYPE, d) * fa_load_f32(k_gmem, DTYPE, j * args->k.s + d);
      float score = fa_score_at(p, &head, product, row, j);
      seen = score != MINUS_INFINITY;
      weight = ex2_approx(score * LOG2E - max) * factor;
    }
    for (unsigned left = __ballot_sync(0xFFFFFFFFu, seen); left; left &= left - 1) {
      int from = __ffs(left) - 1;
      float w = __shfl_sync(0xFFFFFFFFu, weight, from);
#pragma unroll
      for (int i = 0; i < (DIM_V + 31) / 32; i++) {
        int d = lane + 32 * i;
        if (d < p->dim_v) o[i] += w * fa_load_f32(v_gmem, DTYPE, (j0 + from) * args->v.s + d);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < (DIM_V + 31) / 32; i++) {
    int d = lane + 32 * i;
    st_shared_b16(row_smem + d / 64 * (64 * 128) + ((d % 64 * 2) ^ (row & 7) << 4), (uint16_t)fa_pack(o[i], 0.0f));
  }
}

/* ---- the end of a tile ---- */

/* O / sum of the warp's 16 rows into its rows of the slab, swizzled. */
FA_INLINE void stage_output(float o[O_FRAGS][4], const float factor[2], int lane, uint32_t rows_smem) {
  int row = lane & 15;
  uint32_t row_smem = rows_smem + row * 128, swizzle = (uint32_t)(row & 7) << 4;
#pragma unroll
  for (int d = 0; d < O_FRAGS; d += 2) {
    uint32_t v[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int r = i & 1, n = d + (i >> 1);
      v[i] = factor[r] == 0.0f ? 0 : fa_pack(o[n][2 * r] * factor[r], o[n][2 * r + 1] * factor[r]);
    }
    uint32_t column_bytes = (uint32_t)(d % 8 * 16 + (lane >> 4) * 16);
    stmatrix_x4(row_smem + d / 8 * (64 * 128) + (column_bytes ^ swizzle), v[0], v[1], v[2], v[3]);
  }
}

/* The warp's rows that hold an infinity or a NaN which their statistics do not call for: one bit each. */
FA_INLINE unsigned rows_not_finite(float o[O_FRAGS][4], const float factor[2]) {
  unsigned rows = 0;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float zero = 0.0f;
#pragma unroll
    for (int d = 0; d < O_FRAGS; d++) zero += (o[d][2 * r] + o[d][2 * r + 1]) * 0.0f;
    int bad = factor[r] > 0.0f && zero != zero; /* a factor of NaN: the row is due to be NaN */
    for (unsigned lanes = __ballot_sync(0xFFFFFFFFu, bad); lanes; lanes &= lanes - 1) rows |= 1u << ((__ffs(lanes) - 1) / 4 + 8 * r);
  }
  return rows;
}

/* From the slab to out. Packed sequences follow each other, so a box that reaches past the sequence must not be stored as a whole. */
FA_INLINE void store_output(const fa_forward_args *args, const fa_tma_map *out_map, const work *t, int lane, int row0, uint32_t rows_smem) {
  const fa_arg_problem *p = &args->problem;
  fence_proxy_async_shared(); /* what each lane wrote, before the TMA reads it here or overwrites it with the next Q */
  __syncwarp();               /* all lanes have written */
  if (!VARLEN || !p->packed || row0 + 16 <= t->slot_q) {
    if (lane == 0) {
#pragma unroll
      for (int c = 0; c < V_CHUNKS; c++)
        cp_async_bulk_tensor_store(out_map, rows_smem + c * (64 * 128), 64 * c, t->q_start + row0, t->h, p->packed ? 0 : t->b);
      cp_async_bulk_commit_group();
    }
    return;
  }
  char *out_gmem = fa_head_base(&args->out, 2, t->b, t->h, t->q_start);
  for (int i = lane; i < 16 * (DIM_V / 8); i += 32) {
    int row = i / (DIM_V / 8), chunk = i % (DIM_V / 8);
    if (row0 + row >= t->slot_q || 8 * chunk >= p->dim_v) continue;
    uint32_t r[4];
    ld_shared_v4(r, rows_smem + row * 128 + chunk / 8 * (64 * 128) + ((chunk % 8 * 16) ^ (row & 7) << 4));
    *(uint4 *)(out_gmem + ((row0 + row) * args->out.s + 8 * chunk) * 2) = make_uint4(r[0], r[1], r[2], r[3]);
  }
  __syncwarp(); /* all lanes have read before the next Q may come */
}

/* The warp's share of the end: statistics, O, repair. `rows_smem` is where its first row lies. Returns with the stores on their way. */
FA_INLINE void finish(const fa_forward_args *args, const fa_tma_map *out_map, const work *t, int row0, uint32_t rows_smem,
                      float o[O_FRAGS][4], const float max[2], const float sum[2]) {
  const fa_arg_problem *p = &args->problem;
  int lane = laneid();
  float factor[2], sink = fa_sink_of_head(p, t->h);
  char *lse_gmem = fa_head_base(&args->lse, 4, t->b, t->h, t->q_start);
#pragma unroll
  for (int r = 0; r < 2; r++) {
    int row = row0 + (lane >> 2) + 8 * r, used = row < t->len_q;
    float lse = used ? fa_log_sum_exp(max[r], sum[r]) : MINUS_INFINITY;
    factor[r] = sum[r] == 0.0f || !used ? 0.0f : 1.0f / sum[r];
    if (used && sink != MINUS_INFINITY) { /* one more term of the sum, relative to the larger of the two */
      float larger = fmaxf(lse, sink), kept = ex2_approx((lse - larger) * LOG2E), total = kept + ex2_approx((sink - larger) * LOG2E);
      factor[r] *= kept / total;
      lse = larger + __logf(total);
    }
    if (lane % 4 == 0 && row < t->slot_q) ((float *)lse_gmem)[row * args->lse.s] = lse;
  }
  unsigned repair = rows_not_finite(o, factor);
  stage_output(o, factor, lane, rows_smem);
  if (repair) {
    __syncwarp(); /* the rows below are written by other lanes now */
#pragma unroll 1
    for (int i = 0; i < 16; i++) {
      float row_max = __shfl_sync(0xFFFFFFFFu, i < 8 ? max[0] : max[1], i % 8 * 4);
      float row_factor = __shfl_sync(0xFFFFFFFFu, i < 8 ? factor[0] : factor[1], i % 8 * 4);
      if (repair >> i & 1) repair_row(args, t, lane, row0 + i, row_max, row_factor, rows_smem + i * 128);
    }
  }
  store_output(args, out_map, t, lane, row0, rows_smem);
}

/* The warpgroup's rows of one tile. Returns the count of key blocks so far. */
FA_INLINE int attend(const fa_forward_args *args, const fa_tma_map *out_map, const work *t, const place *me, int ring, int turn) {
  const fa_arg_problem *p = &args->problem;
  int q_stage = ring_entry(turn, Q_STAGES), slab = (q_stage * WARPGROUPS + me->w) * SLAB_BYTES;
  int m0 = t->m0 + 64 * me->w, m1 = fa_min(m0 + 64, t->len_q), row0 = m0 + me->warp_row, first, last, n = t->last;
  uint32_t q_smem = me->smem + slab;
  seen_blocks(p, t->len_q, t->len_k, m0, m1, &first, &last);
  int plain_first = 0, plain_end = 0; /* blocks that every row sees whole */
  if (MASKING) {
    fa_range plain = fa_unmasked_keys(p->rule, t->len_q, t->len_k, m0, m1);
    plain_first = fa_ceil_div(plain.lo, BLOCK_N);
    plain_end = fa_max(plain.hi, 0) / BLOCK_N;
  }

  float o[O_FRAGS][4], max[2] = {MINUS_INFINITY, MINUS_INFINITY}, sum[2] = {0.0f, 0.0f};
#pragma unroll 1
  for (; n > last && n >= t->first; n--) let_pass(me, ring++);
  mbarrier_wait_parity(q_full(me->smem, me->w, q_stage), ring_parity(turn, Q_STAGES));
  if (n >= first) {
    uint32_t weights[2 * S_FRAGS];
    int accumulate = 0;
    first_step(p, t, me, q_smem, row0, n--, ring++, weights, max, sum);
#pragma unroll 1
    for (; n >= first; accumulate = 1) {
      int masked = MASKING && (n >= plain_end || n < plain_first);
      step(p, t, me, q_smem, row0, n--, ring++, masked, accumulate, o, weights, max, sum);
    }
    await_v(me, ring - 1);
    issue_values(o, weights, v_smem(me, ring - 1), accumulate);
    sum[0] = fa_quad_sum(sum[0]);
    sum[1] = fa_quad_sum(sum[1]);
    wgmma_wait_group(0);
    wgmma_hold(&o[0][0], 4 * O_FRAGS);
    release_v(me, ring - 1);
  }
#pragma unroll 1
  for (; n >= t->first; n--) let_pass(me, ring++);

  finish(args, out_map, t, row0, q_smem + me->warp_row * 128, o, max, sum);
  if (laneid() == 0) {
    cp_async_bulk_wait_group_read();
    mbarrier_arrive(q_empty(me->smem, me->w, q_stage)); /* the next Q may come */
  }
  return ring;
}

FA_INLINE void consume(const fa_forward_args *args, const fa_schedule *schedule, const fa_tma_map *out_map, uint32_t smem) {
  place me = {smem, uniform((int)threadIdx.x / 128 - 1), uniform((int)threadIdx.x % 128 / 32 * 16), schedule->scale_log2};
  int ring = 0;
  if (PINGPONG && me.w == 0) bar_arrive(TURN_BARRIER, 256); /* the first turn */
#pragma unroll 1
  for (int turn = 0;; turn++) {
    mbarrier_wait_parity(tile_full(me.smem, turn & 1), turn >> 1 & 1);
    work t = receive_tile(&args->problem, me.smem + TILES_OFFSET + (turn & 1) * TILE_BYTES);
    __syncwarp(); /* all lanes have read before the place is given back */
    if (laneid() == 0) mbarrier_arrive(tile_empty(me.smem, turn & 1));
    if (t.b < 0) break;
    ring = attend(args, out_map, &t, &me, ring, turn);
    __syncwarp();
  }
  if (laneid() == 0) cp_async_bulk_wait_group(); /* shared memory must outlive the stores */
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
    setmaxnreg_dec(PRODUCER_REGISTERS);
    if (threadIdx.x < 32) produce(&args.problem, &schedule, &q_map, &k_map, &v_map, smem);
  } else {
    setmaxnreg_inc(CONSUMER_REGISTERS);
    consume(&args, &schedule, &out_map, smem);
  }
}
