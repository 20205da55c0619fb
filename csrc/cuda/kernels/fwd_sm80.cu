/* fwd_sm80.cu: forward attention on mma.sync, for sm_80 and every later GPU; fp16, bf16, and fp32 in three TF32 terms.
 *
 * One CTA computes BLOCK_M query rows of one head; each warp owns BLOCK_M / WARPS of them (16 or 32) and sees every key, so that softmax never
 * leaves a quad of lanes.
 *
 *            keys -->  n       n-1      n-2           each step, for one tile of BLOCK_N keys:
 *          +-------+-------+-------+-------+            S = Q K^T             tensor cores, Q from registers or shared memory
 *   warp 0 |       |       |       |                    mask, softmax         registers; rescale O when a maximum moved
 *   warp 1 |   S   |   S   |   S   |  ...               O += P V              tensor cores, P from the registers of S
 *   ...    |       |       |       |                  at the end: O / sum, lse = max + log(sum)
 *          +-------+-------+-------+-------+
 *
 * Tiles go from the last key to the first: the ragged and the diagonal tiles come first. Those alone are masked element by element, by the warps
 * that need it; a warp skips tiles that none of its rows sees.
 *
 * Shared memory, bytes, in this order (rows swizzled, tile.h):
 *   Q    BLOCK_M * HEAD_DIM * size                 read by its own warp only
 *   K    STAGES * BLOCK_N * HEAD_DIM * size
 *   V    STAGES * BLOCK_N * DIM_V * size
 *   O    in place of all of these, at the end: BLOCK_M * (DIM_V + 8) * 4
 * Loads are cp.async. STAGES == 2: K and V of the next tile arrive during this one, one barrier a tile. STAGES == 1, for small shared memories: V
 * arrives during Q K^T and the next K during softmax and P V, two barriers a tile.
 *
 * Registers a thread: O takes BLOCK_M / WARPS * DIM_V / 32, S takes BLOCK_M / WARPS * BLOCK_N / 32, Q in registers BLOCK_M / WARPS * HEAD_DIM / 64
 * (16 bits); csrc/cuda/tiles.def keeps their sum under about 210 of 255, and the build test refuses spills. What limits: the rate of mma.sync (about 0.62 of what
 * wgmma reaches on sm_90), then the exponential.
 *
 * A weight of 0 times a value of infinity or NaN is NaN, though the pair was masked. Nothing in the loop guards against that: when O
 * holds a NaN at the end, the tile is computed again with the finite values alone, and twice more to find the infinite ones that are due.
 *
 * Constants: DTYPE, HEAD_DIM and DIM_V (padded to 32), BLOCK_M, BLOCK_N, WARPS, STAGES, CTAS (wanted on an SM), Q_REGISTERS, ALIGNED, SCORE (1: any
 * of softcap, bias, mask, ALiBi, a scale that is not positive), DROPOUT.
 */
#define REAL float

#include "mma.h"
#include "score.h"
#include "softmax.h"
#include "visible.h"

#define THREADS (32 * WARPS)
#define WARP_ROWS (BLOCK_M / WARPS)
#define M_FRAGS (WARP_ROWS / 16)
#define N_FRAGS (BLOCK_N / 8)
#define V_FRAGS (DIM_V / 8)
#define QK_STEPS (HEAD_DIM * ELEMENT_BYTES / 32)
#define PV_STEPS (BLOCK_N / FA_STEP_ROWS)
#define Q_ROW_BYTES (HEAD_DIM * ELEMENT_BYTES)
#define V_ROW_BYTES (DIM_V * ELEMENT_BYTES)
#define Q_TILE_BYTES (BLOCK_M * Q_ROW_BYTES)
#define K_TILE_BYTES (BLOCK_N * Q_ROW_BYTES)
#define V_TILE_BYTES (BLOCK_N * V_ROW_BYTES)
#define O_PITCH (DIM_V + 8) /* floats; eight apart, so that the quads of a warp write to different banks */

/* A warp's state. Row r of fragment m is row 16 * m + lane / 4 + 8 * r of the warp. */
typedef struct {
  float o[M_FRAGS][V_FRAGS][4];
  float max[M_FRAGS][2], sum[M_FRAGS][2]; /* sum: this lane's columns only */
  fa_operand_a p[M_FRAGS][PV_STEPS];      /* weights of the tile before, whose values are still to be added */
} warp_state;

/* S = Q K^T */
FA_INLINE void scores(float s[M_FRAGS][N_FRAGS][4], uint32_t q_smem, int warp_row, uint32_t k_smem) {
  int lane = threadIdx.x % 32;
  fa_lane q_lane = fa_lane_rows_first(lane, Q_ROW_BYTES), k_lane = fa_lane_chunks_first(lane, Q_ROW_BYTES);
#pragma unroll
  for (int m = 0; m < M_FRAGS; m++)
#pragma unroll
    for (int n = 0; n < N_FRAGS; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) s[m][n][e] = 0.0f;
#pragma unroll
  for (int step = 0; step < QK_STEPS; step++) {
    fa_operand_a q[M_FRAGS];
#pragma unroll
    for (int m = 0; m < M_FRAGS; m++) {
      fa_load_a(&q[m], q_smem, q_lane, warp_row + 16 * m, step, Q_ROW_BYTES);
      fa_split_a(&q[m]);
    }
#pragma unroll
    for (int n = 0; n < N_FRAGS; n += 2) {
      fa_operand_b k[2];
      fa_load_b_rows(k, k_smem, k_lane, 8 * n, step, Q_ROW_BYTES);
#pragma unroll
      for (int half = 0; half < 2; half++) {
        fa_split_b(&k[half]);
#pragma unroll
        for (int m = 0; m < M_FRAGS; m++) fa_mma(s[m][n + half], &q[m], &k[half]);
      }
    }
  }
}

/* Products become scores, in natural units. One loop a feature, since all but one or two are absent. Pairs outside the sequence have no bias or
 * mask to read, and are masked later. */
FA_INLINE void change_scores(float s[N_FRAGS][4], const fa_arg_problem *p, const fa_score_head *head, const fa_tile *tile, int row0, int n0) {
  int lane = threadIdx.x % 32, column = n0 + 2 * (lane & 3), columns = tile->len_k - column;
#pragma unroll
  for (int n = 0; n < N_FRAGS; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) s[n][e] *= head->scale;
  if (head->softcap != 0.0f) {
    float inverse = 1.0f / head->softcap;
#pragma unroll
    for (int n = 0; n < N_FRAGS; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) s[n][e] = head->softcap * fa_tanh(s[n][e] * inverse);
  }
#pragma unroll
  for (int r = 0; r < 2; r++) {
    int row = row0 + (lane >> 2) + 8 * r, inside = row < tile->len_q ? columns : 0;
    if (head->slope != 0.0f) {
      float distance = (float)(row + head->off - column);
#pragma unroll
      for (int n = 0; n < N_FRAGS; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) s[n][2 * r + e] -= head->slope * fabsf(distance - (float)(8 * n + e));
    }
    if (head->bias) fa_add_bias_row(s, N_FRAGS, r, p, head, row, column, inside);
    if (head->mask) fa_mask_row(s, N_FRAGS, r, p, head, row, column, inside);
  }
}

FA_INLINE void drop_weights(float s[N_FRAGS][4], const fa_arg_problem *p, fa_philox_key key, const fa_tile *tile, int row0, int n0) {
#pragma unroll
  for (int n = 0; n < N_FRAGS; n++) {
    uint32_t word[4];
    fa_fragment_words(key, tile->b, tile->h, row0, n0 + 8 * n, word);
#pragma unroll
    for (int e = 0; e < 4; e++)
      if (word[e] < p->dropout_threshold) s[n][e] = 0.0f;
  }
}

/* O += P V */
FA_INLINE void weigh_values(warp_state *w, uint32_t v_smem) {
  int lane = threadIdx.x % 32;
  fa_lane v_lane = fa_lane_rows_first(lane, V_ROW_BYTES);
#pragma unroll
  for (int step = 0; step < PV_STEPS; step++) {
    fa_operand_a p[M_FRAGS];
#pragma unroll
    for (int m = 0; m < M_FRAGS; m++) {
      p[m] = w->p[m][step];
      fa_split_a(&p[m]);
    }
#pragma unroll
    for (int pair = 0; pair < V_FRAGS / 2; pair++) {
      fa_operand_b v[2];
      fa_load_b_columns(v, v_smem, v_lane, lane, step, pair, V_ROW_BYTES);
#pragma unroll
      for (int half = 0; half < 2; half++) {
        fa_split_b(&v[half]);
#pragma unroll
        for (int m = 0; m < M_FRAGS; m++) fa_mma(w->o[m][2 * pair + half], &p[m], &v[half]);
      }
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

/* A tile of V in shared memory, in place. */
FA_INLINE void reread_values(uint32_t v_smem, int pass) {
#pragma unroll 1
  for (uint32_t at = 4 * threadIdx.x; at < V_TILE_BYTES; at += 4 * THREADS) {
    uint32_t bits = ld_shared_b32(v_smem + at);
    if (DTYPE == FA_ARG_F32)
      bits = reread_element(bits, pass);
    else
      bits = reread_element(bits & 0xFFFFu, pass) | reread_element(bits >> 16, pass) << 16;
    st_shared_b32(v_smem + at, bits);
  }
}

/* ---- one query tile ---- */

/* Scores become weights, in place, and join the sums. Returns whether O has to be rescaled. */
FA_INLINE int weigh_scores(warp_state *w, float s[M_FRAGS][N_FRAGS][4], float to_log2, float rescale[M_FRAGS][2]) {
  int moved = 0;
#pragma unroll
  for (int m = 0; m < M_FRAGS; m++) {
    fa_move_maxima(s[m], N_FRAGS, to_log2, w->max[m], rescale[m]);
    moved |= rescale[m][0] != 1.0f || rescale[m][1] != 1.0f;
  }
#pragma unroll
  for (int m = 0; m < M_FRAGS; m++) {
    w->sum[m][0] *= rescale[m][0];
    w->sum[m][1] *= rescale[m][1];
    fa_weigh(s[m], N_FRAGS, to_log2, w->max[m], w->sum[m]);
  }
  return moved;
}

FA_INLINE void rescale_output(warp_state *w, float rescale[M_FRAGS][2]) {
#pragma unroll
  for (int m = 0; m < M_FRAGS; m++)
#pragma unroll
    for (int d = 0; d < V_FRAGS; d++)
#pragma unroll
      for (int e = 0; e < 4; e++) w->o[m][d][e] *= rescale[m][e >> 1];
}

/* The key tiles of this CTA, [first, last]: those that some row sees, or its split's share of them. */
FA_INLINE void key_tiles(const fa_forward_args *args, const fa_tile *tile, int m1, int *first, int *last) {
  fa_range seen = fa_visited_keys(args->problem.rule, tile->len_q, tile->len_k, tile->m0, m1);
  int begin = fa_max(seen.lo, 0) / BLOCK_N, end = seen.hi <= 0 || m1 <= tile->m0 ? 0 : fa_ceil_div(fa_min(seen.hi, tile->len_k), BLOCK_N);
  int share = fa_ceil_div(fa_max(end - begin, 0), args->splits);
  *first = begin + tile->split * share;
  *last = fa_min(end, *first + share) - 1;
}

/* Walks over the key tiles with O, max and sum in registers. */
FA_INLINE void attend(warp_state *w, const fa_forward_args *args, const fa_tile *tile, uint32_t smem, int pass) {
  const fa_arg_problem *p = &args->problem;
  uint32_t q_smem = smem, k_smem = q_smem + Q_TILE_BYTES, v_smem = k_smem + 2 * K_TILE_BYTES;
  int warp_row = threadIdx.x / 32 * WARP_ROWS, row0 = tile->m0 + warp_row, m1 = fa_min(tile->m0 + BLOCK_M, tile->len_q);
  int warp_m1 = fa_min(row0 + WARP_ROWS, tile->len_q), h_k = tile->h / p->group;
  fa_range warp_seen = fa_visited_keys(p->rule, tile->len_q, tile->len_k, row0, warp_m1);
  fa_range plain = fa_unmasked_keys(p->rule, tile->len_q, tile->len_k, row0, warp_m1);
  if (warp_m1 <= row0) warp_seen.hi = 0;

  const char *k_gmem = fa_head_base(&args->k, ELEMENT_BYTES, tile->b, h_k, tile->k_start);
  const char *v_gmem = fa_head_base(&args->v, ELEMENT_BYTES, tile->b, h_k, tile->k_start);
  int64_t k_stride = args->k.s * ELEMENT_BYTES, v_stride = args->v.s * ELEMENT_BYTES;
#define LOAD_K(n, stage)                                                                                                                   \
  fa_load_tile(k_smem + (stage) * K_TILE_BYTES, k_gmem + (n) * (k_stride * BLOCK_N), &args->k, tile->len_k - (n) * BLOCK_N, p->dim_qk,       \
               BLOCK_N, HEAD_DIM, THREADS)
#define LOAD_V(n, stage)                                                                                                                   \
  fa_load_tile(v_smem + (stage) * V_TILE_BYTES, v_gmem + (n) * (v_stride * BLOCK_N), &args->v, tile->len_k - (n) * BLOCK_N, p->dim_v, BLOCK_N, \
               DIM_V, THREADS)

#pragma unroll
  for (int m = 0; m < M_FRAGS; m++) {
#pragma unroll
    for (int r = 0; r < 2; r++) w->max[m][r] = MINUS_INFINITY, w->sum[m][r] = 0.0f;
#pragma unroll
    for (int d = 0; d < V_FRAGS; d++)
#pragma unroll
      for (int e = 0; e < 4; e++) w->o[m][d][e] = 0.0f;
  }

  int first, last, stage = 0;
  key_tiles(args, tile, m1, &first, &last);
  fa_key_walk walk = fa_walk_keys(p, tile, first, last, BLOCK_N);
  int n = last >= first ? fa_walk_next(&walk) : -1;
  if (n < 0) return;

  fa_score_head head;
  fa_philox_key key;
  if (SCORE) head = fa_score_of_head(p, tile);
  if (DROPOUT) key = fa_dropout_key_of(p);
  float to_log2 = SCORE ? LOG2E : (float)p->scale * LOG2E;

  fa_load_tile(q_smem, fa_head_base(&args->q, ELEMENT_BYTES, tile->b, tile->h, tile->q_start + tile->m0), &args->q, tile->len_q - tile->m0,
               p->dim_qk, BLOCK_M, HEAD_DIM, THREADS);
  LOAD_K(n, 0);
  cp_async_commit_group();

  int pending = 0;
  for (int next; n >= 0; n = next, stage ^= 1) {
    int n0 = n * BLOCK_N, masked = n0 < plain.lo || n0 + BLOCK_N > plain.hi;
    next = fa_walk_next(&walk);
    cp_async_wait_group(0);
    __syncthreads(); /* K(n) and V of the tile before have landed for all; all warps are done with the stages that are filled next */
    if (next >= 0) LOAD_K(next, stage ^ 1);
    LOAD_V(n, stage);
    cp_async_commit_group();
    if (pass != PLAIN) {
      reread_values(v_smem + (stage ^ 1) * V_TILE_BYTES, pass);
      __syncthreads(); /* every warp reads what all have rewritten */
    }
    if (!pending && (n0 >= warp_seen.hi || n0 + BLOCK_N <= warp_seen.lo)) continue;

    float s[M_FRAGS][N_FRAGS][4], rescale[M_FRAGS][2];
    int moved;
    scores(s, q_smem, warp_row, k_smem + stage * K_TILE_BYTES);
#pragma unroll
    for (int m = 0; m < M_FRAGS; m++) {
      if (SCORE) change_scores(s[m], p, &head, tile, row0 + 16 * m, n0);
      if (masked) fa_mask_fragments(s[m], N_FRAGS, p->rule, tile->len_q, tile->len_k, row0 + 16 * m, n0);
    }
    if (pending) { /* one block of straight code, in which exponentials hide behind products */
      moved = weigh_scores(w, s, to_log2, rescale);
      weigh_values(w, v_smem + (stage ^ 1) * V_TILE_BYTES);
    } else {
      moved = weigh_scores(w, s, to_log2, rescale);
    }
    if (__any_sync(0xFFFFFFFFu, moved)) rescale_output(w, rescale);
#pragma unroll
    for (int m = 0; m < M_FRAGS; m++) {
      if (DROPOUT) drop_weights(s[m], p, key, tile, row0 + 16 * m, n0);
#pragma unroll
      for (int step = 0; step < PV_STEPS; step++) fa_whole_operand_from_accumulator(&w->p[m][step], s[m], step);
    }
    pending = 1;
  }
  cp_async_wait_group(0);
  __syncthreads(); /* V of the last tile has landed for all */
  if (pass != PLAIN) {
    reread_values(v_smem + (stage ^ 1) * V_TILE_BYTES, pass);
    __syncthreads(); /* every warp reads what all have rewritten */
  }
  if (pending) weigh_values(w, v_smem + (stage ^ 1) * V_TILE_BYTES);
#undef LOAD_K
#undef LOAD_V
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
#pragma unroll 4
  for (int i = 0; i < rows; i++, at += t->row_stride)
#pragma unroll
    for (int c = 0; c < DIM_V; c += 32)
      if (lane + c < t->dims) store_one(t, at + c * t->dim_stride, o_smem[i * O_PITCH + lane + c]);
}

/* Whole 16-byte chunks: the warp's rows from a tile of out's type in shared memory. */
FA_INLINE void store_chunks(const row_target *t, uint32_t o_smem, int warp_row, int row0, int end) {
  int lane = threadIdx.x % 32, row_chunks = V_ROW_BYTES / 16;
#pragma unroll
  for (int i = 0; i < WARP_ROWS * row_chunks / 32; i++) {
    int row = (lane + 32 * i) / row_chunks, chunk = (lane + 32 * i) % row_chunks;
    uint32_t r[4];
    ld_shared_v4(r, fa_chunk_address(o_smem, warp_row + row, chunk, V_ROW_BYTES));
    if (row0 + row < end && chunk * CHUNK_ELEMENTS < t->dims)
      *(uint4 *)(t->row0_gmem + ((row0 + row) * t->row_stride + chunk * CHUNK_ELEMENTS) * ELEMENT_BYTES) = make_uint4(r[0], r[1], r[2], r[3]);
  }
}

/* One row of a lane's fragments, times `factor`, into a tile of out's type. A factor of 0 makes zeros of everything. */
FA_INLINE void stage_row(uint32_t o_smem, int row, float o[V_FRAGS][4], int r, float factor) {
  int quad = threadIdx.x % 4;
#pragma unroll
  for (int d = 0; d < V_FRAGS; d++) {
    float x = factor == 0.0f ? 0.0f : o[d][2 * r] * factor, y = factor == 0.0f ? 0.0f : o[d][2 * r + 1] * factor;
    if (DTYPE == FA_ARG_F32) {
      uint32_t at = fa_chunk_address(o_smem, row, 2 * d + (quad >> 1), V_ROW_BYTES) + (quad & 1) * 8;
      st_shared_b32(at, __float_as_uint(x));
      st_shared_b32(at + 4, __float_as_uint(y));
    } else {
      st_shared_b32(fa_chunk_address(o_smem, row, d, V_ROW_BYTES) + quad * 4, fa_pack(x, y));
    }
  }
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

/* Divides by the sums and writes out and lse, or this split's part of them, through shared memory. Rows past len_q that have a place in the
 * tensors get 0 and -infinity. */
FA_INLINE void finish(warp_state *w, const fa_forward_args *args, const fa_tile *tile, unsigned char *shared, int pass) {
  const fa_arg_problem *p = &args->problem;
  int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * WARP_ROWS, row0 = tile->m0 + warp_row, partial = args->splits > 1;
  int64_t part = tile->split * fa_statistics_rows(p) + fa_statistics_row(p, tile, 0);
  char *lse_gmem = partial ? (char *)args->partial_lse + part * 4 : fa_head_base(&args->lse, 4, tile->b, tile->h, tile->q_start);
  int64_t lse_stride = partial ? 1 : args->lse.s;
  float sink = partial ? MINUS_INFINITY : fa_sink_of_head(p, tile->h);
  row_target target = {fa_head_base(&args->out, ELEMENT_BYTES, tile->b, tile->h, tile->q_start), args->out.s, args->out.d, p->dim_v,
                       DTYPE == FA_ARG_F32};
  int whole_chunks = !partial && pass <= FINITE && target.dim_stride == 1 && p->dim_v % CHUNK_ELEMENTS == 0 &&
                     target.row_stride % CHUNK_ELEMENTS == 0 && (uint64_t)target.row0_gmem % 16 == 0;
  float *o_smem = (float *)shared + warp_row * O_PITCH;
#pragma unroll
  for (int m = 0; m < M_FRAGS; m++)
#pragma unroll
    for (int r = 0; r < 2; r++) {
      int row = 16 * m + (lane >> 2) + 8 * r, used = row0 + row < tile->len_q;
      float sum = fa_quad_sum(w->sum[m][r]), lse = used ? fa_log_sum_exp(w->max[m][r], sum) : MINUS_INFINITY;
      float factor = sum == 0.0f || !used ? 0.0f : 1.0f / sum;
      if (DROPOUT) factor *= (float)p->keep_scale;
      if (used && sink != MINUS_INFINITY) { /* one more term of the sum, relative to the larger of the two */
        float larger = fmaxf(lse, sink), kept = ex2_approx((lse - larger) * LOG2E), total = kept + ex2_approx((sink - larger) * LOG2E);
        factor *= kept / total;
        lse = larger + __logf(total);
      }
      if (lane % 4 == 0 && row0 + row < tile->slot_q) ((float *)lse_gmem)[(row0 + row) * lse_stride] = lse;
      if (whole_chunks) {
        stage_row(smem_address(shared), warp_row + row, w->o[m], r, factor);
      } else {
#pragma unroll
        for (int d = 0; d < V_FRAGS; d++)
#pragma unroll
          for (int e = 0; e < 2; e++)
            o_smem[row * O_PITCH + 8 * d + 2 * (lane & 3) + e] = factor == 0.0f ? 0.0f : w->o[m][d][2 * r + e] * factor;
      }
    }
  if (partial) {
    row_target f32 = {(char *)args->partial_out + part * p->dim_v * 4, p->dim_v, 1, p->dim_v, 1};
    target = f32;
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
