/* mma.h: matrix products in the precision of DTYPE, on fragments of 32 bytes of contraction: 16 elements of 16 bits or 8 of 32.
 *
 * fp32 goes to the tensor cores as x = big + small, both with TF32's 10 mantissa bits: big * big + big * small + small * big leaves out
 * small * small, 2^-22 of the product, so the error is that of fp32 arithmetic.
 */
#ifndef FA_MMA_H
#define FA_MMA_H

#include "tile.h"

typedef struct {
  uint32_t r[4], small[4]; /* small: fp32 only */
} fa_operand_a;

typedef struct {
  uint32_t r[2], small[2];
} fa_operand_b;

#define STRETCH 1.000338f /* 1 + 2^-11 / 1.44: what cutting a mantissa, 1.44 on average, to 10 bits takes from it */

/* x becomes its TF32 part, *small the rest. x is rounded by hand: the conversion instruction is four. Tensor cores cut `small` to TF32 toward
 * zero, which STRETCH makes up for on average. A NaN that rounding wraps to zero stays one in `small`. */
FA_INLINE void fa_split(uint32_t *x, uint32_t *small) {
  float whole = __uint_as_float(*x);
  *x = (*x + 0x1000u) & 0xFFFFE000u;
  *small = __float_as_uint((whole - __uint_as_float(*x)) * STRETCH);
}

FA_INLINE void fa_split_a(fa_operand_a *a) {
  if (DTYPE == FA_ARG_F32) {
#pragma unroll
    for (int i = 0; i < 4; i++) fa_split(&a->r[i], &a->small[i]);
  }
}

FA_INLINE void fa_split_b(fa_operand_b *b) {
  if (DTYPE == FA_ARG_F32) {
#pragma unroll
    for (int i = 0; i < 2; i++) fa_split(&b->r[i], &b->small[i]);
  }
}

/* d += a * b for operands that one step holds exactly. */
FA_INLINE void fa_mma_exact(float d[4], const uint32_t a[4], const uint32_t b[2]) {
  if (DTYPE == FA_ARG_F32)
    mma_m16n8k8_tf32(d, a, b);
  else if (DTYPE == FA_ARG_BF16)
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

/* Operand a, in fp32 not split yet, from an accumulator: the columns of s become the contraction. 16 bits: columns 16 * step and the 15 next.
 * fp32: columns 8 * step and the 7 next, in the order 0 2 4 6 1 3 5 7, which is free because operand b below comes in the same order. s is one row of
 * fragments. */
FA_INLINE void fa_whole_operand_from_accumulator(fa_operand_a *a, float s[][4], int step) {
  if (DTYPE == FA_ARG_F32) {
    a->r[0] = __float_as_uint(s[step][0]);
    a->r[1] = __float_as_uint(s[step][2]);
    a->r[2] = __float_as_uint(s[step][1]);
    a->r[3] = __float_as_uint(s[step][3]);
  } else {
    a->r[0] = fa_pack(s[2 * step][0], s[2 * step][1]);
    a->r[1] = fa_pack(s[2 * step][2], s[2 * step][3]);
    a->r[2] = fa_pack(s[2 * step + 1][0], s[2 * step + 1][1]);
    a->r[3] = fa_pack(s[2 * step + 1][2], s[2 * step + 1][3]);
  }
}

FA_INLINE void fa_operand_from_accumulator(fa_operand_a *a, float s[][4], int step) {
  fa_whole_operand_from_accumulator(a, s, step);
  fa_split_a(a);
}

#define FA_STEP_ROWS (DTYPE == FA_ARG_F32 ? 8 : 16) /* contraction of one step */

/* Operand a, 16 rows and chunks 2 * step and the next, of a tile with the contraction along its rows. */
FA_INLINE void fa_load_a(fa_operand_a *a, uint32_t tile_smem, fa_lane rows_first, int row, int step, int row_bytes) {
  ldmatrix_x4(a->r, fa_lane_address(tile_smem, rows_first, row, 2 * step, row_bytes));
}

/* Operand b for two groups of eight columns, b[0] and b[1], where column n is row n of the tile (K in Q K^T). */
FA_INLINE void fa_load_b_rows(fa_operand_b b[2], uint32_t tile_smem, fa_lane chunks_first, int row, int step, int row_bytes) {
  uint32_t r[4];
  ldmatrix_x4(r, fa_lane_address(tile_smem, chunks_first, row, 2 * step, row_bytes));
  b[0].r[0] = r[0], b[0].r[1] = r[1];
  b[1].r[0] = r[2], b[1].r[1] = r[3];
}

/* Operand b for two groups of eight columns, columns 16 * pair and the 15 next, where the contraction runs over rows of the tile
 * (V in P V): rows FA_STEP_ROWS * step and on, in fp32 in the order of fa_operand_from_accumulator. */
FA_INLINE void fa_load_b_columns(fa_operand_b b[2], uint32_t tile_smem, fa_lane rows_first, int lane, int step, int pair, int row_bytes) {
  if (DTYPE == FA_ARG_F32) {
    int row = 8 * step + 2 * (lane & 3), column = lane >> 2;
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
      for (int i = 0; i < 2; i++)
        b[half].r[i] =
            ld_shared_b32(fa_chunk_address(tile_smem, row + i, 4 * pair + 2 * half + (column >> 2), row_bytes) + (column & 3) * 4);
  } else {
    uint32_t r[4];
    ldmatrix_x4_trans(r, fa_lane_address(tile_smem, rows_first, 16 * step, 2 * pair, row_bytes));
    b[0].r[0] = r[0], b[0].r[1] = r[1];
    b[1].r[0] = r[2], b[1].r[1] = r[3];
  }
}

#endif
