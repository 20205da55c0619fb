/* amx_gradient.h: the vector work of the AMX backward: products of a cell of 32 keys x 32 queries -> P^T and dS^T as operands, two keys at a
 * time. Both as left operands summed over queries, [key][32 queries], where they fall as they come; dS^T also as a right operand summed
 * over keys, in pairs of keys. */
#ifndef FA_AMX_GRADIENT_H
#define FA_AMX_GRADIENT_H

#include "amx_tile.h"

AMX_BEGIN

/* Products of a cell on their way to P^T and dS^T. One call turns two keys of 32 queries. */
typedef struct {
  const float *s, *dp, *softcap, *dropout; /* the last two may be NULL */
  uint16_t *p, *ds, *ds_pairs;
  int left;                                          /* pairs of keys to go */
  f32x16 factor, shift_0, shift_1, delta_0, delta_1; /* of queries 0..15 and 16..31; shift negated */
} gradient_work;

/* Two keys of 32 queries, as a left operand summed over queries. */
AMX_INLINE void put_rows(uint16_t *to, const int parts, f32x16 x[2][2]) {
  for (int key = 0; key < 2; key++) i32_store(to + key * 32, bf16_rows(x[key][0], x[key][1]));
  if (parts == 1) return;
  f32x16 low[2][2];
  for (int t = 0; t < 2; t++) {
    i32x16 high = bf16_pairs(x[0][t], x[1][t]);
    low[0][t] = f32_sub(x[0][t], bf16_even(high));
    low[1][t] = f32_sub(x[1][t], bf16_odd(high));
  }
  for (int key = 0; key < 2; key++) i32_store(to + 2 * TILE_HALVES + key * 32, bf16_rows(low[key][0], low[key][1]));
}

/* Two keys of 16 queries: p[key], ds[key]. */
AMX_INLINE void gradient_half(const gradient_work *w, const int first, f32x16 shift, f32x16 delta, f32x16 *p_even, f32x16 *p_odd,
                              f32x16 *ds_even, f32x16 *ds_odd) {
  for (int key = 0; key < 2; key++) {
    int at = key * STRIP + first;
    f32x16 weight = f32_exp2(f32_fma(f32_load(w->s + at), w->factor, shift)), dp = f32_load(w->dp + at), used = weight;
    if (w->dropout) {
      f32x16 multiplier = f32_load(w->dropout + at);
      dp = f32_mul(dp, multiplier);
      used = f32_mul(weight, multiplier);
    }
    f32x16 gradient = f32_mul(weight, f32_sub(dp, delta));
    if (w->softcap) gradient = f32_mul(gradient, f32_load(w->softcap + at));
    *(key ? p_odd : p_even) = used;
    *(key ? ds_odd : ds_even) = f32_where_nonzero(weight, gradient);
  }
}

AMX_INLINE void gradient_pair(gradient_work *w, const int parts) {
  f32x16 p[2][2], ds[2][2]; /* [key][half of the queries] */
  if (w->left == 0) return;
  gradient_half(w, 0, w->shift_0, w->delta_0, &p[0][0], &p[1][0], &ds[0][0], &ds[1][0]);
  gradient_half(w, 16, w->shift_1, w->delta_1, &p[0][1], &p[1][1], &ds[0][1], &ds[1][1]);
  put_rows(w->p, parts, p);
  put_rows(w->ds, parts, ds);
  put_pair(w->ds_pairs, parts, ds[0][0], ds[1][0]);
  put_pair(w->ds_pairs + TILE_HALVES, parts, ds[0][1], ds[1][1]);
  w->s += 2 * STRIP;
  w->dp += 2 * STRIP;
  if (w->softcap) w->softcap += 2 * STRIP;
  if (w->dropout) w->dropout += 2 * STRIP;
  w->p += 64;
  w->ds += 64;
  w->ds_pairs += 32;
  w->left--;
}

AMX_INLINE void gradient_tick_1(void *work) { gradient_pair(work, 1); }
AMX_INLINE void gradient_tick_2(void *work) { gradient_pair(work, 2); }

AMX_END

#endif
