/* amx_softmax.h: the vector work of the AMX forward: scores of 64 keys x 32 queries -> P^T as an operand summed over keys, two keys at a
 * time. */
#ifndef FA_AMX_SOFTMAX_H
#define FA_AMX_SOFTMAX_H

#include "amx_tile.h"

AMX_BEGIN

/* Scores on their way to weights: what the vector units do between tile products. One call turns two keys of 32 queries into P^T. */
typedef struct {
  const float *s, *dropout; /* dropout NULL: none */
  uint16_t *p;
  int left, row;                                 /* pairs of keys to go; pairs since the last block of 32 keys */
  f32x16 factor, shift_0, shift_1, sum_0, sum_1; /* of queries 0..15 and 16..31; shift negated */
} softmax_work;

/* Two keys of 16 queries. */
AMX_INLINE void softmax_half(const softmax_work *w, const int first, f32x16 shift, f32x16 *sum, const int parts) {
  f32x16 even = f32_exp2(f32_fma(f32_load(w->s + first), w->factor, shift));
  f32x16 odd = f32_exp2(f32_fma(f32_load(w->s + STRIP + first), w->factor, shift));
  *sum = f32_add(*sum, f32_add(even, odd));
  if (w->dropout) {
    even = f32_mul(even, f32_load(w->dropout + first));
    odd = f32_mul(odd, f32_load(w->dropout + STRIP + first));
  }
  put_pair(w->p + first / 16 * TILE_HALVES, parts, even, odd);
}

AMX_INLINE void softmax_pair(softmax_work *w, const int parts) {
  if (w->left == 0) return;
  softmax_half(w, 0, w->shift_0, &w->sum_0, parts);
  softmax_half(w, 16, w->shift_1, &w->sum_1, parts);
  w->s += 2 * STRIP;
  if (w->dropout) w->dropout += 2 * STRIP;
  w->p += 32;
  w->left--;
  if (++w->row == 16) { /* next block of 32 keys */
    w->p += STRIP_HALVES(parts) - TILE_HALVES;
    w->row = 0;
  }
}

AMX_INLINE void softmax_tick_1(void *work) { softmax_pair(work, 1); }
AMX_INLINE void softmax_tick_2(void *work) { softmax_pair(work, 2); }

AMX_END

#endif
