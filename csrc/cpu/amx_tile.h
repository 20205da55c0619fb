/* amx_tile.h: products of blocks of 32 x 32 on AMX tiles, with vector work mixed in.
 *
 * Operands are arrays of tiles (1 KB each, see amx_pack.h). One step of a product covers 32 summands:
 *
 *     a: [step][part][2] tiles, 2 x 16 rows of 32 summands           b: [step][part][2] tiles, 16 pairs of summands x 2 x 16 columns
 *
 * bf16 has one part. fp16 has two, high + low, each bf16: together they hold its 11 bits exactly. Of the four products low * low is left
 * out: it is below 2^-16 of the result.
 *
 * The tile unit works beside the vector units only if both kinds of instruction are near each other in program order: a product calls
 * `tick` between its tile instructions, which does a little of the pending vector work. Functions are inlined into each other: tick
 * and work become plain code, and the parts, density and accumulate arguments constants. */
#ifndef FA_AMX_TILE_H
#define FA_AMX_TILE_H

#include "amx_target.h"

enum { TILE_HALVES = 512, STRIP = 32 }; /* halves of a tile; rows or columns of a block */

typedef void (*tick_fn)(void *work);

/* The halves from one step of an operand to its next strip of 32 rows or columns. */
#define STRIP_HALVES(parts) ((parts)*2 * TILE_HALVES)

AMX_BEGIN

AMX_INLINE void no_tick(void *work) { (void)work; }

/* density: calls of tick for two tile products: 1, 2 or 4. */
AMX_INLINE void run_ticks(tick_fn tick, void *work, const int density, const int nth) {
  if (density == 1 && nth % 2) tick(work);
  if (density >= 2) tick(work);
  if (density == 4) tick(work);
}

/* c[32][32] = or += sum over steps of a b; a_step, b_step in halves, c_row in floats. */
AMX_INLINE void product_32x32(const uint16_t *a, int64_t a_step, const uint16_t *b, int64_t b_step, int steps, const int parts, float *c,
                              int64_t c_row, const int accumulate, const tick_fn tick, void *work, const int density) {
  const int64_t stride = c_row * (int64_t)sizeof(float);
  if (accumulate) {
    TILE_LOAD(0, c, stride);
    TILE_LOAD(1, c + 16, stride);
    TILE_LOAD(2, c + 16 * c_row, stride);
    TILE_LOAD(3, c + 16 * c_row + 16, stride);
  } else {
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_ZERO(2);
    TILE_ZERO(3);
  }
  for (int i = 0; i < steps; i++, a += a_step, b += b_step)
    for (int term = 0; term < 2 * parts - 1; term++) { /* (low, high), (high, high), (high, low); bf16: (high, high) */
      const uint16_t *a_tiles = a + (parts == 2 && term == 0 ? 2 * TILE_HALVES : 0);
      const uint16_t *b_tiles = b + (parts == 2 && term == 2 ? 2 * TILE_HALVES : 0);
      const int new_a = term < 2, new_b = term != 1; /* a part stays where the next term needs it too */
      if (new_a) TILE_LOAD(4, a_tiles, 64);
      if (new_b) TILE_LOAD(6, b_tiles, 64);
      TILE_PRODUCT(0, 4, 6);
      run_ticks(tick, work, density, 0);
      if (new_b) TILE_LOAD(7, b_tiles + TILE_HALVES, 64);
      TILE_PRODUCT(1, 4, 7);
      run_ticks(tick, work, density, 1);
      if (new_a) TILE_LOAD(5, a_tiles + TILE_HALVES, 64);
      TILE_PRODUCT(2, 5, 6);
      run_ticks(tick, work, density, 0);
      TILE_PRODUCT(3, 5, 7);
      run_ticks(tick, work, density, 1);
    }
  TILE_STORE(0, c, stride);
  TILE_STORE(1, c + 16, stride);
  TILE_STORE(2, c + 16 * c_row, stride);
  TILE_STORE(3, c + 16 * c_row + 16, stride);
}

/* Two rows of a right operand, its parts apart. */
AMX_INLINE void put_pair(uint16_t *tile, const int parts, f32x16 even, f32x16 odd) {
  i32x16 high = bf16_pairs(even, odd);
  i32_store(tile, high);
  if (parts == 2) i32_store(tile + 2 * TILE_HALVES, bf16_pairs(f32_sub(even, bf16_even(high)), f32_sub(odd, bf16_odd(high))));
}

/* dst[c][r] = src[r][c]; rows and columns multiples of 16. */
AMX_INLINE void flip(const float *src, int64_t src_row, int rows, int columns, float *dst, int64_t dst_row) {
  for (int r = 0; r < rows; r += 16)
    for (int c = 0; c < columns; c += 16) {
      i32x16 block[16];
      for (int i = 0; i < 16; i++) block[i] = i32_load(src + (r + i) * src_row + c);
      i32_transpose(block);
      for (int i = 0; i < 16; i++) i32_store(dst + (c + i) * dst_row + r, block[i]);
    }
}

AMX_END

#endif
