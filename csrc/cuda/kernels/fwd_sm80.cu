/* fwd_sm80.cu: forward attention on mma.sync, for sm_80 and every later GPU; fp16, bf16, and fp32 in pairs of fp16.
 *
 * One CTA computes BLOCK_M query rows of one head; each warp owns BLOCK_M / WARPS of them (16 or 32) and sees every key, so that softmax never
 * leaves a quad of lanes.
 *
 *            keys -->  n       n-1      n-2           each step, for one tile of BLOCK_N keys:
 *          +-------+-------+-------+-------+            S = Q K^T             tensor cores
 *   warp 0 |       |       |       |                    mask S                only on boundary tiles
 *   warp 1 |   S   |   S   |   S   |  ...               softmax               registers; rescales O
 *   ...    |       |       |       |                    O += P V              tensor cores, P from the registers of S
 *          +-------+-------+-------+-------+            at the end: O / sum, lse = max + log(sum)
 *
 * Tiles go from the last key to the first: the ragged and the diagonal tiles come first. Those alone are masked element by element, by the warps
 * that need it; with two stages a warp skips tiles that none of its rows sees. The grid's second axis cuts wide V and O into columns of
 * DIM_V where O would not fit the registers (fp32 above 128).
 *
 * Shared memory, bytes, in this order (rows swizzled, tile.h; fp32: 4 more for each row, and tiles are split in place when they have landed, split.h):
 *   Q    BLOCK_M * HEAD_DIM * size                 read by its own warp only
 *   K    STAGES * BLOCK_N * HEAD_DIM * size
 *   V    STAGES * BLOCK_N * DIM_V * size
 *   O    in place of all of these, at the end: BLOCK_M * DIM_V * size, or BLOCK_M * (DIM_V + 8) * 4 for rows that are stored by element
 * Loads are cp.async. STAGES == 2: K and V of the next tile arrive during this one, one barrier a tile. STAGES == 1, for small shared memories: V
 * arrives during Q K^T and the next K during softmax and P V, two barriers a tile.
 *
 * Registers a thread: O takes BLOCK_M / WARPS * DIM_V / 32, S takes BLOCK_M / WARPS * BLOCK_N / 32; csrc/cuda/tiles.def keeps their sum at
 * 160 or less of 255. What limits (docs/kernels/fwd_sm80.md): each warp's own string of instructions, since two warps a scheduler hide half of the waiting
 * only; at dims above 128, where a fragment of K or V serves one product, the reads of shared memory. mma.sync itself reaches 640 TFLOP/s on an H200.
 * fp32: instructions that are no products.
 *
 * What it takes, for bf16, equal dims, no feature of its own, compiled by NVRTC 13.0:
 *   sm_80   HEAD_DIM=64   248 registers   49152 bytes
 *   sm_80   HEAD_DIM=128  253 registers   69632 bytes
 *   sm_80   HEAD_DIM=256  248 registers   81920 bytes
 *   sm_120  HEAD_DIM=128  255 registers   69632 bytes
 *
 * A weight of 0 times a value of infinity or NaN is NaN, though the pair was masked. Nothing in the loop guards against that: when O
 * holds a NaN at the end, the tile is computed again with the finite values alone, and twice more to find the infinite ones that are due.
 *
 * Constants: DTYPE, HEAD_DIM and DIM_V (multiples of 32), BLOCK_M, BLOCK_N, WARPS, STAGES, CTAS (wanted on an SM), ALIGNED (tile.h), SCORE (1:
 * any of softcap, bias, mask, ALiBi, a scale that is not positive), DROPOUT, BLOCK_MASK.
 */
#define REAL float

#include "score.h"
#include "softmax.h"
#include "split.h"
#include "visible.h"

#define THREADS (32 * WARPS)
#define WARP_ROWS (BLOCK_M / WARPS)
#define M_FRAGS (WARP_ROWS / 16)
#define N_FRAGS (BLOCK_N / 8)
#define V_FRAGS (DIM_V / 8)
#define QK_STEPS (HEAD_DIM / 16)
#define PV_STEPS (BLOCK_N / FA_STEP_ROWS)
#define STEPS_TOGETHER (DTYPE == FA_ARG_F32 ? 2 : QK_STEPS) /* of Q K^T: unrolled */
#define Q_ROW_BYTES (HEAD_DIM * ELEMENT_BYTES)
#define V_ROW_BYTES (DIM_V * ELEMENT_BYTES)
#define Q_TILE_BYTES (BLOCK_M * (Q_ROW_BYTES + SCALE_BYTES))
#define K_TILE_BYTES (BLOCK_N * (Q_ROW_BYTES + SCALE_BYTES))
#define V_TILE_BYTES (BLOCK_N * (V_ROW_BYTES + SCALE_BYTES))
#define Q_SCALES (BLOCK_M * Q_ROW_BYTES) /* in a tile */
#define K_SCALES (BLOCK_N * Q_ROW_BYTES)
#define V_SCALES (BLOCK_N * V_ROW_BYTES)
/* Q stays in registers where O and S leave room: a third fewer reads of shared memory in Q K^T at dim 64. */
#define KEEP_Q (DTYPE != FA_ARG_F32 && !SCORE && !DROPOUT && M_FRAGS * QK_STEPS * 4 <= 32 && DIM_V <= 64)
#define COLUMN0 ((int)blockIdx.y * DIM_V) /* first column of V and O of this CTA */
#define O_PITCH (DIM_V + 8)               /* floats; eight apart, so that the quads of a warp write to different banks */

/* A warp's state. Row r of fragment m is row 16 * m + lane / 4 + 8 * r of the warp. */
typedef struct {
  float o[M_FRAGS][V_FRAGS][4];
  float max[M_FRAGS][2], sum[M_FRAGS][2]; /* sum: this lane's columns only */
} warp_state;

/* This lane. In fp32 opaque, since a product has so many addresses that carrying them around the loop takes registers that O needs. */
FA_INLINE int product_lane() { return DTYPE == FA_ARG_F32 ? (int)fa_opaque(threadIdx.x % 32) : (int)threadIdx.x % 32; }

/* What the steps over the key tiles share. */
typedef struct {
  const fa_forward_args *args;
  const fa_tile *tile;
  uint32_t q_smem, k_smem, v_smem;
  const char *k_gmem, *v_gmem; /* key 0 of the sequence */
  int warp_row, row0;          /* the warp's first row: in the tile, in the sequence */
  float to_log2;
  fa_operand_a q[KEEP_Q ? QK_STEPS : 1][M_FRAGS]; /* Q, where it stays in registers */
} walk_state;

/* The warp's rows of one step of Q. */
FA_INLINE void load_q(fa_operand_a q[M_FRAGS], const walk_state *a, fa_lane q_lane, int step) {
#pragma unroll
  for (int m = 0; m < M_FRAGS; m++) fa_load_a(&q[m], a->q_smem, q_lane, a->warp_row + 16 * m, step, Q_ROW_BYTES);
}

FA_INLINE void clear(float c[][4], int count) {
#pragma unroll
  for (int i = 0; i < count; i++)
#pragma unroll
    for (int e = 0; e < 4; e++) c[i][e] = 0.0f;
}

/* S += steps `first` to first + STEPS_TOGETHER - 1 of Q K^T */
FA_INLINE void add_scores(float s[M_FRAGS][N_FRAGS][4], const walk_state *a, uint32_t k_smem, int first) {
  int lane = product_lane();
  fa_lane q_lane = fa_lane_rows_first(lane, Q_ROW_BYTES), k_lane = fa_lane_chunks_first(lane, Q_ROW_BYTES);
#pragma unroll
  for (int i = 0; i < STEPS_TOGETHER; i++) {
    int step = first + i;
    fa_operand_a loaded[M_FRAGS];
    const fa_operand_a *q = KEEP_Q ? a->q[i] : loaded;
    if (!KEEP_Q) load_q(loaded, a, q_lane, step);
#pragma unroll
    for (int n = 0; n < N_FRAGS; n += 2) {
      fa_operand_b k[2];
      fa_load_b_rows(k, k_smem, k_lane, 8 * n, step, Q_ROW_BYTES);
#pragma unroll
      for (int half = 0; half < 2; half++) {
#pragma unroll
        for (int m = 0; m < M_FRAGS; m++) fa_mma(s[m][n + half], &q[m], &k[half]);
      }
    }
  }
}

/* S = Q K^T */
FA_INLINE void scores(float s[M_FRAGS][N_FRAGS][4], const walk_state *a, uint32_t k_smem) {
#pragma unroll
  for (int m = 0; m < M_FRAGS; m++) clear(s[m], N_FRAGS);
#pragma unroll 1
  for (int first = 0; first < QK_STEPS; first += STEPS_TOGETHER) add_scores(s, a, k_smem, first);
  fa_scale_products(s[0], M_FRAGS, N_FRAGS, a->q_smem + Q_SCALES + a->warp_row * 4, k_smem + K_SCALES);
}

FA_INLINE void drop_weights(float s[N_FRAGS][4], const fa_arg_problem *p, fa_philox_key key, const fa_tile *tile, int row0, int n0) {
#pragma unroll
  for (int n = 0; n < N_FRAGS; n++) {
    uint32_t word[4];
    fa_fragment_words(key, tile->b, tile->h, row0 + (int)(threadIdx.x % 32 / 4), n0 + 8 * n, word);
#pragma unroll
    for (int e = 0; e < 4; e++)
      if (word[e] < p->dropout_threshold) s[n][e] = 0.0f;
  }
}

/* O += P V, step by step: the first products wait for the first weights alone. */
FA_INLINE void weigh_values(float o[M_FRAGS][V_FRAGS][4], float s[M_FRAGS][N_FRAGS][4], uint32_t v_smem) {
  int lane = threadIdx.x % 32;
  fa_lane v_lane = fa_lane_rows_first(lane, V_ROW_BYTES);
#pragma unroll
  for (int step = 0; step < PV_STEPS; step++) {
    fa_operand_a p[M_FRAGS];
#pragma unroll
    for (int m = 0; m < M_FRAGS; m++) fa_operand_from_accumulator(&p[m], s[m], step);
#pragma unroll
    for (int pair = 0; pair < V_FRAGS / 2; pair++) {
      fa_operand_b v[2];
      fa_load_b_columns(v, v_smem, v_lane, step, pair, V_ROW_BYTES);
#pragma unroll
      for (int half = 0; half < 2; half++)
#pragma unroll
        for (int m = 0; m < M_FRAGS; m++) fa_mma_chain(o[m][2 * pair + half], &p[m], &v[half]);
    }
  }
}

/* The same in fp32, columns by columns: tensor cores sum a whole tile, which is added to O once. */
FA_INLINE void weigh_values_f32(float o[M_FRAGS][V_FRAGS][4], float s[M_FRAGS][N_FRAGS][4], uint32_t v_smem) {
  int lane = product_lane();
  fa_lane v_lane = fa_lane_rows_first(lane, V_ROW_BYTES);
  fa_operand_a p[M_FRAGS][PV_STEPS];
  float back[M_FRAGS][2];
#pragma unroll
  for (int m = 0; m < M_FRAGS; m++) fa_split_accumulators(p[m], s[m], PV_STEPS, v_smem + V_SCALES, back[m]);
#pragma unroll
  for (int pair = 0; pair < V_FRAGS / 2; pair++) {
    float chain[M_FRAGS][2][4];
#pragma unroll
    for (int m = 0; m < M_FRAGS; m++) clear(chain[m], 2);
#pragma unroll
    for (int step = 0; step < PV_STEPS; step++) {
      fa_operand_b v[2];
      fa_load_b_columns(v, v_smem, v_lane, step, pair, V_ROW_BYTES);
#pragma unroll
      for (int half = 0; half < 2; half++)
#pragma unroll
        for (int m = 0; m < M_FRAGS; m++) fa_mma_chain(chain[m][half], &p[m][step], &v[half]);
    }
#pragma unroll
    for (int m = 0; m < M_FRAGS; m++)
#pragma unroll
      for (int half = 0; half < 2; half++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          float *sum = &o[m][2 * pair + half][e];
          *sum = __fmaf_rn(chain[m][half][e], back[m][e >> 1], *sum);
        }
  }
}

/* ---- infinite and NaN values ----
 *
 * When O of the plain pass holds a NaN, three more passes over the keys find out where it is due, each with another reading of V. */
enum { PLAIN = 0, FINITE, ABOVE, BELOW, PASSES };

/* One element of V as a pass reads it: FINITE turns infinity and NaN into 0; ABOVE is 1 for +infinity and NaN, BELOW for -infinity and NaN, else 0. */
FA_INLINE uint32_t reread_element(uint32_t bits, int pass) {
  uint32_t exponent = DTYPE == FA_ARG_F32 ? 0x7F800000u : DTYPE == FA_ARG_BF16 ? 0x7F80u : 0x7C00u;
  uint32_t sign = DTYPE == FA_ARG_F32 ? 0x80000000u : 0x8000u;
  uint32_t one = DTYPE == FA_ARG_F32 ? 0x3F800000u : DTYPE == FA_ARG_BF16 ? 0x3F80u : 0x3C00u;
  int finite = (bits & exponent) != exponent;
  if (pass == FINITE) return finite ? bits : 0;
  return !finite && bits != (pass == ABOVE ? exponent | sign : exponent) ? one : 0;
}

/* A tile of V in shared memory, in place, by all threads. */
FA_INLINE void reread_values(uint32_t v_smem, int pass) {
#pragma unroll 1
  for (uint32_t at = 4 * threadIdx.x; at < V_SCALES; at += 4 * THREADS) {
    uint32_t bits = ld_shared_b32(v_smem + at);
    if (DTYPE == FA_ARG_F32)
      bits = reread_element(bits, pass);
    else
      bits = reread_element(bits & 0xFFFFu, pass) | reread_element(bits >> 16, pass) << 16;
    st_shared_b32(v_smem + at, bits);
  }
  __syncthreads(); /* every warp reads what all have rewritten */
}

/* ---- one query tile ---- */

/* Moves the running maxima to where they are, and with them the sums and O. */
FA_INLINE void move_maxima(warp_state *w, float s[M_FRAGS][N_FRAGS][4], float to_log2) {
#pragma unroll
  for (int m = 0; m < M_FRAGS; m++) {
    float rescale[2];
    fa_move_maxima(s[m], N_FRAGS, to_log2, w->max[m], rescale);
#pragma unroll
    for (int r = 0; r < 2; r++) w->sum[m][r] *= rescale[r];
#pragma unroll
    for (int d = 0; d < V_FRAGS; d++)
#pragma unroll
      for (int e = 0; e < 4; e++) w->o[m][d][e] *= rescale[e >> 1];
  }
}

/* Scores become weights, in place. Lanes exchange maxima only when a vote says that one has to move. */
FA_INLINE void weigh_scores(warp_state *w, float s[M_FRAGS][N_FRAGS][4], float to_log2) {
  int stay = 1;
#pragma unroll
  for (int m = 0; m < M_FRAGS; m++) stay &= fa_maxima_may_stay(s[m], N_FRAGS, to_log2, w->max[m]);
  if (!__all_sync(0xFFFFFFFFu, stay)) move_maxima(w, s, to_log2);
#pragma unroll
  for (int m = 0; m < M_FRAGS; m++) fa_weigh(s[m], N_FRAGS, to_log2, w->max[m], w->sum[m]);
}

/* The key tiles of this CTA, [first, last]: those that some row sees, or its split's share of them. */
FA_INLINE void key_tiles(const fa_forward_args *args, const fa_tile *tile, int m1, int *first, int *last) {
  fa_range seen = fa_visited_keys(args->problem.rule, tile->len_q, tile->len_k, tile->m0, m1);
  int begin = fa_max(seen.lo, 0) / BLOCK_N, end = seen.hi <= 0 || m1 <= tile->m0 ? 0 : fa_ceil_div(fa_min(seen.hi, tile->len_k), BLOCK_N);
  int share = fa_ceil_div(fa_max(end - begin, 0), args->splits);
  *first = begin + tile->split * share;
  *last = fa_min(end, *first + share) - 1;
}

FA_INLINE void load_k(const walk_state *a, int n, int stage) {
  const fa_arg_view *k = &a->args->k;
  fa_load_tile(a->k_smem + stage * K_TILE_BYTES, a->k_gmem + n * (k->s * (BLOCK_N * ELEMENT_BYTES)), k, a->tile->len_k - n * BLOCK_N,
               a->args->problem.dim_qk, BLOCK_N, HEAD_DIM, THREADS);
}

FA_INLINE void load_v(const walk_state *a, int n, int stage) {
  const fa_arg_view *v = &a->args->v;
  fa_load_tile(a->v_smem + stage * V_TILE_BYTES, a->v_gmem + n * (v->s * (BLOCK_N * ELEMENT_BYTES)), v, a->tile->len_k - n * BLOCK_N,
               a->args->problem.dim_v - COLUMN0, BLOCK_N, DIM_V, THREADS);
}

/* V of this stage, once it has landed for this thread; a barrier must follow. */
FA_INLINE void prepare_values(const walk_state *a, int stage, int pass) {
  uint32_t v_smem = a->v_smem + stage * V_TILE_BYTES;
  if (pass != PLAIN) {
    __syncthreads(); /* V has landed for all: a thread rewrites other elements than it has loaded */
    reread_values(v_smem, pass);
  }
  fa_split_tile(v_smem, BLOCK_N, DIM_V, THREADS);
}

/* Waits for this tile and starts the loads of the next; afterwards K(n) is there, and with two stages V(n). */
FA_INLINE void begin_step(const walk_state *a, int n, int next, int stage, int pass) {
  cp_async_wait_group(0);
  fa_split_tile(a->k_smem + stage * K_TILE_BYTES, BLOCK_N, HEAD_DIM, THREADS);
  if (STAGES == 2) prepare_values(a, stage, pass);
  __syncthreads(); /* the loads have landed for all; all warps are done with the stage that is filled next */
  if (STAGES == 1) {
    load_v(a, n, 0);
  } else if (next >= 0) {
    load_k(a, next, stage ^ 1);
    load_v(a, next, stage ^ 1);
  }
  cp_async_commit_group();
}

/* With one stage: afterwards V(n) is there. */
FA_INLINE void middle_of_step(const walk_state *a, int next, int pass) {
  if (STAGES == 1) {
    cp_async_wait_group(0);
    prepare_values(a, 0, pass);
    __syncthreads(); /* V(n) has landed for all; all warps are done with K(n) */
    if (next >= 0) load_k(a, next, 0);
    cp_async_commit_group();
  }
}

/* One tile of keys. `whole`: every row of the CTA sees all of it. */
FA_INLINE void key_step(warp_state *w, const walk_state *a, const fa_score_head *head, fa_philox_key key, int n, int next, int stage,
                        int whole, int pass) {
  const fa_arg_problem *p = &a->args->problem;
  const fa_tile *tile = a->tile;
  int lane = threadIdx.x % 32, n0 = n * BLOCK_N;
  float s[M_FRAGS][N_FRAGS][4];

  begin_step(a, n, next, stage, pass);
  if (STAGES == 2 && !whole) { /* no barrier is left in this step; with one stage the tile is computed and masked as a whole */
    int row1 = fa_min(a->row0 + WARP_ROWS, tile->len_q);
    fa_range visited = fa_visited_keys(p->rule, tile->len_q, tile->len_k, a->row0, row1);
    if (a->row0 >= row1 || n0 >= visited.hi || n0 + BLOCK_N <= visited.lo) return;
  }
  scores(s, a, a->k_smem + stage * K_TILE_BYTES);
  middle_of_step(a, next, pass);
#pragma unroll
  for (int m = 0; m < M_FRAGS; m++) {
    if (SCORE) fa_change_scores(s[m], 0, N_FRAGS, p, head, tile->len_q, tile->len_k, a->row0 + 16 * m + lane / 4, n0 + 2 * (lane & 3));
    if (!whole) fa_mask_fragments(s[m], N_FRAGS, p->rule, tile->len_q, tile->len_k, a->row0 + 16 * m, n0);
  }
  weigh_scores(w, s, a->to_log2);
#pragma unroll
  for (int m = 0; m < M_FRAGS; m++)
    if (DROPOUT) drop_weights(s[m], p, key, tile, a->row0 + 16 * m, n0);
  if (DTYPE == FA_ARG_F32)
    weigh_values_f32(w->o, s, a->v_smem + stage * V_TILE_BYTES);
  else
    weigh_values(w->o, s, a->v_smem + stage * V_TILE_BYTES);
}

/* Walks over the key tiles with O, max and sum in registers. */
FA_INLINE void attend(warp_state *w, const fa_forward_args *args, const fa_tile *tile, uint32_t smem, int pass) {
  const fa_arg_problem *p = &args->problem;
#pragma unroll
  for (int m = 0; m < M_FRAGS; m++) {
#pragma unroll
    for (int r = 0; r < 2; r++) w->max[m][r] = MINUS_INFINITY, w->sum[m][r] = 0.0f;
    clear(w->o[m], V_FRAGS);
  }

  int first, last, stage = 0, m1 = fa_min(tile->m0 + BLOCK_M, tile->len_q);
  key_tiles(args, tile, m1, &first, &last);
  fa_key_walk walk;
  if (BLOCK_MASK) walk = fa_walk_keys(p, tile, first, last, BLOCK_N);
  int n = last < first ? -1 : BLOCK_MASK ? fa_walk_next(&walk) : last;
  if (n < 0) return;

  int h_k = tile->h / p->group, warp_row = threadIdx.x / 32 * WARP_ROWS;
  walk_state a = {args, tile, smem, smem + Q_TILE_BYTES, smem + Q_TILE_BYTES + STAGES * K_TILE_BYTES};
  a.k_gmem = fa_head_base(&args->k, ELEMENT_BYTES, tile->b, h_k, tile->k_start);
  a.v_gmem = fa_head_base(&args->v, ELEMENT_BYTES, tile->b, h_k, tile->k_start) + COLUMN0 * args->v.d * ELEMENT_BYTES;
  a.warp_row = warp_row, a.row0 = tile->m0 + warp_row;
  a.to_log2 = SCORE ? LOG2E : (float)p->scale * LOG2E;
  fa_score_head head;
  fa_philox_key key;
  if (SCORE) head = fa_score_of_head(p, tile);
  if (DROPOUT) key = fa_dropout_key_of(p);

  fa_load_tile(a.q_smem, fa_head_base(&args->q, ELEMENT_BYTES, tile->b, tile->h, tile->q_start + tile->m0), &args->q,
               tile->len_q - tile->m0, p->dim_qk, BLOCK_M, HEAD_DIM, THREADS);
  if (KEEP_Q) cp_async_commit_group();
  load_k(&a, n, 0);
  if (STAGES == 2) load_v(&a, n, 0);
  cp_async_commit_group();
  if (DTYPE == FA_ARG_F32) {
    cp_async_wait_group(0);
    fa_split_tile(a.q_smem, BLOCK_M, HEAD_DIM, THREADS);
  }
  if (KEEP_Q) {
    cp_async_wait_group(1);
    __syncthreads(); /* Q has landed for all */
    fa_lane q_lane = fa_lane_rows_first(product_lane(), Q_ROW_BYTES);
#pragma unroll
    for (int step = 0; step < QK_STEPS; step++) load_q(a.q[KEEP_Q ? step : 0], &a, q_lane, step);
  }

  /* Tiles [lo, hi) are visible as a whole, to all rows. */
  fa_range unmasked = fa_unmasked_keys(p->rule, tile->len_q, tile->len_k, tile->m0, m1);
  int lo = (fa_max(unmasked.lo, 0) + BLOCK_N - 1) / BLOCK_N, hi = fa_max(unmasked.hi, 0) / BLOCK_N;
  while (n >= 0) {
    int next = BLOCK_MASK ? fa_walk_next(&walk) : n > first ? n - 1 : -1;
    key_step(w, &a, &head, key, n, next, stage, n >= lo && n < hi, pass);
    if (STAGES == 2) stage ^= 1;
    n = next;
  }
}

FA_INLINE int has_nan(warp_state *w) {
  int found = 0;
#pragma unroll
  for (int m = 0; m < M_FRAGS; m++)
#pragma unroll
    for (int d = 0; d < V_FRAGS; d++)
#pragma unroll
      for (int e = 0; e < 4; e++) found |= w->o[m][d][e] != w->o[m][d][e];
  return found;
}

/* Where the rows of O go: out, or this split's partial result in f32. */
typedef struct {
  char *row0_gmem; /* row 0 of the sequence */
  int64_t row_stride, dim_stride;
  int dims, is_f32;
} row_target;

FA_INLINE void store_one(const row_target *t, int64_t at, float x) {
  if (t->is_f32)
    ((float *)t->row0_gmem)[at] = x;
  else
    ((uint16_t *)t->row0_gmem)[at] = (uint16_t)fa_pack(x, 0.0f);
}

/* Any strides: the warp's rows from f32 in shared memory, element by element. */
FA_INLINE void store_rows(const row_target *t, const float *o_smem, int row0, int end) {
  int lane = threadIdx.x % 32, rows = fa_min(WARP_ROWS, end - row0);
  int64_t at = row0 * t->row_stride + lane * t->dim_stride;
#pragma unroll 2
  for (int i = 0; i < rows; i++, at += t->row_stride)
#pragma unroll
    for (int c = 0; c < DIM_V; c += 32)
      if (lane + c < t->dims) store_one(t, at + c * t->dim_stride, o_smem[i * O_PITCH + lane + c]);
}

/* Whole 16-byte chunks: the warp's rows from a tile of out's type in shared memory. */
FA_INLINE void store_chunks(const row_target *t, uint32_t o_smem, int warp_row, int row0, int end) {
  int lane = threadIdx.x % 32, row_chunks = V_ROW_BYTES / 16;
#pragma unroll 4
  for (int i = 0; i < WARP_ROWS * row_chunks / 32; i++) {
    int row = (lane + 32 * i) / row_chunks, chunk = (lane + 32 * i) % row_chunks;
    uint32_t r[4];
    ld_shared_v4(r, fa_chunk_address(o_smem, warp_row + row, chunk, V_ROW_BYTES));
    if (row0 + row < end && chunk * CHUNK_ELEMENTS < t->dims)
      *(uint4 *)(t->row0_gmem + ((row0 + row) * t->row_stride + chunk * CHUNK_ELEMENTS) * ELEMENT_BYTES) =
          make_uint4(r[0], r[1], r[2], r[3]);
  }
}

/* Fragment m of O into a tile of out's type. */
FA_INLINE void stage_chunks(uint32_t o_smem, int row, float o[V_FRAGS][4]) {
  int quad = threadIdx.x % 4;
#pragma unroll
  for (int d = 0; d < V_FRAGS; d++) {
    int chunk = DTYPE == FA_ARG_F32 ? 2 * d + (quad >> 1) : d, byte = DTYPE == FA_ARG_F32 ? (quad & 1) * 8 : quad * 4;
    uint32_t at = fa_chunk_address(o_smem, row, chunk, V_ROW_BYTES) + byte;
#pragma unroll
    for (int r = 0; r < 2; r++) { /* rows 8 apart are swizzled alike */
      float x = o[d][2 * r], y = o[d][2 * r + 1];
      st_shared_b32(at + 8 * r * V_ROW_BYTES, DTYPE == FA_ARG_F32 ? __float_as_uint(x) : fa_pack(x, y));
      if (DTYPE == FA_ARG_F32) st_shared_b32(at + 8 * r * V_ROW_BYTES + 4, __float_as_uint(y));
    }
  }
}

/* Fragment m of O as f32, row after row. */
FA_INLINE void stage_rows(float *o_smem, float o[V_FRAGS][4]) {
  int lane = threadIdx.x % 32;
#pragma unroll
  for (int d = 0; d < V_FRAGS; d++)
#pragma unroll
    for (int e = 0; e < 4; e++) o_smem[(8 * (e >> 1) + lane / 4) * O_PITCH + 8 * d + 2 * (lane & 3) + (e & 1)] = o[d][e];
}

/* Passes ABOVE and BELOW: an infinity where O, a sum of weights of infinite values, is positive. A lane touches what it has stored itself. */
FA_INLINE void store_infinities(const row_target *t, const float *o_smem, int row0, int end, int pass) {
  int lane = threadIdx.x % 32, rows = fa_min(WARP_ROWS, end - row0);
#pragma unroll 1
  for (int i = 0; i < rows; i++)
#pragma unroll 1
    for (int column = lane; column < t->dims; column += 32) {
      int64_t at = (row0 + i) * t->row_stride + column * t->dim_stride;
      if (!(o_smem[i * O_PITCH + column] > 0.0f)) continue;
      float before = fa_load_f32(t->row0_gmem, t->is_f32 ? FA_ARG_F32 : DTYPE, at);
      store_one(t, at, pass == ABOVE ? before - MINUS_INFINITY : before + MINUS_INFINITY);
    }
}

/* Row r of fragment m is finished: O is divided by its sum, and its lse is returned. Rows past len_q count as rows that have seen nothing: O
 * becomes 0 whatever it was, and lse -infinity. */
FA_INLINE float finish_row(warp_state *w, int m, int r, int used, float sink, float keep_scale) {
  float sum = fa_quad_sum(w->sum[m][r]), lse = used ? fa_log_sum_exp(w->max[m][r], sum) : MINUS_INFINITY;
  float factor = sum == 0.0f || !used ? 0.0f : keep_scale * (DTYPE == FA_ARG_F32 ? 1.0f / sum : __fdividef(1.0f, sum));
  if (used && sink != MINUS_INFINITY) { /* one more term of the sum, relative to the larger of the two */
    float larger = fmaxf(lse, sink), kept = ex2_approx((lse - larger) * LOG2E), total = kept + ex2_approx((sink - larger) * LOG2E);
    factor *= kept / total;
    lse = larger + __logf(total);
  }
#pragma unroll
  for (int d = 0; d < V_FRAGS; d++)
#pragma unroll
    for (int e = 2 * r; e < 2 * r + 2; e++) w->o[m][d][e] = factor == 0.0f ? 0.0f : w->o[m][d][e] * factor;
  return lse;
}

/* Where out, or this split's part of it, goes. */
FA_INLINE row_target find_target(const fa_forward_args *args, const fa_tile *tile, int64_t part) {
  int dims = fa_min(args->problem.dim_v - COLUMN0, DIM_V);
  if (args->splits > 1) {
    row_target f32 = {(char *)args->partial_out + (part * args->problem.dim_v + COLUMN0) * 4, args->problem.dim_v, 1, dims, 1};
    return f32;
  }
  char *out_gmem = fa_head_base(&args->out, ELEMENT_BYTES, tile->b, tile->h, tile->q_start) + COLUMN0 * args->out.d * ELEMENT_BYTES;
  row_target out = {out_gmem, args->out.s, args->out.d, dims, DTYPE == FA_ARG_F32};
  return out;
}

/* Writes out and lse, or this split's part of them, through shared memory. Rows past len_q that have a place in the tensors are written too. */
FA_INLINE void finish(warp_state *w, const fa_forward_args *args, const fa_tile *tile, unsigned char *shared, int pass) {
  const fa_arg_problem *p = &args->problem;
  int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * WARP_ROWS, row0 = tile->m0 + warp_row, partial = args->splits > 1;
  int64_t part = tile->split * fa_statistics_rows(p) + fa_statistics_row(p, tile, 0);
  char *lse_gmem = partial ? (char *)args->partial_lse + part * 4 : fa_head_base(&args->lse, 4, tile->b, tile->h, tile->q_start);
  int64_t lse_stride = partial ? 1 : args->lse.s;
  float sink = partial ? MINUS_INFINITY : fa_sink_of_head(p, tile->h), keep_scale = DROPOUT ? (float)p->keep_scale : 1.0f;
  row_target target = find_target(args, tile, part);
  int whole_chunks = !partial && pass <= FINITE && target.dim_stride == 1 && target.dims % CHUNK_ELEMENTS == 0 &&
                     target.row_stride % CHUNK_ELEMENTS == 0 && (uint64_t)target.row0_gmem % 16 == 0;
  float *o_smem = (float *)shared + warp_row * O_PITCH;
#pragma unroll
  for (int m = 0; m < M_FRAGS; m++) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      int row = row0 + 16 * m + (lane >> 2) + 8 * r;
      float lse = finish_row(w, m, r, row < tile->len_q, sink, keep_scale);
      if (lane % 4 == 0 && row < tile->slot_q) ((float *)lse_gmem)[row * lse_stride] = lse;
    }
    if (whole_chunks)
      stage_chunks(smem_address(shared), warp_row + 16 * m + (lane >> 2), w->o[m]);
    else
      stage_rows(o_smem + 16 * m * O_PITCH, w->o[m]);
  }
  __syncwarp(); /* a warp reads back its own rows only; all warps of a CTA use the same one of the two layouts */
  if (whole_chunks)
    store_chunks(&target, smem_address(shared), warp_row, row0, tile->slot_q);
  else if (pass <= FINITE)
    store_rows(&target, o_smem, row0, tile->slot_q);
  else
    store_infinities(&target, o_smem, row0, tile->slot_q, pass);
}

extern "C" __global__ void __launch_bounds__(THREADS, CTAS) fwd_sm80(const __grid_constant__ fa_forward_args args) {
  extern __shared__ __align__(128) unsigned char shared[];
  fa_tile tile;
  if (!fa_find_query_tile(&args.problem, args.tiles, args.splits, BLOCK_M, &tile)) return;
#pragma unroll 1
  for (int pass = PLAIN; pass < PASSES; pass++) {
    warp_state w;
    attend(&w, &args, &tile, smem_address(shared), pass);
    /* The barrier inside the vote also keeps every warp from refilling shared memory that another still reads. */
    int again = __syncthreads_or(pass == PLAIN && has_nan(&w));
    if (pass == PLAIN && again) continue;
    fa_find_query_tile(&args.problem, args.tiles, args.splits, BLOCK_M, &tile); /* found anew, to hold no registers until here */
    finish(&w, &args, &tile, shared, pass);
    if (pass == PLAIN) break;
    __syncthreads(); /* O has left shared memory before the next pass fills it */
  }
}
