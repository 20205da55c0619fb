/* mma_bwd.h: the products of the backward pass between tiles in shared memory, and their exact form for data that is not finite.
 *
 *     acc += A B, contraction over k:          S = Q K^T    dP = dO V^T    dV = P^T dO    dK = dS^T Q    dQ = dS K
 *     A: rows of its tile, or columns          rows         rows           columns        columns        rows
 *     B: rows of its tile, or columns          rows         rows           columns        columns        columns
 *
 * "Columns" means that k runs over the rows of the tile, so that ldmatrix transposes. In fp32 Q, K, V and dO are split (split.h); P and
 * dS, which are A where B comes by columns, are f32 in shared memory and are split by the warp that takes them, after they were
 * multiplied by the scales of B's rows.
 */
#ifndef FA_MMA_BWD_H
#define FA_MMA_BWD_H

#include "ptx_bwd.h"
#include "split.h"

enum { FA_BY_ROWS = 0, FA_BY_COLUMNS = 1 };

#ifndef STEP_UNROLL
#define STEP_UNROLL 64 /* steps of a contraction side by side: all */
#endif

/* A tile in shared memory as an operand, from row (or column) `at` on. */
typedef struct {
  uint32_t smem;
  int by, at, row_bytes;
  int rows; /* of the whole tile */
} fa_tile_operand;

/* fp32: where the scales of the tile's rows lie. */
FA_INLINE uint32_t fa_scales_of(fa_tile_operand t) { return t.smem + t.rows * t.row_bytes; }

/* fp32: sixteen rows of P or dS, `first` rows after its start, and step `step` of k, laid out as two fragments of an accumulator. */
FA_INLINE void fa_load_whole(float s[2][4], fa_tile_operand t, int lane, int first, int step) {
  int g = lane >> 2, k0 = 16 * step + 2 * (lane & 3);
#pragma unroll
  for (int half = 0; half < 2; half++)
#pragma unroll
    for (int r = 0; r < 2; r++) {
      int row = t.at + first + g + 8 * r, k = k0 + 8 * half;
      if (t.by == FA_BY_ROWS) {
        ld_shared_v2_f32(&s[half][2 * r], fa_chunk_address(t.smem, row, k / 4, t.row_bytes) + k % 4 * 4);
      } else {
#pragma unroll
        for (int e = 0; e < 2; e++)
          s[half][2 * r + e] = __uint_as_float(ld_shared_b32(fa_chunk_address(t.smem, k + e, row / 4, t.row_bytes) + row % 4 * 4));
      }
    }
}

/* Sixteen rows of A, `first` rows after its start, and step `step` of k; fp32: by rows of a tile that is split. */
FA_INLINE void fa_load_operand_a(fa_operand_a *a, fa_tile_operand t, int lane, int first, int step) {
  if (t.by == FA_BY_ROWS)
    fa_load_a(a, t.smem, fa_lane_rows_first(lane, t.row_bytes), t.at + first, step, t.row_bytes);
  else
    ldmatrix_x4_trans(a->r, fa_lane_address(t.smem, fa_lane_chunks_first(lane, t.row_bytes), 16 * step, (t.at + first) / 8, t.row_bytes));
}

/* Two groups of eight columns of acc, `first` after B's start (a multiple of 16). */
FA_INLINE void fa_load_operand_b(fa_operand_b b[2], fa_tile_operand t, int lane, int first, int step) {
  if (t.by == FA_BY_ROWS)
    fa_load_b_rows(b, t.smem, fa_lane_chunks_first(lane, t.row_bytes), t.at + first, step, t.row_bytes);
  else
    fa_load_b_columns(b, t.smem, fa_lane_rows_first(lane, t.row_bytes), step, (t.at + first) / 16, t.row_bytes);
}

/* acc[m * n_count + n] += A B for m_count fragments of 16 rows and n_count of 8 columns; k is the length of the contraction. fp32: by
 * rows of both tiles acc comes without their scales (fa_scale_products). */
FA_INLINE void fa_product(float acc[][4], int m_count, int n_count, int k, fa_tile_operand a_tile, fa_tile_operand b_tile) {
  int lane = (int)fa_opaque(threadIdx.x % 32), whole = DTYPE == FA_ARG_F32 && b_tile.by == FA_BY_COLUMNS;
#pragma unroll STEP_UNROLL
  for (int step = 0; step < k / FA_STEP_ROWS; step++) {
    fa_operand_a a[4];
    float s[2][4], back[4][2];
#pragma unroll
    for (int m = 0; m < m_count; m++) {
      if (whole) {
        fa_load_whole(s, a_tile, lane, 16 * m, step);
        fa_split_accumulators(&a[m], s, 1, fa_scales_of(b_tile) + 64 * step, back[m]);
      } else {
        fa_load_operand_a(&a[m], a_tile, lane, 16 * m, step);
      }
    }
#pragma unroll
    for (int n = 0; n < n_count; n += 2) {
      fa_operand_b b[2];
      fa_load_operand_b(b, b_tile, lane, 8 * n, step);
#pragma unroll
      for (int m = 0; m < m_count; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          if (whole)
            fa_mma_back(acc[m * n_count + n + half], &a[m], &b[half], back[m]);
          else
            fa_mma(acc[m * n_count + n + half], &a[m], &b[half]);
        }
    }
  }
}

/* acc = A B by rows of both tiles, in its true size. */
FA_INLINE void fa_product_of_rows(float acc[][4], int m_count, int n_count, int k, fa_tile_operand a_tile, fa_tile_operand b_tile) {
#pragma unroll
  for (int i = 0; i < m_count * n_count; i++)
#pragma unroll
    for (int e = 0; e < 4; e++) acc[i][e] = 0.0f;
  fa_product(acc, m_count, n_count, k, a_tile, b_tile);
  fa_scale_products(acc, m_count, n_count, fa_scales_of(a_tile) + a_tile.at * 4, fa_scales_of(b_tile) + b_tile.at * 4);
}

/* ---- data that is not finite ----
 *
 * 0 * NaN is NaN, so a pair that is not visible, with P = dS = 0, would still spoil a gradient. In tiles with such pairs and such data
 * every number of B is taken as its finite part (0 if it has none). That is enough for Q and K: where they are not finite, the score of a
 * pair that is visible is not either, nor is its dS. With dO a second product of flags, "P is not 0" times "dO is not finite", counts
 * the NaN that are due. */

#define ONE_BITS (DTYPE == FA_ARG_BF16 ? 0x3F80u : 0x3C00u)
#define EXPONENT_BITS (DTYPE == FA_ARG_BF16 ? 0x7F80u : 0x7C00u)

/* Two elements in a word: 1 where it is not 0. */
FA_INLINE uint32_t fa_flag_nonzero(uint32_t word) { return (word & 0x7FFFu ? ONE_BITS : 0) | (word & 0x7FFF0000u ? ONE_BITS << 16 : 0); }

/* Likewise: 1 where it is infinite or NaN. *word keeps the finite ones. */
FA_INLINE uint32_t fa_flag_nonfinite(uint32_t *word) {
  uint32_t flags = 0;
  if ((*word & EXPONENT_BITS) == EXPONENT_BITS) {
    flags = ONE_BITS;
    *word &= 0xFFFF0000u;
  }
  if ((*word & EXPONENT_BITS << 16) == EXPONENT_BITS << 16) {
    flags |= ONE_BITS << 16;
    *word &= 0x0000FFFFu;
  }
  return flags;
}

/* d += a b with b's finite part; NaN where `flags` is 1 and what b has of the rest meets an element of a that is not 0 (a_flags). back:
 * fa_mma_back. */
FA_INLINE void fa_mma_finite(float d[4], const fa_operand_a *a, const float back[2], const uint32_t a_flags[4], fa_operand_b b, int flags) {
  float due[4] = {0, 0, 0, 0};
  uint32_t b_flags[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    b_flags[i] = fa_flag_nonfinite(&b.r[i]);
    if (FA_PLANES == 2) fa_flag_nonfinite(&b.small[i]); /* NaN where the high term is not finite */
  }
  fa_mma_back(d, a, &b, back);
  if (flags) fa_mma_exact(due, a_flags, b_flags);
#pragma unroll
  for (int e = 0; e < 4; e++)
    if (due[e] > 0.0f) d[e] = __int_as_float(0x7fffffff);
}

/* Operand a of P or dS, and 1 where it is not 0. */
FA_INLINE void fa_load_operand_and_flags(fa_operand_a *a, float back[2], uint32_t flags[4], fa_tile_operand t, uint32_t b_scales_smem,
                                         int lane, int first, int step) {
  if (DTYPE == FA_ARG_F32) {
    float s[2][4];
    fa_load_whole(s, t, lane, first, step);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float *pair = &s[i / 2][i % 2 * 2];
      flags[i] = (pair[0] != 0.0f ? ONE_BITS : 0) | (pair[1] != 0.0f ? ONE_BITS << 16 : 0);
    }
    fa_split_accumulators(a, s, 1, b_scales_smem + 64 * step, back);
  } else {
    fa_load_operand_a(a, t, lane, first, step);
#pragma unroll
    for (int i = 0; i < 4; i++) flags[i] = fa_flag_nonzero(a->r[i]);
  }
}

/* fa_product by columns of B, in which an element of A that is 0 takes nothing from B, not even NaN. B may hold what is not finite where
 * A is not 0 if `flags` is 1. */
FA_INLINE void fa_product_exact(float acc[][4], int m_count, int n_count, int k, fa_tile_operand a_tile, fa_tile_operand b_tile,
                                int flags) {
  int lane = (int)fa_opaque(threadIdx.x % 32);
#pragma unroll 1
  for (int step = 0; step < k / FA_STEP_ROWS; step++) {
    fa_operand_a a[4];
    float back[4][2];
    uint32_t a_flags[4][4];
#pragma unroll
    for (int m = 0; m < m_count; m++)
      fa_load_operand_and_flags(&a[m], back[m], a_flags[m], a_tile, fa_scales_of(b_tile), lane, 16 * m, step);
#pragma unroll
    for (int n = 0; n < n_count; n += 2) {
      fa_operand_b b[2];
      fa_load_operand_b(b, b_tile, lane, 8 * n, step);
#pragma unroll
      for (int half = 0; half < 2; half++)
#pragma unroll
        for (int m = 0; m < m_count; m++) fa_mma_finite(acc[m * n_count + n + half], &a[m], back[m], a_flags[m], b[half], flags);
    }
  }
}

/* Rows g and g + 8 of `count` fragments into a tile of the same element type. */
FA_INLINE void fa_store_fragments(uint32_t tile_smem, float s[][4], int count, int row0, int column0, int row_bytes) {
  int lane = threadIdx.x % 32, row = row0 + (lane >> 2), column = column0 + 2 * (lane & 3);
#pragma unroll
  for (int n = 0; n < count; n++)
#pragma unroll
    for (int r = 0; r < 2; r++) {
      int at = column + 8 * n;
      uint32_t dst_smem = fa_chunk_address(tile_smem, row + 8 * r, at / CHUNK_ELEMENTS, row_bytes) + at % CHUNK_ELEMENTS * ELEMENT_BYTES;
      if (DTYPE == FA_ARG_F32) {
        st_shared_b32(dst_smem, __float_as_uint(s[n][2 * r]));
        st_shared_b32(dst_smem + 4, __float_as_uint(s[n][2 * r + 1]));
      } else {
        st_shared_b32(dst_smem, fa_pack(s[n][2 * r], s[n][2 * r + 1]));
      }
    }
}

/* A lane's two neighbouring elements of a row of a gradient. `dims` counts the row's elements. */
FA_INLINE void fa_store_pair(char *row_gmem, int64_t dim_stride, int dims, int column, float x, float y) {
  if (ALIGNED && DTYPE == FA_ARG_F32) {
    if (column < dims) *(uint64_t *)(row_gmem + column * 4) = (uint64_t)__float_as_uint(y) << 32 | __float_as_uint(x);
  } else if (ALIGNED) {
    if (column < dims) *(uint32_t *)(row_gmem + column * 2) = fa_pack(x, y);
  } else {
    if (column < dims) fa_store_element(row_gmem + column * dim_stride * ELEMENT_BYTES, x);
    if (column + 1 < dims) fa_store_element(row_gmem + (column + 1) * dim_stride * ELEMENT_BYTES, y);
  }
}

/* The four lanes of a row hold word `lane` of chunks 0 to 3 each; afterwards lane i holds the four words of chunk i. */
FA_INLINE void fa_transpose_quad(uint32_t w[4]) {
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    int high = threadIdx.x & step;
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (!(i & step)) {
        uint32_t other = __shfl_xor_sync(0xFFFFFFFFu, high ? w[i] : w[i + step], step);
        if (high)
          w[i] = other;
        else
          w[i + step] = other;
      }
  }
}

#endif
