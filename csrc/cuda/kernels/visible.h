/* visible.h: core/mask.h for fragments, and the walk over the key tiles that a block mask leaves.
 */
#ifndef FA_VISIBLE_H
#define FA_VISIBLE_H

#include "softmax.h"
#include "tile.h"

/* Scores of two rows (g and g + 8 below `row0`) outside the rows' intervals become -infinity. `column0` is the first key of the tile. */
FA_INLINE void fa_mask_fragments(float s[][4], int count, fa_rule rule, int len_q, int len_k, int row0, int column0) {
  int lane = threadIdx.x % 32, column = column0 + 2 * (lane & 3);
#pragma unroll
  for (int r = 0; r < 2; r++) {
    int row = row0 + (lane >> 2) + 8 * r;
    int lo = fa_row_lo(rule, len_q, len_k, row) - column, hi = fa_row_hi(rule, len_q, len_k, row) - column;
#pragma unroll
    for (int n = 0; n < count; n++)
#pragma unroll
      for (int e = 0; e < 2; e++)
        if (8 * n + e < lo || 8 * n + e >= hi) s[n][2 * r + e] = MINUS_INFINITY;
  }
}

/* The visible key tiles of a query tile, from the last to the first. Without a block mask these are all tiles of [first, last]. With one, a
 * warp looks up 32 tiles at a time; tiles never straddle blocks, so a tile is visible as a whole or not at all. */
typedef struct {
  int first;            /* lowest tile of the interval */
  int window;           /* highest tile of the 32 that `bits` speaks of: bit i is tile window - i */
  unsigned bits;        /* tiles not visited yet */
  const char *blocks;   /* block mask at (b, h, block row of the tile, 0), or 0 */
  int64_t block_stride; /* between neighbouring key blocks */
  int tiles_of_block;
} fa_key_walk;

FA_INLINE void fa_walk_look(fa_key_walk *walk) {
  int tile = walk->window - (int)(threadIdx.x % 32), seen = tile >= walk->first;
  if (seen && walk->blocks) seen = walk->blocks[tile / walk->tiles_of_block * walk->block_stride] != 0;
  walk->bits = __ballot_sync(0xFFFFFFFFu, seen);
}

/* The next tile down, or -1. All lanes of a warp take part; all warps of a CTA get the same answer. */
FA_INLINE int fa_walk_next(fa_key_walk *walk) {
  while (walk->bits == 0) {
    walk->window -= 32;
    if (walk->window < walk->first) return -1;
    fa_walk_look(walk);
  }
  int i = __ffs(walk->bits) - 1;
  walk->bits &= walk->bits - 1;
  return walk->window - i;
}

FA_INLINE fa_key_walk fa_walk_keys(const fa_arg_problem *p, const fa_tile *tile, int first, int last, int tile_keys) {
  fa_key_walk walk = {first, last, 0, 0, 0, 1};
  if (p->block_mask.data) {
    walk.blocks = (const char *)p->block_mask.data + tile->b * p->block_mask.b + tile->h * p->block_mask.h +
                  tile->m0 / p->block_size * p->block_mask.m;
    walk.block_stride = p->block_mask.n;
    walk.tiles_of_block = p->block_size / tile_keys;
  }
  if (last >= first) fa_walk_look(&walk);
  return walk;
}

#endif
