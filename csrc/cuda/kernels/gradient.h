/* gradient.h: from the two products of a pair, q.k and dout.v, to its weight P and the gradient dS of its score.
 *
 *     P  = exp(score - lse)                       times 1 / (1 - p) or 0 under dropout, for dv
 *     dS = P * (dout.v * multiplier - delta)      gradient of the bias; times d(cap(x))/dx for q and k
 *
 * A pair that is not visible has P = dS = 0 exactly, whatever the operands hold. Expects REAL, SCORE (1: any of softcap, bias, mask,
 * ALiBi) and DROPOUT.
 */
#ifndef FA_GRADIENT_H
#define FA_GRADIENT_H

#include "args_bwd.h"
#include "score.h"
#include "softmax.h"

#define PLUS_INFINITY __int_as_float(0x7f800000)

/* ---- where a CTA's tile lies ---- */

/* Packed: keys behind the last sequence are written as padding, like fa_slack_tile. */
FA_INLINE int fa_slack_keys(const fa_arg_problem *p, int n0, fa_tile *tile) {
  int64_t start = fa_max(0, p->cu_k.data[p->batch * p->cu_k.stride]);
  tile->b = p->batch;
  tile->m0 = n0;
  tile->q_start = 0;
  tile->k_start = start;
  tile->slot_q = tile->len_q = tile->len_k = 0;
  tile->slot_k = (int)(p->total_k - start);
  return start + n0 < p->total_k;
}

/* Key tile `index` of a sequence, or when packed of all sequences in one row: m0 counts keys, h is a key head. Returns 0 when there is no such tile. */
FA_INLINE int fa_key_tile_at(const fa_arg_problem *p, int keys, int b, int h, int index, fa_tile *tile) {
  int count;
  tile->split = 0;
  tile->h = h;
  tile->b = b;
  if (p->packed && !fa_find_sequence(p->cu_k, p->batch, keys, index, &tile->b, &index, &count)) return fa_slack_keys(p, index * keys, tile);
  tile->m0 = index * keys;
  fa_read_lengths(p, tile);
  return tile->m0 < tile->slot_k;
}

/* The tile of this CTA. The grid counts, from the fastest: tile, key head, batch entry. The first tile comes first: under a causal mask it is the
 * longest. */
FA_INLINE int fa_find_key_tile(const fa_arg_problem *p, int tiles, int keys, fa_tile *tile) {
  unsigned left = blockIdx.x / (unsigned)tiles, heads = (unsigned)p->heads_k;
  return fa_key_tile_at(p, keys, (int)(left / heads), (int)(left % heads), (int)(blockIdx.x % (unsigned)tiles), tile);
}

/* False when the block mask rules out the whole tile. Tiles never straddle two blocks: the plan sees to it. */
FA_INLINE int fa_in_block_mask(const fa_arg_problem *p, int b, int h, int m0, int n0) {
  if (!p->block_size) return 1;
  const fa_arg_grid *mask = &p->block_mask;
  return ((const char *)mask->data)[b * mask->b + h * mask->h + m0 / p->block_size * mask->m + n0 / p->block_size * mask->n] != 0;
}

/* ---- one head ---- */

typedef struct {
  fa_score_head score;
  fa_philox_key dropout;
  int b, h, len_q, len_k;
} fa_gradient_head;

FA_INLINE fa_gradient_head fa_gradient_of_head(const fa_arg_problem *p, const fa_tile *tile, int h) {
  fa_gradient_head head;
  fa_tile query_head = *tile;
  query_head.h = h;
  head.score = fa_score_of_head(p, &query_head);
  if (DROPOUT) head.dropout = fa_dropout_key_of(p);
  head.b = tile->b;
  head.h = h;
  head.len_q = tile->len_q;
  head.len_k = tile->len_k;
  return head;
}

/* The keys that row i sees by the causal and window rules; none past the end of the sequence. */
FA_INLINE fa_range fa_keys_of_row(const fa_arg_problem *p, const fa_gradient_head *head, int i) {
  fa_range keys = {fa_row_lo(p->rule, head->len_q, head->len_k, i), i < head->len_q ? fa_row_hi(p->rule, head->len_q, head->len_k, i) : 0};
  return keys;
}

/* 1 when every row of [m0, m0 + rows) that exists sees every key of [n0, n0 + columns). */
FA_INLINE int fa_tile_is_full(const fa_arg_problem *p, const fa_gradient_head *head, int m0, int rows, int n0, int columns) {
  fa_range keys = fa_unmasked_keys(p->rule, head->len_q, head->len_k, m0, fa_min(m0 + rows, head->len_q));
  return keys.lo <= n0 && n0 + columns <= keys.hi;
}

/* ---- one pair ---- */

/* lse comes as fa_gradient_args.lse_rows has it: in base 2 for 16-bit elements, so that an exponent is one multiply-add; natural for
 * fp32 and fp64, where the rounding of score * log2(e) would show when scores are large. */
FA_INLINE REAL fa_weight(REAL score, REAL lse) {
  if (sizeof(REAL) == 8) return (REAL)exp((double)(score - lse));
  if (DTYPE == FA_ARG_F32) return (REAL)ex2_approx((float)(score - lse) * LOG2E);
  return (REAL)ex2_approx(__fmaf_rn((float)score, LOG2E, -(float)lse));
}

/* ---- the gradient of a slope ----
 *
 * It is - sum of dS * |i + off - j| over all pairs, a small difference of large sums: an error of delta or of lse counts as often as the mean
 * distance says. So each row has four sums over its keys, in which both drop out. */
typedef struct {
  double p, p_dp, p_dist, p_dp_dist;
} fa_slope_sums;

/* One row's part. lse as in fa_weight; the sink, if there is one, has its share of the weights. */
FA_INLINE double fa_slope_of_row(const fa_gradient_args *args, const fa_tile *tile, int row, const fa_slope_sums *sums, REAL lse) {
  const fa_arg_view *dlse = &args->dlse;
  if (sums->p == 0) return 0;
  double total = sums->p + (double)fa_weight(fa_sink_of_head(&args->problem, tile->h), lse), delta = sums->p_dp / total;
  if (dlse->data) delta -= (double)*(const REAL *)fa_head_base(dlse, sizeof(REAL), tile->b, tile->h, tile->q_start + row);
  return (delta * sums->p_dist - sums->p_dp_dist) / total;
}

/* *s: q.k, becomes the weight for dv. *dp: dout.v, becomes dS before the cap. Returns d(cap(x))/dx. `sums`, if not 0, are the row's. */
FA_INLINE REAL fa_gradient_of_pair(const fa_arg_problem *p, const fa_gradient_head *head, REAL *s, REAL *dp, int visible, int i, int j,
                                   REAL lse, REAL delta, int dropped, fa_slope_sums *sums) {
  REAL score = *s * head->score.scale, slope_of_cap = 1;
  if (SCORE && visible) {
    REAL shift = fa_shift(p, &head->score, i, j);
    visible = shift != fa_minus_infinity();
    REAL capped = fa_cap(&head->score, *s);
    if (head->score.softcap != 0) slope_of_cap = 1 - (capped / head->score.softcap) * (capped / head->score.softcap);
    score = capped + shift;
  }
  REAL weight = visible ? fa_weight(score, lse) : 0, keep = DROPOUT ? (REAL)p->keep_scale : 1;
  REAL kept = visible && !dropped ? *dp * keep : 0;
  if (sums) {
    int distance = i + head->score.off - j;
    double p_dist = (double)weight * (distance < 0 ? -distance : distance);
    sums->p += weight, sums->p_dp += (double)weight * kept, sums->p_dist += p_dist, sums->p_dp_dist += p_dist * kept;
  }
  *dp = visible ? weight * (kept - delta) : 0;
  *s = dropped ? 0 : weight * keep;
  return visible ? slope_of_cap : 0;
}

#endif
