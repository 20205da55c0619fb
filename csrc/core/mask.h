/* mask.h: which keys a query row sees, and what that means for tiles. Read by both engines; plain C, also under NVRTC.
 *
 * Causal and window rules leave each row i one interval of keys [lo(i), hi(i)), and both ends never decrease with i. So for the
 * rows [m0, m1) of a tile:
 *
 *         keys   lo(m0)      lo(m1-1)          hi(m0)      hi(m1-1)
 *     row m0       |###########|##################|           |
 *     row m1-1     |           |##################|###########|
 *                  |-- mask ---|---- no mask -----|--- mask --|
 *                  '--------------- visit --------------------'
 *
 * Elementwise masks and block masks come on top of this; they only ever take pairs away.
 *
 * All arithmetic is in int: lengths are at most FA_LENGTH_MAX and the validator clamps window bounds to FA_WINDOW_MAX, so no sum overflows.
 */
#ifndef FA_MASK_H
#define FA_MASK_H

#include "portable.h"

#define FA_LENGTH_MAX (1 << 29)
#define FA_WINDOW_MAX (1 << 30) /* any bound this large or larger is no bound */

typedef struct {
  int causal;       /* 0 none, 1 keep j <= i + off, 2 keep j <= i */
  int window_left;  /* keep j >= i + off - left;  -1: unbounded */
  int window_right; /* keep j <= i + off + right; -1: unbounded (always -1 under causal, which is the tighter bound) */
} fa_rule;

typedef struct {
  int lo, hi; /* [lo, hi), empty when hi <= lo */
} fa_range;

FA_INLINE int fa_row_lo(fa_rule rule, int len_q, int len_k, int i) {
  return rule.window_left < 0 ? 0 : fa_max(0, i + (len_k - len_q) - rule.window_left);
}

/* May be below fa_row_lo, even negative: the row then sees nothing. */
FA_INLINE int fa_row_hi(fa_rule rule, int len_q, int len_k, int i) {
  int hi = len_k;
  if (rule.causal == 1) hi = fa_min(hi, i + (len_k - len_q) + 1);
  if (rule.causal == 2) hi = fa_min(hi, i + 1);
  if (rule.window_right >= 0) hi = fa_min(hi, i + (len_k - len_q) + rule.window_right + 1);
  return hi;
}

/* Keys that some row of [m0, m1) sees. */
FA_INLINE fa_range fa_visited_keys(fa_rule rule, int len_q, int len_k, int m0, int m1) {
  fa_range r;
  r.lo = fa_row_lo(rule, len_q, len_k, m0);
  r.hi = fa_row_hi(rule, len_q, len_k, m1 - 1);
  return r;
}

/* Keys that every row of [m0, m1) sees: no masking needed for a key tile inside this range. */
FA_INLINE fa_range fa_unmasked_keys(fa_rule rule, int len_q, int len_k, int m0, int m1) {
  fa_range r;
  r.lo = fa_row_lo(rule, len_q, len_k, m1 - 1);
  r.hi = fa_row_hi(rule, len_q, len_k, m0);
  return r;
}

/* Query rows that see some key of [n0, n1): the backward's view of the same rules. */
FA_INLINE fa_range fa_visiting_rows(fa_rule rule, int len_q, int len_k, int n0, int n1) {
  int off = len_k - len_q;
  fa_range r;
  r.lo = 0;
  r.hi = len_q;
  if (rule.causal == 1) r.lo = fa_max(r.lo, n0 - off);
  if (rule.causal == 2) r.lo = fa_max(r.lo, n0);
  if (rule.window_right >= 0) r.lo = fa_max(r.lo, n0 - off - rule.window_right);
  if (rule.window_left >= 0) r.hi = fa_min(r.hi, n1 - off + rule.window_left);
  return r;
}

#endif
