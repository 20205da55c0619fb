/* shift_sm90.h: the bias, or the mask, of a warp's 16 rows and one block of keys, by way of shared memory: while a block's scores are worked on,
 * those of the next block are under way, and take no registers.
 *
 * Only for a bias of the inputs' type or a mask whose rows are contiguous and 16-byte aligned. Each warp has 4096 bytes of its own: 16 rows of 256
 * bytes (bias) or 128 bytes (mask), their 16-byte chunks swizzled as in tile.h; where rows are broadcast, the first row alone.
 *
 * Expects BLOCK_N, at most 128, and FEW_ROWS.
 */
#ifndef FA_SHIFT_SM90_H
#define FA_SHIFT_SM90_H

#include "score.h"
#include "work_sm90.h"

#define SHIFT_BYTES 4096

FA_INLINE int shift_is_bias(const fa_arg_problem *p) { return p->bias.data != 0; }
FA_INLINE int shift_row_bytes(const fa_arg_problem *p) { return shift_is_bias(p) ? 256 : 128; }

/* All rows of the warp have the same bias or mask. */
FA_INLINE int shift_is_one_row(const fa_arg_problem *p) {
  return (shift_is_bias(p) ? p->bias.m : p->mask.m) == 0 && !(FEW_ROWS && p->pack_log2);
}

/* Starts the copy for the keys from n0 on. All lanes of the warp take part, and have read what lay there. */
FA_INLINE void fetch_shifts(const fa_arg_problem *p, uint32_t tile_smem, uint32_t shift_smem, int warp_row, int n0) {
  work t = receive_work(p, tile_smem);
  int is_bias = shift_is_bias(p), row_bytes = shift_row_bytes(p), size = is_bias ? 2 : 1, lanes = row_bytes / 16, step = 32 / lanes;
  int lane = laneid(), row = lane / lanes, chunk = lane % lanes, rows = shift_is_one_row(p) ? 1 : 16;
  const fa_arg_grid *grid = is_bias ? &p->bias : &p->mask;
  int inside = fa_max(0, fa_min(16, (fa_min(t.len_k - n0, BLOCK_N) - chunk * (16 / size)) * size)); /* bytes that the sequence has */
  const char *gmem = (const char *)grid->data + (t.b * grid->b + n0) * size + chunk * 16;
  row_place place = place_of_row(p, &t, warp_row + row);
  const char *row_gmem = gmem + (place.h * grid->h + place.position * grid->m) * size;
#pragma unroll 2
  for (; row < rows; row += step, row_gmem += step * grid->m * size) {
    if (FEW_ROWS) { /* rows of several heads */
      place = place_of_row(p, &t, warp_row + row);
      row_gmem = gmem + (place.h * grid->h + place.position * grid->m) * size;
    }
    int used = FEW_ROWS ? place.used : t.m0 + warp_row + row < t.len_q;
    cp_async_cg_16(fa_chunk_address(shift_smem, row, chunk, row_bytes), row_gmem, used ? inside : 0);
  }
  cp_async_commit_group();
}

#define MINUS_INFINITY_BITS (DTYPE == FA_ARG_F16 ? 0xFC00u : 0xFF80u)

/* Four words of bias: rows 0-7 and 8-15 of fragment n, then of n + 1. */
FA_INLINE void load_bias(uint32_t r[4], uint32_t shift_smem, int row_of_lane, int n) {
  ldmatrix_x4(r, fa_chunk_address(shift_smem, row_of_lane, n + (laneid() >> 4), 256));
}

FA_INLINE float bias_of_pair(uint32_t pair, int e) {
  uint16_t bits = (uint16_t)(e ? pair >> 16 : pair);
  return DTYPE == FA_ARG_F16 ? cvt_f32_f16(bits) : fa_bf16_to_float(bits);
}

/* s * scale + bias. A bias of -infinity forbids the pair, whatever its score, NaN included: looked for once for the whole block, since as unsigned
 * numbers only NaNs are larger. */
FA_INLINE void apply_bias(float s[][4], float scale, uint32_t shift_smem, int row_of_lane) {
  uint32_t r[4], largest = 0;
#pragma unroll
  for (int n = 0; n < BLOCK_N / 8; n += 2) {
    load_bias(r, shift_smem, row_of_lane, n);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      largest = max_u16x2(largest, r[i]);
#pragma unroll
      for (int e = 0; e < 2; e++) {
        float *at = &s[n + i / 2][2 * (i % 2) + e];
        *at = __fmaf_rn(*at, scale, bias_of_pair(r[i], e));
      }
    }
  }
  if (!__any_sync(0xFFFFFFFFu, (largest & 0xFFFFu) >= MINUS_INFINITY_BITS || largest >> 16 >= MINUS_INFINITY_BITS)) return;
#pragma unroll
  for (int n = 0; n < BLOCK_N / 8; n += 2) {
    load_bias(r, shift_smem, row_of_lane, n);
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int e = 0; e < 2; e++)
        if (bias_of_pair(r[i], e) == MINUS_INFINITY) s[n + i / 2][2 * (i % 2) + e] = MINUS_INFINITY;
  }
}

/* s * scale, or -infinity where the mask forbids the pair. */
FA_INLINE void apply_mask(float s[][4], float scale, uint32_t shift_smem, int rows_of_warp) {
  int lane = laneid();
#pragma unroll
  for (int r = 0; r < 2; r++) {
    int row = ((lane >> 2) + 8 * r) & rows_of_warp;
#pragma unroll
    for (int n = 0; n < BLOCK_N / 8; n++) {
      uint32_t four = ld_shared_b32(fa_chunk_address(shift_smem, row, n / 2, 128) + n % 2 * 8 + (lane & 2) * 2);
      uint32_t two = four >> (lane & 1) * 16;
      s[n][2 * r] = two & 0xFFu ? s[n][2 * r] * scale : MINUS_INFINITY;
      s[n][2 * r + 1] = two & 0xFF00u ? s[n][2 * r + 1] * scale : MINUS_INFINITY;
    }
  }
}

/* Waits for the copy, and applies it to the scores, which are multiplied with `scale` first. */
FA_INLINE void apply_shifts(float s[][4], float scale, const fa_arg_problem *p, uint32_t shift_smem) {
  int rows_of_warp = shift_is_one_row(p) ? 0 : 15;
  cp_async_wait_group(0);
  __syncwarp(); /* all lanes' copies have landed */
  if (shift_is_bias(p))
    apply_bias(s, scale, shift_smem, laneid() & rows_of_warp);
  else
    apply_mask(s, scale, shift_smem, rows_of_warp);
  __syncwarp(); /* all lanes have read: the next copy may come */
}

#endif
