/* gradient_sm90.h: what the two Hopper backward kernels for wide heads have in common: loads by the TMA, rows of a gradient to global memory, and the
 * repair of rows that are not finite.
 *
 * A weight of 0 times a value of infinity or NaN is NaN, though the pair was masked. Nothing in the loops guards against that: rows of a gradient
 * that are not finite are computed again, one at a time, from their visible pairs alone.
 *
 * Expects DTYPE, HEAD_DIM and DIM_V (multiples of 64).
 */
#ifndef FA_GRADIENT_SM90_H
#define FA_GRADIENT_SM90_H

#define SCORE 0
#define DROPOUT 0

#include "gradient_mma.h"
#include "ptx_sm90.h"

#define QK_CHUNKS (HEAD_DIM / 64)
#define V_CHUNKS (DIM_V / 64)
#define BOX_ROWS 64 /* of every tensor map */
#define QK_BYTES (BOX_ROWS * 128 * QK_CHUNKS)
#define V_BYTES (BOX_ROWS * 128 * V_CHUNKS)
#define MOST_COLUMNS (HEAD_DIM > DIM_V ? HEAD_DIM : DIM_V)
#define COLUMNS_OF_LANE (MOST_COLUMNS / 32)

#define S_FRAGS (BOX_ROWS / 8) /* of S and dP of a warpgroup: 64 rows by 64 columns */
DEFINE_WGMMA_SS(wgmma_scores, 64, 0, 0)

/* Use number i of a ring is of entry i % size, in phase i / size. */
FA_INLINE int parity(int i, int size) { return (unsigned)i / (unsigned)size & 1; }

/* Tells the compiler that a value is the same in all lanes: descriptors made from it live in uniform registers, where wgmma wants them. */
FA_INLINE int same_in_warp(uint32_t x) { return (int)__shfl_sync(0xFFFFFFFFu, x, 0); }

/* BOX_ROWS rows of a matrix from `row` on, in chunks of 64 columns. */
FA_INLINE void load_chunks(uint32_t dst_smem, const fa_tma_map *map, uint32_t full, int chunks, int row, int h, int b) {
#pragma unroll 1
  for (int c = 0; c < chunks; c++) cp_async_bulk_tensor_load(dst_smem + c * BOX_ROWS * 128, map, full, 64 * c, row, h, b);
}

/* The same, announced to the barrier together with `bytes` more. */
FA_INLINE void load_box(uint32_t dst_smem, const fa_tma_map *map, uint32_t full, int chunks, int row, int h, int b, int bytes) {
  mbarrier_arrive_expect_tx(full, chunks * BOX_ROWS * 128 + bytes);
  load_chunks(dst_smem, map, full, chunks, row, h, b);
}

/* CTAs that share a head walk through it side by side, so each step would wait for memory. They ask for the rows of the step after the next ahead of time,
 * half of the CTAs for each. */
#define STEPS_AHEAD 2
FA_INLINE int asks_ahead(int step, int tile) { return (step + tile) % 2 == 0; }

FA_INLINE void prefetch_chunks(const fa_tma_map *map, int chunks, int row, int h, int b) {
#pragma unroll 1
  for (int c = 0; c < chunks; c++) cp_async_bulk_prefetch_tensor(map, 64 * c, row, h, b);
}

/* All lanes of the warp have done with what the barrier guards. */
FA_INLINE void arrive_as_warp(uint32_t bar) {
  __syncwarp();
  if (laneid() == 0) mbarrier_arrive(bar);
}

/* d = A B^T of two boxes, in the background: S of K and Q, dP of V and dO. */
FA_INLINE void issue_scores(float d[S_FRAGS][4], uint32_t a_smem, uint32_t b_smem, int dims) {
  uint32_t a = same_in_warp(wgmma_start(a_smem, 16)), b = same_in_warp(wgmma_start(b_smem, 16));
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < dims / 16; k++) {
    int offset = k / 4 * (BOX_ROWS * 128) + k % 4 * 32;
    wgmma_scores(&d[0][0], wgmma_descriptor(a, offset), wgmma_descriptor(b, offset), k > 0);
  }
  wgmma_commit_group();
}

/* Accumulators as the left operand of the next product. */
FA_INLINE void pack_all(uint32_t a[2 * S_FRAGS], float s[S_FRAGS][4]) {
#pragma unroll
  for (int n = 0; n < S_FRAGS; n++) {
    a[2 * n] = fa_pack(s[n][0], s[n][1]);
    a[2 * n + 1] = fa_pack(s[n][2], s[n][3]);
  }
}

/* Two 16-bit elements as floats. */
FA_INLINE void unpack_pair(float x[2], uint32_t pair) {
  if (DTYPE == FA_ARG_BF16) {
    x[0] = __uint_as_float(pair << 16);
    x[1] = __uint_as_float(pair & 0xFFFF0000u);
  } else {
    x[0] = cvt_f32_f16((uint16_t)pair);
    x[1] = cvt_f32_f16((uint16_t)(pair >> 16));
  }
}

/* ---- rows of a gradient ----
 *
 * A warp has 16 rows as accumulators: lane l of fragment n has columns 8 n + 2 (l % 4) and the next, of rows l / 4 and l / 4 + 8. */

/* Sixteen rows times factor to global memory: `used` of them are of the sequence, the rest of `held` are padding and get 0. */
FA_INLINE void store_rows(char *row0_gmem, int64_t stride_bytes, float (*sum)[4], int count, int used, int held, int dims, float factor) {
  int lane = laneid();
#pragma unroll
  for (int r = 0; r < 2; r++) {
    int row = (lane >> 2) + 8 * r, column = 8 * (lane & 3), columns = row < held ? dims - column : 0;
    char *row_gmem = row0_gmem + row * stride_bytes + column * 2;
#pragma unroll
    for (int n = 0; n < count; n += 4) { /* 64 bytes of each row */
      uint32_t word[4];
#pragma unroll
      for (int i = 0; i < 4; i++) word[i] = row < used ? fa_pack(sum[n + i][2 * r] * factor, sum[n + i][2 * r + 1] * factor) : 0;
      fa_transpose_quad(word);
      if (8 * n < columns) st_global_v4(row_gmem + 16 * n, word);
    }
  }
}

/* One bit for each of the warp's 16 rows that holds an infinity or a NaN. */
FA_INLINE unsigned rows_not_finite(float (*sum)[4], int count) {
  unsigned rows = 0;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float zero[4] = {0.0f}; /* four chains, which do not wait for each other */
#pragma unroll
    for (int n = 0; n < count; n++) zero[n % 4] += (sum[n][2 * r] + sum[n][2 * r + 1]) * 0.0f;
    float all = (zero[0] + zero[1]) + (zero[2] + zero[3]);
    for (unsigned lanes = __ballot_sync(0xFFFFFFFFu, all != all); lanes; lanes &= lanes - 1)
      rows |= 1u << ((__ffs((int)lanes) - 1) / 4 + 8 * r);
  }
  return rows;
}

/* ---- repair ---- */

FA_INLINE float dot(const char *a_gmem, const char *b_gmem, int dims) {
  float sum = 0.0f;
#pragma unroll 1
  for (int d = 0; d < dims; d++) sum += fa_load_f32(a_gmem, DTYPE, d) * fa_load_f32(b_gmem, DTYPE, d);
  return sum;
}

/* Adds weight times row `from` of a matrix; lane i has columns i, i + 32, ... */
FA_INLINE void add_row(float sum[COLUMNS_OF_LANE], float weight, const char *row_gmem, int dims) {
#pragma unroll
  for (int c = 0; c < COLUMNS_OF_LANE; c++) {
    int d = laneid() + 32 * c;
    if (d < dims) sum[c] += weight * fa_load_f32(row_gmem, DTYPE, d);
  }
}

FA_INLINE void store_repaired(char *row_gmem, const float sum[COLUMNS_OF_LANE], int dims, float factor) {
#pragma unroll
  for (int c = 0; c < COLUMNS_OF_LANE; c++)
    if (laneid() + 32 * c < dims) fa_store_element(row_gmem + (laneid() + 32 * c) * 2, sum[c] * factor);
}

/* P and dS of query row i of head h and key j. */
FA_INLINE void gradient_of_one(const fa_gradient_args *args, const fa_tile *tile, int h, int i, int j, float *p, float *ds) {
  const fa_arg_problem *problem = &args->problem;
  int h_k = h / problem->group;
  int64_t row = fa_workspace_row(args, tile->b, h, tile->q_start) + i;
  const char *q_gmem = fa_head_base(&args->q, 2, tile->b, h, tile->q_start + i),
             *k_gmem = fa_head_base(&args->k, 2, tile->b, h_k, tile->k_start + j);
  const char *dout_gmem = fa_head_base(&args->dout, 2, tile->b, h, tile->q_start + i);
  const char *v_gmem = fa_head_base(&args->v, 2, tile->b, h_k, tile->k_start + j);
  *p = ex2_approx(__fmaf_rn(dot(q_gmem, k_gmem, problem->dim_qk), (float)problem->scale * LOG2E, -((const float *)args->lse_rows)[row]));
  *ds = *p * (dot(dout_gmem, v_gmem, problem->dim_v) - ((const float *)args->delta_rows)[row]);
}

FA_INLINE int pair_is_visible(const fa_arg_problem *p, const fa_tile *tile, int h, int i, int j) {
  return j >= fa_row_lo(p->rule, tile->len_q, tile->len_k, i) && j < fa_row_hi(p->rule, tile->len_q, tile->len_k, i) &&
         fa_in_block_mask(p, tile->b, h, i, j);
}

/* Row i of dQ of head h again, by one warp: 32 keys at a time, a lane each. */
FA_INLINE void repair_query(const fa_gradient_args *args, const fa_tile *tile, int h, int i) {
  float sum[COLUMNS_OF_LANE] = {0};
  const fa_arg_problem *problem = &args->problem;
#pragma unroll 1
  for (int j0 = 0; j0 < tile->len_k; j0 += 32) {
    int j = j0 + laneid(), visible = j < tile->len_k && pair_is_visible(problem, tile, h, i, j);
    float p = 0.0f, ds = 0.0f;
    if (visible) gradient_of_one(args, tile, h, i, j, &p, &ds);
    for (unsigned left = __ballot_sync(0xFFFFFFFFu, visible); left; left &= left - 1) {
      int from = __ffs((int)left) - 1;
      add_row(sum, __shfl_sync(0xFFFFFFFFu, ds, from), fa_head_base(&args->k, 2, tile->b, h / problem->group, tile->k_start + j0 + from),
              problem->dim_qk);
    }
  }
  store_repaired(fa_head_base(&args->dq, 2, tile->b, h, tile->q_start + i), sum, problem->dim_qk, (float)problem->scale);
}

/* Row j of dV or, with of_k, of dK again, by one warp: 32 queries of a head at a time, a lane each. */
FA_INLINE void repair_key(const fa_gradient_args *args, const fa_tile *tile, int h_k, int j, int of_k) {
  const fa_arg_problem *problem = &args->problem;
  const fa_arg_view *from_view = of_k ? &args->q : &args->dout, *to_view = of_k ? &args->dk : &args->dv;
  int dims = of_k ? problem->dim_qk : problem->dim_v;
  float sum[COLUMNS_OF_LANE] = {0};
#pragma unroll 1
  for (int h = h_k * problem->group; h < (h_k + 1) * problem->group; h++)
#pragma unroll 1
    for (int i0 = 0; i0 < tile->len_q; i0 += 32) {
      int i = i0 + laneid(), visible = i < tile->len_q && pair_is_visible(problem, tile, h, i, j);
      float p = 0.0f, ds = 0.0f;
      if (visible) gradient_of_one(args, tile, h, i, j, &p, &ds);
      for (unsigned left = __ballot_sync(0xFFFFFFFFu, visible); left; left &= left - 1) {
        int from = __ffs((int)left) - 1;
        add_row(sum, __shfl_sync(0xFFFFFFFFu, of_k ? ds : p, from), fa_head_base(from_view, 2, tile->b, h, tile->q_start + i0 + from),
                dims);
      }
    }
  store_repaired(fa_head_base(to_view, 2, tile->b, h_k, tile->k_start + j), sum, dims, of_k ? (float)problem->scale : 1.0f);
}

#endif
