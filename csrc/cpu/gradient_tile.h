/* gradient_tile.h: the gradient of one tile of scores, which every backward pass starts from. */
#ifndef FA_CPU_GRADIENT_TILE_H
#define FA_CPU_GRADIENT_TILE_H

#include "job.h"

/* P and dS of a tile, and the operands they came from. Layouts: queries [m][dim], keys [64][dim], transposed keys [dim][64]. */
typedef struct {
  void *q, *dout;    /* loaded by fa_load_query_side */
  void *k, *kt, *vt; /* loaded by fa_load_key_side; k only where dq is wanted */
  void *p;           /* [m][64] exp(score - lse), times the dropout multiplier if there is dropout: what dv needs */
  void *ds;          /* [m][64] gradient of the score after softcap */
  void *softcap;     /* [m][64] d(score)/d(product * scale), only with softcap */
  void *multiplier;  /* [64] dropout */
  double *shift;     /* [m] lse as an exponent of 2; loaded by fa_load_query_side */
  double *p_sum;     /* [m] sums of exp(score - lse) over the tile, before dropout; only for the exact row sums (see backward_rows.c) */
  double *distances; /* [m] the same times |i + off - j|, only with ALiBi's gradient */
} fa_gradient_tiles;

fa_gradient_tiles fa_carve_gradient_tiles(const fa_job *job, fa_arena *arena);
/* A second set of k, kt and vt. */
void fa_carve_key_side(const fa_job *job, fa_gradient_tiles *t, fa_arena *arena);

void fa_load_key_side(const fa_head *head, fa_gradient_tiles *t, int n0, int columns);
void fa_load_query_side(const fa_head *head, fa_gradient_tiles *t, int m0, int rows);

/* Fills a patch of p and ds. delta[r] is rowsum(dout * out) - dlse of row m0 + r. Returns 1 when some pair may be invisible: such pairs
 * have p and ds exactly 0, whatever the operands hold there. */
int fa_gradient_patch(const fa_head *head, fa_gradient_tiles *t, const double *delta, int m0, int n0, int columns, const fa_patch *patch);

/* The same for a whole tile, with 0 in every column that is not there. */
void fa_gradient_tile(const fa_head *head, fa_gradient_tiles *t, const double *delta, int m0, int rows, int n0, int columns);

#endif
