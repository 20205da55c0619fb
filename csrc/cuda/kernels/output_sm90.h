/* output_sm90.h: the end of a tile: lse, O / sum to global memory, and the repair of rows that are not finite.
 *
 * Each warp sends its 16 rows through the slab of Q that its warpgroup has done with (TMA_STORE), or, where the next Q waits for that slab, or what
 * lies behind a sequence is another's, writes them from its registers.
 *
 * Where the keys are split both are of this part of the keys alone, in f32 in the workspace, and the sink is left to the kernel that combines the
 * parts.
 *
 * Expects DIM_V, BLOCK_MASK, DROPOUT, FEW_ROWS, SLAB_CHUNK_BYTES.
 */
#ifndef FA_OUTPUT_SM90_H
#define FA_OUTPUT_SM90_H

#include "score.h"
#include "softmax.h"
#include "work_sm90.h"

#define O_FRAGS (DIM_V / 8)

FA_INLINE int is_partial(const fa_forward_args *args) { return FEW_ROWS && args->splits > 1; }

/* Where a head's position 0 goes, and from position to position. */
FA_INLINE float *lse_of_head(const fa_forward_args *args, const work *t, int h) {
  if (is_partial(args)) return (float *)args->partial_lse + partial_row(&args->problem, t, h);
  return (float *)fa_head_base(&args->lse, 4, t->b, h, t->q_start);
}
FA_INLINE int64_t lse_stride(const fa_forward_args *args) { return is_partial(args) ? 1 : args->lse.s; }

FA_INLINE char *out_of_head(const fa_forward_args *args, const work *t, int h) {
  if (is_partial(args)) return (char *)args->partial_out + partial_row(&args->problem, t, h) * args->problem.dim_v * 4;
  return fa_head_base(&args->out, 2, t->b, h, t->q_start);
}
FA_INLINE int64_t out_stride(const fa_forward_args *args) { return is_partial(args) ? args->problem.dim_v * 4 : args->out.s * 2; }

/* lse of the rows of the warp whose first is row0 of the tile, and what O has to be multiplied with: 0 where a row saw nothing. Ends the sums of the
 * quads. */
FA_INLINE void end_statistics(const fa_forward_args *args, const work *t, int row0, const float max[2], const float sum[2],
                              float factor[2]) {
  int lane = laneid();
  float sink = MINUS_INFINITY, *lse_gmem;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    row_place row = place_of_row(&args->problem, t, row0 + (lane >> 2) + 8 * r);
    if (r == 0 || FEW_ROWS) { /* rows of another head */
      if (!is_partial(args)) sink = fa_sink_of_head(&args->problem, row.h);
      lse_gmem = lse_of_head(args, t, row.h);
    }
    float total = fa_quad_sum(sum[r]), lse = row.used ? fa_log_sum_exp(max[r], total) : MINUS_INFINITY;
    factor[r] = total == 0.0f || !row.used ? 0.0f : __fdividef(1.0f, total);
    if (DROPOUT) factor[r] *= (float)args->problem.keep_scale;
    if (row.used && sink != MINUS_INFINITY) { /* one more term of the sum, relative to the larger of the two */
      float larger = fmaxf(lse, sink), kept = ex2_approx((lse - larger) * LOG2E), both = kept + ex2_approx((sink - larger) * LOG2E);
      factor[r] *= kept / both;
      lse = larger + __logf(both);
    }
    if (lane % 4 == 0 && row.held) lse_gmem[row.position * lse_stride(args)] = lse;
  }
}

/* One bit for each of the warp's 16 rows whose O holds an infinity or a NaN which its statistics do not call for. */
FA_INLINE unsigned rows_not_finite(float o[O_FRAGS][4], const float factor[2]) {
  unsigned rows = 0;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float zero[4] = {0.0f}; /* four chains, which do not wait for each other */
#pragma unroll
    for (int d = 0; d < O_FRAGS; d++) zero[d % 4] += (o[d][2 * r] + o[d][2 * r + 1]) * 0.0f;
    float all = (zero[0] + zero[1]) + (zero[2] + zero[3]);
    int bad = factor[r] > 0.0f && all != all; /* a factor of NaN: the row is due to be NaN */
    for (unsigned lanes = __ballot_sync(0xFFFFFFFFu, bad); lanes; lanes &= lanes - 1) rows |= 1u << ((__ffs(lanes) - 1) / 4 + 8 * r);
  }
  return rows;
}

/* Two columns of O times factor, of the lane's row r; 0 where nothing was added: O may be anything there. */
FA_INLINE uint32_t output_pair(const float o[4], int r, const float factor[2]) {
  return factor[r] == 0.0f ? 0 : fa_pack(o[2 * r] * factor[r], o[2 * r + 1] * factor[r]);
}

/* O times factor to the slab of 64 rows at slab_smem, chunk after chunk, and from there to global memory by the TMA, which leaves out what lies
 * behind the sequence. Each warp sends its own 16 rows, so it waits for no other. */
FA_INLINE void store_output(const fa_tma_map *out_map, const work *t, int warp_row, uint32_t slab_smem, float o[O_FRAGS][4],
                            const float factor[2]) {
  int lane = laneid(), row = warp_row % 64 + lane % 16;
#pragma unroll
  for (int d = 0; d < O_FRAGS; d += 2) {
    int column = d + lane / 16; /* of 16 bytes */
    stmatrix_x4(slab_smem + d / 8 * SLAB_CHUNK_BYTES + row * 128 + ((column ^ row) & 7) * 16, output_pair(o[d], 0, factor),
                output_pair(o[d], 1, factor), output_pair(o[d + 1], 0, factor), output_pair(o[d + 1], 1, factor));
  }
  fence_proxy_async(); /* what this lane wrote, for the TMA */
  __syncwarp();
  if (lane == 0) {
#pragma unroll 1
    for (int c = 0; c < (DIM_V + 63) / 64; c++)
      cp_async_bulk_tensor_store(out_map, slab_smem + c * SLAB_CHUNK_BYTES + warp_row % 64 * 128, 64 * c, t->m0 + warp_row, t->h, t->b);
    cp_async_bulk_commit_group();
  }
}

/* O times factor from registers. Of four fragments, 32 columns, a lane holds columns 2q and 2q + 1 of each; a quad exchanges them until lane q
 * has the eight columns of fragment q, so that it writes 16 bytes and the quad 64. */
FA_INLINE void write_output(const fa_forward_args *args, const work *t, int row0, float o[O_FRAGS][4], const float factor[2]) {
  int lane = laneid(), q = lane & 3, column = 8 * q;
  char *out_gmem;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    row_place row = place_of_row(&args->problem, t, row0 + (lane >> 2) + 8 * r);
    if (r == 0 || FEW_ROWS) out_gmem = out_of_head(args, t, row.h) + row.position * out_stride(args) + column * 2;
    int columns = row.held ? args->problem.dim_v - column : 0;
#pragma unroll
    for (int d = 0; d < O_FRAGS; d += 4) {
      uint32_t x[4]; /* of fragments d to d + 3; in the end, of lanes 0 to 3 of the quad */
#pragma unroll
      for (int i = 0; i < 4; i++) x[i] = output_pair(o[d + i], r, factor);
#pragma unroll
      for (int distance = 1; distance < 4; distance *= 2)
#pragma unroll
        for (int i = 0; i < 4; i++)
          if (!(i & distance)) {
            uint32_t got = __shfl_xor_sync(0xFFFFFFFFu, q & distance ? x[i] : x[i | distance], distance);
            x[i] = q & distance ? got : x[i];
            x[i | distance] = q & distance ? x[i | distance] : got;
          }
      if (8 * d < columns) st_global_v4(out_gmem + (FEW_ROWS ? 0 : 8 * r * out_stride(args)) + 16 * d, x);
    }
  }
}

/* O times factor in f32, a fragment's row as a whole sector. */
FA_INLINE void write_partial_output(const fa_forward_args *args, const work *t, int row0, float o[O_FRAGS][4], const float factor[2]) {
  int lane = laneid(), column = 2 * (lane & 3);
#pragma unroll
  for (int r = 0; r < 2; r++) {
    row_place row = place_of_row(&args->problem, t, row0 + (lane >> 2) + 8 * r);
    char *out_gmem = out_of_head(args, t, row.h) + row.position * out_stride(args) + column * 4;
    int columns = row.held ? args->problem.dim_v - column : 0;
#pragma unroll
    for (int d = 0; d < O_FRAGS; d++) {
      float first = factor[r] == 0.0f ? 0.0f : o[d][2 * r] * factor[r], second = factor[r] == 0.0f ? 0.0f : o[d][2 * r + 1] * factor[r];
      if (8 * d < columns) st_global_v2(out_gmem + 32 * d, __float_as_uint(first), __float_as_uint(second));
    }
  }
}

/* One row of the tile again, from its visible keys alone, by one warp; lane i computes columns i, i + 32, ... */
FA_INLINE void repair_row(const fa_forward_args *args, const work *t, int row_of_tile) {
  const fa_arg_problem *p = &args->problem;
  int lane = laneid();
  row_place place = place_of_row(p, t, row_of_tile);
  int row = place.position;
  fa_tile tile = {t->b, place.h, 0, 0, 0, 0, 0, 0, 0, 0};
  fa_read_lengths(p, &tile);
  fa_score_head head = fa_score_of_head(p, &tile);
  fa_philox_key key = {{0, 0}};
  if (DROPOUT) key = fa_dropout_key_of(p);
  const char *q_gmem = fa_head_base(&args->q, 2, t->b, place.h, tile.q_start + row);
  const char *k_gmem = fa_head_base(&args->k, 2, t->b, t->h / p->group, tile.k_start);
  const char *v_gmem = fa_head_base(&args->v, 2, t->b, t->h / p->group, tile.k_start);
  char *out_gmem = out_of_head(args, t, place.h) + row * out_stride(args);
  float lse = ((volatile const float *)lse_of_head(args, t, place.h))[row * lse_stride(args)]; /* this warp wrote it */
  int lo = fa_row_lo(p->rule, tile.len_q, tile.len_k, row), hi = fa_row_hi(p->rule, tile.len_q, tile.len_k, row);
  if (is_partial(args)) lo = fa_max(lo, t->first * BLOCK_N), hi = fa_min(hi, (t->last + 1) * BLOCK_N);
  float o[(DIM_V + 31) / 32] = {0};
#pragma unroll 1
  for (int j0 = lo & ~31; j0 < hi; j0 += 32) {
    int j = j0 + lane;
    float weight = 0.0f;
    int seen = j >= lo && j < hi && (!BLOCK_MASK || block_is_seen(p, t->b, t->h, t->m0, j));
    if (seen) {
      float product = 0.0f;
#pragma unroll 1
      for (int d = 0; d < p->dim_qk; d++) product += fa_load_f32(q_gmem, DTYPE, d) * fa_load_f32(k_gmem, DTYPE, j * args->k.s + d);
      float score = fa_score_at(p, &head, product, row, j);
      seen = score != MINUS_INFINITY;
      weight = ex2_approx((score - lse) * LOG2E);
      if (DROPOUT) {
        seen = seen && !fa_is_dropped(p, key, t->b, place.h, row, j);
        weight *= (float)p->keep_scale;
      }
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
  for (int i = 0; i < (DIM_V + 31) / 32; i++)
    if (lane + 32 * i < p->dim_v) {
      if (is_partial(args))
        ((float *)out_gmem)[lane + 32 * i] = o[i];
      else
        fa_store_element(out_gmem + (lane + 32 * i) * 2, o[i]);
    }
}

/* The rows of the warp whose first is row0 of the tile, and whose bits are set. */
FA_INLINE void repair_rows(const fa_forward_args *args, const work *t, int row0, unsigned rows) {
  forget_origin(args); /* or what can be computed ahead of the main loop is, and takes registers there */
  __syncwarp();        /* the rows below were written by other lanes, and so was their lse */
#pragma unroll 1
  for (; rows; rows &= rows - 1) repair_row(args, t, row0 + __ffs(rows) - 1);
}

#endif
