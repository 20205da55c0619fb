/* forward_tile.h: a tile of query rows on its way through the keys. */
#ifndef FA_CPU_FORWARD_TILE_H
#define FA_CPU_FORWARD_TILE_H

#include "forward_plan.h"

typedef struct {
  fa_head *heads;      /* [stack] */
  int count, m0, rows; /* query heads in the tile, and rows of each: tile row g * rows + r is row m0 + r of heads[g] */
  void *q;             /* [tile rows][dim_qk], with the distances of tier.h like all that follows */
  void *kt, *v;        /* [dim_qk][64] or [64][dim_qk], [64][dim_v]: the keys at hand */
  void *s, *dropout;   /* [patch rows][64], [64] */
  void *o;             /* [tile rows][dim_v] */
  double *shift, *sum; /* [tile rows] m and l; m as an exponent of 2 */
  double *out_scale;   /* [tile rows] */
} fa_forward_tile;

/* kt, v and dropout are taken from `with` where that is given: tiles of one worker may share them. */
fa_forward_tile fa_carve_forward_tile(const fa_problem *problem, const fa_tile_ops *ops, const fa_forward_plan *plan, fa_arena *arena,
                                      const fa_forward_tile *with);

/* Loads Q and clears O, m and l. Heads and rows are set. */
void fa_begin_forward(const fa_forward_tile *tile);

/* Takes up keys [n0, n0 + 64), as far as the rows see them. */
void fa_attend_keys(const fa_forward_tile *tile, int n0);

/* The steps of that. A patch of products in s -> scores -> exponentials; returns 1 when some pair may be invisible. A tile of several heads is
 * always one patch. */
int fa_weigh_products(const fa_forward_tile *tile, int n0, const fa_patch *patch);
/* O += P V with the values in v, of which `columns` are there. */
void fa_add_values(const fa_forward_tile *tile, const fa_patch *patch, int columns, int partial);

/* Asks for keys that will be taken up next, up to `end`. */
void fa_ask_for_next_keys(const fa_forward_tile *tile, int n0, int end);

/* O, m, l -> out and lse. */
void fa_finish_forward(const fa_forward_tile *tile);

#endif
