/* split.h: fp32 on tensor cores as pairs of fp16.
 *
 *     x = high + low, both fp16, 11 bits each        a * b = high * high + high * low + low * high, without 2^-24 of the product
 *
 * fp16 reaches from 2^-24 to 2^16. So each row of a tile is multiplied by a power of two, its scale, that takes its largest element to
 * [2^14, 2^15): what is lost is below 2^-24 of an element or 2^-39 of the largest one in its row. Rows do not share a scale: what a
 * hidden row holds, however large, takes nothing from the others.
 *
 * Where the contraction runs along the rows of both tiles (Q K^T), the product of the two scales is taken from the sum. Where it runs
 * over the rows of operand b (P V), a's columns are multiplied by the scales of b's rows first, and then a's rows have a scale of their
 * own.
 *
 * In shared memory eight elements, 32 bytes, become one chunk of high terms and one of low terms in their place (tile.h: FA_PLANES).
 */
#ifndef FA_SPLIT_H
#define FA_SPLIT_H

#include "mma.h"

enum { FA_LEAST_EXPONENT = 15, FA_MOST_EXPONENT = 254 };

/* The exponent of the largest element of a row, from its bits without the sign. Rows of less than 2^-111 count as of that; infinity as
 * 2^127. */
FA_INLINE int fa_row_exponent(uint32_t largest) { return fa_min(fa_max((int)(largest >> 23), FA_LEAST_EXPONENT), FA_MOST_EXPONENT); }

/* Takes 2^exponent to 2^14, and back. */
FA_INLINE float fa_scale_down(int exponent) { return __uint_as_float((uint32_t)(268 - exponent) << 23); }
FA_INLINE float fa_scale_back(int exponent) { return __uint_as_float((uint32_t)(exponent - 14) << 23); }

/* Two neighbouring elements in range. */
FA_INLINE void fa_split_pair(float x, float y, uint32_t *high, uint32_t *low) {
  *high = cvt_rn_f16x2(y, x);
  *low = cvt_rn_f16x2(y - cvt_f32_f16((uint16_t)(*high >> 16)), x - cvt_f32_f16((uint16_t)*high));
}

/* fp32: splits, in place, a tile that this CTA has loaded with fa_load_tile; behind its rows come the scales, which take a row's
 * products back to their size. Infinite and NaN elements count for no scale and stay what they are. A thread reads only chunks that it
 * has loaded itself, so it has to wait for its own copies alone; a barrier must follow. */
FA_INLINE void fa_split_tile(uint32_t tile_smem, int rows, int padded_dim, int threads) {
  if (DTYPE != FA_ARG_F32) return;
  int row_bytes = padded_dim * 4, pass_rows = threads / 8, row0 = (int)threadIdx.x / 8, chunk = (int)threadIdx.x % 8;
  uint32_t own_smem = fa_chunk_address(tile_smem, row0, chunk, row_bytes);
  uint32_t high_smem = fa_chunk_address(tile_smem, row0, chunk & 6, row_bytes) + (chunk & 1) * 8;
  uint32_t scales_smem = tile_smem + rows * row_bytes;
  uint32_t low_smem = fa_chunk_address(tile_smem, row0, chunk | 1, row_bytes) + (chunk & 1) * 8;
#pragma unroll 1
  for (int first = 0; first < rows; first += pass_rows) {
    if (row0 + first >= rows) break; /* the same for all lanes of a warp, which has four rows */
    uint32_t at = (uint32_t)(first * row_bytes), x[8][4];
    int largest = 0x800000;
#pragma unroll
    for (int c = 0; c < padded_dim / 32; c++) {
      ld_shared_v4(x[c], own_smem + at + c * 128);
#pragma unroll
      for (int e = 0; e < 4; e++) largest = fa_max(largest, (int)((x[c][e] & 0x7FFFFFFFu) + 0x800000u)); /* < 0: not finite */
    }
#pragma unroll
    for (int lanes = 1; lanes < 8; lanes *= 2) largest = fa_max(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, lanes));
    int exponent = fa_row_exponent((uint32_t)largest - 0x800000u);
    float down = fa_scale_down(exponent);
    __syncwarp(); /* a lane writes where its neighbour has read */
#pragma unroll
    for (int c = 0; c < padded_dim / 32; c++) {
      uint32_t high[2], low[2];
#pragma unroll
      for (int i = 0; i < 2; i++)
        fa_split_pair(__uint_as_float(x[c][2 * i]) * down, __uint_as_float(x[c][2 * i + 1]) * down, &high[i], &low[i]);
      st_shared_v2(high_smem + at + c * 128, high);
      st_shared_v2(low_smem + at + c * 128, low);
    }
    if (chunk == 0) st_shared_b32(scales_smem + (row0 + first) * 4, __float_as_uint(fa_scale_back(exponent)));
  }
}

/* Operand a of `steps` steps from accumulators, whose columns are the contraction and meet b's rows with the scales at scales_smem.
 * back[r] takes row r's products back to their size. s is one row of fragments; it is left in another scale. */
FA_INLINE void fa_split_accumulators(fa_operand_a a[], float s[][4], int steps, uint32_t scales_smem, float back[2]) {
  float largest[2] = {0.0f, 0.0f}, down[2];
#pragma unroll
  for (int n = 0; n < 2 * steps; n++) {
    float scale[2];
    ld_shared_v2_f32(scale, scales_smem + (8 * n + 2 * (threadIdx.x & 3)) * 4);
#pragma unroll
    for (int e = 0; e < 4; e++) {
      s[n][e] *= scale[e & 1];
      largest[e >> 1] = fmaxf(largest[e >> 1], fabsf(s[n][e]));
    }
  }
#pragma unroll
  for (int r = 0; r < 2; r++) {
    largest[r] = fmaxf(largest[r], __shfl_xor_sync(0xFFFFFFFFu, largest[r], 1));
    largest[r] = fmaxf(largest[r], __shfl_xor_sync(0xFFFFFFFFu, largest[r], 2));
    int exponent = fa_row_exponent(__float_as_uint(largest[r]));
    down[r] = fa_scale_down(exponent);
    back[r] = fa_scale_back(exponent);
  }
#pragma unroll
  for (int n = 0; n < 2 * steps; n++)
#pragma unroll
    for (int r = 0; r < 2; r++) {
      int word = n % 2 * 2 + r;
      fa_split_pair(s[n][2 * r] * down[r], s[n][2 * r + 1] * down[r], &a[n / 2].r[word], &a[n / 2].small[word]);
    }
}

/* fp32: takes sums of products of rows of two tiles to their size. s: m_count times 16 rows by n_count times 8 columns; the scales of
 * its first row and column are at rows_smem and columns_smem. */
FA_INLINE void fa_scale_products(float s[][4], int m_count, int n_count, uint32_t rows_smem, uint32_t columns_smem) {
  if (DTYPE != FA_ARG_F32) return;
  int lane = threadIdx.x % 32;
  float row[4][2];
#pragma unroll
  for (int i = 0; i < 2 * m_count; i++) row[i / 2][i % 2] = __uint_as_float(ld_shared_b32(rows_smem + (lane / 4 + 8 * i) * 4));
#pragma unroll
  for (int n = 0; n < n_count; n++) {
    float column[2];
    ld_shared_v2_f32(column, columns_smem + (8 * n + 2 * (lane & 3)) * 4);
#pragma unroll
    for (int m = 0; m < m_count; m++)
#pragma unroll
      for (int e = 0; e < 4; e++) s[m * n_count + n][e] *= row[m][e >> 1] * column[e & 1];
  }
}

/* d += a * b; in fp32 back[r] is what fa_split_accumulators left for row r of a. */
FA_INLINE void fa_mma_back(float d[4], const fa_operand_a *a, const fa_operand_b *b, const float back[2]) {
  if (DTYPE == FA_ARG_F32) {
    float step[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    fa_mma_chain(step, a, b);
#pragma unroll
    for (int e = 0; e < 4; e++) d[e] = __fmaf_rn(step[e], back[e >> 1], d[e]);
  } else {
    fa_mma_chain(d, a, b);
  }
}

#endif
