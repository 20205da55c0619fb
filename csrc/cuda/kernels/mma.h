/* mma.h: matrix products in the precision of DTYPE, on fragments of 16 elements of contraction. In fp32 a tile in shared memory, and
 * every operand, is a pair of fp16 terms (split.h). */
#ifndef FA_MMA_H
#define FA_MMA_H

#include "tile.h"

typedef struct {
  uint32_t r[4], small[4]; /* fp32: high and low terms */
} fa_operand_a;

typedef struct {
  uint32_t r[2], small[2];
} fa_operand_b;

/* d += a * b for operands that one step holds exactly. */
FA_INLINE void fa_mma_exact(float d[4], const uint32_t a[4], const uint32_t b[2]) {
  if (DTYPE == FA_ARG_BF16)
    mma_m16n8k16_bf16(d, a, b);
  else
    mma_m16n8k16_f16(d, a, b);
}

/* d += a * b; the small terms first. Tensor cores round sums toward zero, so in fp32 a long sum of theirs would drift: for a few steps. */
FA_INLINE void fa_mma_chain(float d[4], const fa_operand_a *a, const fa_operand_b *b) {
  if (DTYPE == FA_ARG_F32) {
    fa_mma_exact(d, a->r, b->small);
    fa_mma_exact(d, a->small, b->r);
  }
  fa_mma_exact(d, a->r, b->r);
}

/* d += a * b for any number of steps: in fp32 tensor cores sum one step, and an ordinary addition, which rounds to nearest, takes it to d. */
FA_INLINE void fa_mma(float d[4], const fa_operand_a *a, const fa_operand_b *b) {
  if (DTYPE == FA_ARG_F32) {
    float step[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    fa_mma_chain(step, a, b);
#pragma unroll
    for (int e = 0; e < 4; e++) d[e] += step[e];
  } else {
    fa_mma_chain(d, a, b);
  }
}

/* Operand a from an accumulator, 16 bits: its columns 16 * step and the 15 next become the contraction. s is one row of fragments. */
FA_INLINE void fa_operand_from_accumulator(fa_operand_a *a, float s[][4], int step) {
  a->r[0] = fa_pack(s[2 * step][0], s[2 * step][1]);
  a->r[1] = fa_pack(s[2 * step][2], s[2 * step][3]);
  a->r[2] = fa_pack(s[2 * step + 1][0], s[2 * step + 1][1]);
  a->r[3] = fa_pack(s[2 * step + 1][2], s[2 * step + 1][3]);
}

#define FA_STEP_ROWS 16 /* contraction of one step */

/* Operand a, 16 rows and 16 columns from 16 * step on, of a tile with the contraction along its rows. */
FA_INLINE void fa_load_a(fa_operand_a *a, uint32_t tile_smem, fa_lane rows_first, int row, int step, int row_bytes) {
  int chunk = 2 * FA_PLANES * step;
  ldmatrix_x4(a->r, fa_lane_address(tile_smem, rows_first, row, chunk, row_bytes));
  if (FA_PLANES == 2) ldmatrix_x4(a->small, fa_lane_address(tile_smem, rows_first, row, chunk + 1, row_bytes));
}

/* The four words of ldmatrix as two operands b. */
FA_INLINE void fa_take_b(uint32_t first[2], uint32_t second[2], const uint32_t r[4]) {
  first[0] = r[0], first[1] = r[1];
  second[0] = r[2], second[1] = r[3];
}

/* Operand b for two groups of eight columns, b[0] and b[1], where column n is row n of the tile (K in Q K^T). */
FA_INLINE void fa_load_b_rows(fa_operand_b b[2], uint32_t tile_smem, fa_lane chunks_first, int row, int step, int row_bytes) {
  uint32_t r[4];
  int chunk = 2 * FA_PLANES * step;
  ldmatrix_x4(r, fa_lane_address(tile_smem, chunks_first, row, chunk, row_bytes));
  fa_take_b(b[0].r, b[1].r, r);
  if (FA_PLANES == 1) return;
  ldmatrix_x4(r, fa_lane_address(tile_smem, chunks_first, row, chunk + 1, row_bytes));
  fa_take_b(b[0].small, b[1].small, r);
}

/* Operand b for two groups of eight columns, columns 16 * pair and the 15 next, where the contraction runs over rows of the tile (V in P
 * V): rows 16 * step and on. */
FA_INLINE void fa_load_b_columns(fa_operand_b b[2], uint32_t tile_smem, fa_lane rows_first, int step, int pair, int row_bytes) {
  uint32_t r[4];
  int chunk = 2 * FA_PLANES * pair;
  ldmatrix_x4_trans(r, fa_lane_address(tile_smem, rows_first, 16 * step, chunk, row_bytes));
  fa_take_b(b[0].r, b[1].r, r);
  if (FA_PLANES == 1) return;
  ldmatrix_x4_trans(r, fa_lane_address(tile_smem, rows_first, 16 * step, chunk + 1, row_bytes));
  fa_take_b(b[0].small, b[1].small, r);
}

#endif
