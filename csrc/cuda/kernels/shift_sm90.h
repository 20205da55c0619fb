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
#pragma unroll 1
  for (; row < rows; row += step) {
    row_place place = place_of_row(p, &t, warp_row + row);
    int bytes = place.used ? inside : 0;
    cp_async_cg_16(fa_chunk_address(shift_smem, row, chunk, row_bytes),
                   bytes ? gmem + (place.h * grid->h + place.position * grid->m) * size : gmem, bytes);
  }
  cp_async_commit_group();
}

/* Two elements of a bias onto the scores of one row of a fragment. */
FA_INLINE void add_bias_pair(float s[2], uint32_t pair) {
#pragma unroll
  for (int e = 0; e < 2; e++) {
    uint16_t bits = (uint16_t)(e ? pair >> 16 : pair);
    float bias = DTYPE == FA_ARG_F16 ? cvt_f32_f16(bits) : fa_bf16_to_float(bits);
    s[e] = bias == MINUS_INFINITY ? bias : s[e] + bias; /* forbids the pair, whatever its score */
  }
}

/* Waits for the copy and applies it to the scores. */
FA_INLINE void apply_shifts(float s[][4], const fa_arg_problem *p, uint32_t shift_smem) {
  int lane = laneid(), all = shift_is_one_row(p) ? 0 : 15, row_bytes = shift_row_bytes(p);
  cp_async_wait_group(0);
  __syncwarp(); /* all lanes' copies have landed */
  if (shift_is_bias(p)) {
    int row = lane & all, half = lane >> 4;
#pragma unroll
    for (int n = 0; n < BLOCK_N / 8; n += 2) { /* rows 0-7, 8-15 of fragment n, then of n + 1 */
      uint32_t r[4];
      ldmatrix_x4(r, fa_chunk_address(shift_smem, row, n + half, row_bytes));
#pragma unroll
      for (int i = 0; i < 4; i++) add_bias_pair(&s[n + i / 2][2 * (i % 2)], r[i]);
    }
  } else {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      int row = ((lane >> 2) + 8 * r) & all;
#pragma unroll
      for (int n = 0; n < BLOCK_N / 8; n++) {
        uint32_t four = ld_shared_b32(fa_chunk_address(shift_smem, row, n / 2, row_bytes) + n % 2 * 8 + (lane & 2) * 2);
        uint32_t two = four >> (lane & 1) * 16;
        if (!(two & 0xFFu)) s[n][2 * r] = MINUS_INFINITY;
        if (!(two & 0xFF00u)) s[n][2 * r + 1] = MINUS_INFINITY;
      }
    }
  }
  __syncwarp(); /* all lanes have read: the next copy may come */
}

#endif
