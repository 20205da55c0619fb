/* plain.h: attention one pair at a time, for what need not be fast: fp64 and probs. A warp owns a query row; its lanes take 32 keys at a time.
 *
 * Expects REAL, the type of the arithmetic, and DTYPE.
 */
#ifndef FA_PLAIN_H
#define FA_PLAIN_H

#include "score.h"

#define PLAIN_WARPS 4 /* rows of a CTA */

FA_INLINE REAL plain_max(REAL x) {
  for (int step = 16; step; step /= 2) {
    REAL other = __shfl_xor_sync(0xFFFFFFFFu, x, step);
    x = other > x ? other : x;
  }
  return x;
}

FA_INLINE REAL plain_sum(REAL x) {
  for (int step = 16; step; step /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, step);
  return x;
}

/* One query row against the keys that the rules leave it: [lo, hi). */
typedef struct {
  const fa_arg_problem *p;
  fa_tile tile;
  fa_score_head head;
  int row, lo, hi;
  const char *q_gmem, *k_gmem, *v_gmem;
  int64_t q_dim, k_row, k_dim, v_row, v_dim; /* strides in elements */
  const char *blocks;                        /* block mask at (b, h, block of the row, 0), or 0 */
} plain_row;

FA_INLINE plain_row plain_row_of(const fa_forward_args *args, const fa_tile *tile, int row) {
  const fa_arg_problem *p = &args->problem;
  int h_k = tile->h / p->group, used = row < tile->len_q;
  plain_row r;
  r.p = p;
  r.tile = *tile;
  r.row = row;
  r.lo = used ? fa_row_lo(p->rule, tile->len_q, tile->len_k, row) : 0;
  r.hi = used ? fa_row_hi(p->rule, tile->len_q, tile->len_k, row) : 0;
  r.q_gmem = fa_head_base(&args->q, ELEMENT_BYTES, tile->b, tile->h, tile->q_start + row);
  r.k_gmem = fa_head_base(&args->k, ELEMENT_BYTES, tile->b, h_k, tile->k_start);
  r.v_gmem = fa_head_base(&args->v, ELEMENT_BYTES, tile->b, h_k, tile->k_start);
  r.q_dim = args->q.d, r.k_row = args->k.s, r.k_dim = args->k.d, r.v_row = args->v.s, r.v_dim = args->v.d;
  r.blocks = 0;
  if (r.hi > r.lo) r.head = fa_score_of_head(p, tile);
  if (p->block_mask.data)
    r.blocks =
        (const char *)p->block_mask.data + tile->b * p->block_mask.b + tile->h * p->block_mask.h + row / p->block_size * p->block_mask.m;
  return r;
}

/* The score of key j, -infinity outside [lo, hi) and where a mask forbids the pair. */
FA_INLINE REAL plain_score(const plain_row *r, int j) {
  if (j < r->lo || j >= r->hi) return fa_minus_infinity();
  if (r->blocks && !r->blocks[j / r->p->block_size * r->p->block_mask.n]) return fa_minus_infinity();
  REAL product = 0;
  for (int d = 0; d < r->p->dim_qk; d++)
    product += fa_load_real(r->q_gmem, DTYPE, d * r->q_dim) * fa_load_real(r->k_gmem, DTYPE, j * r->k_row + d * r->k_dim);
  return fa_score_at(r->p, &r->head, product, r->row, j);
}

#endif
