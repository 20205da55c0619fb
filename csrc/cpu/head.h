/* head.h: one (batch, head) of a problem as the CPU engine walks it: where its rows lie, which tiles it visits, and how a tile of
 * products becomes a tile of scores. Shared by forward, backward and probs. */
#ifndef FA_CPU_HEAD_H
#define FA_CPU_HEAD_H

#include "tier.h"

typedef struct {
  const fa_problem *problem;
  const fa_tile_ops *ops;
  int b, h, h_k;
  fa_sequence seq;
  fa_philox_key dropout_key;
  uint32_t dropout_threshold;
  double slope;   /* ALiBi; 0: none */
  int plain;      /* scores are products * scale, and scale > 0: tiles keep the products */
  double to_log2; /* what turns an element of a score tile into an exponent of 2 */
} fa_head;

/* An entry of sinks or alibi_slopes; 0 when absent. */
double fa_per_head_value(const fa_per_head *t, const fa_tile_ops *ops, int b, int h);

fa_head fa_head_of(const fa_problem *problem, const fa_tile_ops *ops, int b, int h);

/* The key on row m's diagonal: ALiBi measures distances from it. */
static inline int fa_diagonal(const fa_head *head, int m) { return m + head->seq.len_k - head->seq.len_q; }

/* Row `row` of this head's sequence in a tensor of queries (q, out, dout, dq), of keys (k, v, dk, dv) or of statistics. */
void *fa_query_row(const fa_head *head, const fa_view *view, int row);
void *fa_key_row(const fa_head *head, const fa_view *view, int row);
double fa_statistic(const fa_head *head, const fa_view *view, int row);
/* Nothing where the tensor is absent. */
void fa_set_statistic(const fa_head *head, const fa_view *view, int row, double value);

/* Rows [start, start + rows) as a tile. */
void fa_load_queries(const fa_head *head, const fa_view *view, int start, int rows, int dim, void *tile);
void fa_load_keys(const fa_head *head, const fa_view *view, int start, int rows, int dim, void *tile);
/* The same with rows ld elements apart; ld is fa_pad(dim) above. */
void fa_load_query_rows(const fa_head *head, const fa_view *view, int start, int rows, int dim, void *tile, int ld);
void fa_load_key_rows(const fa_head *head, const fa_view *view, int start, int rows, int dim, void *tile, int ld);
/* Asks for rows that will be loaded a tile later: they lie far apart, which the hardware does not foresee. */
void fa_ask_for_queries(const fa_head *head, const fa_view *view, int start, int rows, int dim);
void fa_ask_for_keys(const fa_head *head, const fa_view *view, int start, int rows, int dim);
/* [dim][FA_BLOCK_LD], 0 in columns that are not there. */
void fa_load_keys_transposed(const fa_head *head, const fa_view *view, int start, int rows, int dim, void *tile);

/* The tiles of keys that some row of [m0, m0 + rows) may see: first key (a multiple of FA_BLOCK_N) and end. */
fa_range fa_key_tiles(const fa_head *head, int m0, int rows);

/* False when the block mask rules out the whole tile. Query tiles never straddle two blocks (see fa_block_m). */
int fa_tile_in_block_mask(const fa_head *head, int m0, int n0);

/* Products -> scores, -inf where a pair is not visible, in rows FA_BLOCK_N elements apart. Returns 1 when some pair may be invisible. */
int fa_score_tile(const fa_head *head, int m0, int rows, int n0, int columns, void *s, void *softcap_factor);

enum { FA_PATCH_ROWS = 128 };

/* A part of a tile that is worth computing: at most FA_PATCH_ROWS rows [row, row + rows), columns [lo, hi), both multiples of FA_TILE_PAD. */
typedef struct {
  int row, rows, lo, hi;
} fa_patch;

/* As large as can be where no pair is ruled out by position, else slices of a few rows cut to what they see. Start with a patch of zeros;
 * returns 0 after the last. columns: keys of the tile that are there. */
int fa_next_patch(const fa_head *head, int m0, int rows, int n0, int columns, fa_patch *patch);

/* Products of a patch -> what to_log2 applies to, -inf where a pair is not visible. s and softcap_factor are the patch's. Returns 1 when
 * some pair may be invisible. */
int fa_score_patch(const fa_head *head, int m0, int n0, int columns, const fa_patch *patch, void *s, void *softcap_factor);

fa_dropout_row fa_dropout_of(const fa_head *head, int m, int n0);

enum { FA_MAX_BLOCK_M = 128 };

/* Query rows of a tile: at most FA_MAX_BLOCK_M, and a divisor of the block mask's size. From the shapes alone. */
int fa_block_m(const fa_problem *problem);

#endif
