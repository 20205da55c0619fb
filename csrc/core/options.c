/* options.c: the validator's second half: which pairs exist, how scores come about, dropout. */
#include <float.h>
#include <math.h>

#include "check.h"

fa_code fa_check_bounds_given(const char *name, const fa_problem *p, fa_error *error) {
  if (p->lengths.bounds_given) return FA_OK;
  return fa_fail(error, FA_ERR_VALUE, "%s: needs max_seqlen_q and max_seqlen_k when the sequences are packed", name);
}

static int is_power_of_two(int64_t x) { return (x & (x - 1)) == 0; }

/* The block size that a block count says: the power of two that fits both axes, else the only multiple of 64 that does. 0: none or
 * more than one. One block on an axis fits every size that covers the axis, all of them with the same meaning. */
static int64_t infer_block_size(int64_t rows, int64_t columns, int64_t len_q, int64_t len_k) {
  int64_t longest = len_q > len_k ? len_q : len_k, found = 0, fitting = 0;
  for (int64_t size = 64; size < longest + 64; size += 64) {
    if ((len_q + size - 1) / size != rows || (len_k + size - 1) / size != columns) continue;
    if (is_power_of_two(size)) return size;
    found = size;
    fitting++;
  }
  /* Beyond the longest axis every size means the same: one block each. */
  if (!fitting && rows == (len_q > 0) && columns == (len_k > 0)) return (longest + 127) / 64 * 64;
  return fitting == 1 || (rows <= 1 && columns <= 1) ? found : 0;
}

static fa_code init_block_mask(fa_problem *p, const fa_request *r, fa_error *error) {
  const fa_tensor *t = &r->visibility.block_mask;
  int64_t size = r->visibility.block_size;
  if (!fa_given(t)) {
    if (size != 0) return fa_fail(error, FA_ERR_VALUE, "block_size: %lld is given without a block_mask", (long long)size);
    return FA_OK;
  }
  TRY(fa_check_device("block_mask", t, &r->q, error));
  TRY(fa_check_dtype("block_mask", t, FA_BOOL, FA_BOOL, error));
  TRY(fa_check_rank("block_mask", t, 4, "(1 or batch, 1 or heads, query blocks, key blocks)", error));
  TRY(fa_check_bounds_given("block_mask", p, error));
  if (size < 0 || size % 64 != 0) return fa_fail(error, FA_ERR_VALUE, "block_size: %lld must be a multiple of 64", (long long)size);
  if (size == 0) size = infer_block_size(t->shape[2], t->shape[3], p->seqlen_q, p->seqlen_k);
  if (size == 0)
    return fa_fail(
        error, FA_ERR_VALUE,
        "block_mask: %lld x %lld blocks name no single multiple of 64 for seqlen_q %d and seqlen_k %d; pass (block_mask, block_size)",
        (long long)t->shape[2], (long long)t->shape[3], p->seqlen_q, p->seqlen_k);
  size = size < FA_LENGTH_MAX ? size : FA_LENGTH_MAX;
  int64_t full[4] = {p->batch, p->heads_q, (p->seqlen_q + size - 1) / size, (p->seqlen_k + size - 1) / size};
  if (t->shape[2] != full[2] || t->shape[3] != full[3])
    return fa_fail(error, FA_ERR_VALUE, "block_mask: %lld x %lld blocks, must be %lld x %lld for block size %lld", (long long)t->shape[2],
                   (long long)t->shape[3], (long long)full[2], (long long)full[3], (long long)size);
  p->visibility.block_size = (int)size;
  TRY(fa_broadcast("block_mask", t, full, &p->visibility.block_mask, error));
  p->visibility.block_mask.m = t->stride[2]; /* one block on an axis is not a broadcast */
  p->visibility.block_mask.n = t->stride[3];
  return FA_OK;
}

static fa_code window_bound(const char *side, int64_t bound, int *out, fa_error *error) {
  *out = -1;
  if (bound == FA_UNBOUNDED) return FA_OK;
  if (bound < 0 || bound > INT32_MAX)
    return fa_fail(error, FA_ERR_VALUE, "window: %s bound %lld must be None or in 0..%d", side, (long long)bound, INT32_MAX);
  if (bound < FA_WINDOW_MAX) *out = (int)bound;
  return FA_OK;
}

fa_code fa_init_visibility(fa_problem *p, const fa_request *r, fa_error *error) {
  const fa_visibility *v = &r->visibility;
  fa_rule *rule = &p->visibility.rule;
  if (v->causal != FA_NOT_CAUSAL && v->causal != FA_BOTTOM_RIGHT && v->causal != FA_TOP_LEFT)
    return fa_fail(error, FA_ERR_VALUE, "causal: %d is not one of the fa_causal values", (int)v->causal);
  rule->causal = (int)v->causal;
  rule->window_left = rule->window_right = -1;
  if (v->has_window) {
    TRY(window_bound("left", v->window_left, &rule->window_left, error));
    TRY(window_bound("right", v->window_right, &rule->window_right, error));
    if (rule->causal) rule->window_right = -1; /* causal is the right bound */
  }
  if (fa_given(&v->mask)) {
    int64_t full[4] = {p->batch, p->heads_q, p->seqlen_q, p->seqlen_k};
    TRY(fa_check_device("mask", &v->mask, &r->q, error));
    TRY(fa_check_dtype("mask", &v->mask, FA_BOOL, FA_BOOL, error));
    TRY(fa_check_bounds_given("mask", p, error));
    TRY(fa_broadcast("mask", &v->mask, full, &p->visibility.mask, error));
  }
  return init_block_mask(p, r, error);
}

static fa_code check_finite(const char *name, double value, fa_error *error) {
  if (isfinite(value)) return FA_OK;
  return fa_fail(error, FA_ERR_VALUE, "%s: %g must be finite", name, value);
}

fa_code fa_check_alibi(const char *name, const fa_tensor *t, const fa_problem *p, const fa_request *r, fa_per_head *out, fa_error *error) {
  int64_t shape[2] = {p->batch, p->heads_q};
  TRY(fa_check_device(name, t, &r->q, error));
  TRY(fa_check_dtype(name, t, FA_F32, fa_statistics_dtype(p->dtype), error));
  if (t->ndim == 1)
    TRY(fa_check_shape(name, t, 1, shape + 1, error));
  else
    TRY(fa_check_shape(name, t, 2, shape, error));
  *out = (fa_per_head){t->data, t->dtype, t->ndim == 1 ? 0 : t->stride[0], t->stride[t->ndim - 1]};
  return FA_OK;
}

fa_code fa_check_sinks(const char *name, const fa_tensor *t, const fa_problem *p, const fa_request *r, fa_per_head *out, fa_error *error) {
  int64_t heads = p->heads_q;
  TRY(fa_check_device(name, t, &r->q, error));
  TRY(fa_check_dtype(name, t, p->dtype, FA_F32, error));
  TRY(fa_check_shape(name, t, 1, &heads, error));
  *out = (fa_per_head){t->data, t->dtype, 0, t->stride[0]};
  return FA_OK;
}

fa_code fa_init_score(fa_problem *p, const fa_request *r, fa_error *error) {
  const fa_score *s = &r->score;
  if (s->has_scale) TRY(check_finite("scale", s->scale, error));
  p->score.scale = s->has_scale ? s->scale : 1.0 / sqrt((double)p->dim_qk);
  /* Engines hold it in the arithmetic's type, where it would become 0 behind their checks for 0. */
  if (p->dtype != FA_F64 && fabs(p->score.scale) < FLT_MIN) p->score.scale = 0;
  TRY(check_finite("softcap", s->softcap, error));
  if (s->softcap < 0) return fa_fail(error, FA_ERR_VALUE, "softcap: %g must be 0 (none) or positive", s->softcap);
  p->score.softcap = s->softcap;
  if (p->dtype != FA_F64 && s->softcap > FLT_MAX) p->score.softcap = 0;                                       /* changes no score */
  if (p->dtype != FA_F64 && s->softcap > 0 && s->softcap < FLT_MIN) p->score.scale = 0, p->score.softcap = 0; /* makes each one 0 */
  if (fa_given(&s->bias)) {
    int64_t full[4] = {p->batch, p->heads_q, p->seqlen_q, p->seqlen_k};
    TRY(fa_check_device("bias", &s->bias, &r->q, error));
    TRY(fa_check_dtype("bias", &s->bias, p->dtype, FA_F32, error));
    TRY(fa_check_bounds_given("bias", p, error));
    TRY(fa_broadcast("bias", &s->bias, full, &p->score.bias, error));
  }
  if (fa_given(&s->alibi_slopes)) TRY(fa_check_alibi("alibi_slopes", &s->alibi_slopes, p, r, &p->score.alibi, error));
  if (fa_given(&s->sinks)) TRY(fa_check_sinks("sinks", &s->sinks, p, r, &p->score.sinks, error));
  return FA_OK;
}

fa_code fa_init_dropout(fa_problem *p, const fa_request *r, fa_error *error) {
  const fa_dropout *d = &r->dropout;
  int64_t two = 2;
  if (!(d->p >= 0.0 && d->p < 1.0)) return fa_fail(error, FA_ERR_VALUE, "dropout_p: %g must be in [0, 1)", d->p);
  p->dropout.p = d->p;
  p->dropout.seed = d->seed;
  p->dropout.offset = d->offset;
  if (!fa_given(&d->state)) return FA_OK;
  TRY(fa_check_device("rng_state", &d->state, &r->q, error));
  TRY(fa_check_dtype("rng_state", &d->state, FA_I64, FA_I64, error));
  TRY(fa_check_shape("rng_state", &d->state, 1, &two, error));
  p->dropout.state = d->state.data;
  p->dropout.state_stride = d->state.stride[0];
  return FA_OK;
}
