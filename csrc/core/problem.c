/* problem.c: the only validator. Turns a request into a problem, or says which argument, which value and which limit.
 *
 * Order: the tensors q, k, v; lengths; then (options.c) visibility, scores, dropout; outputs; gradients. Each step may rely on those
 * before it. */
#include "problem.h"

#include <string.h>

#include "check.h"

static const char *const packed_meaning = "(total, heads, dim) with cu_seqlens";
static const char *const dense_meaning[] = {"(batch, seqlen, heads, dim)", "(batch, heads, seqlen, dim)"};

static int is_compute_dtype(fa_dtype dtype) { return dtype == FA_F32 || dtype == FA_F64 || dtype == FA_F16 || dtype == FA_BF16; }

/* A tensor laid out like q: where its batch, head, position and dim axes are. b is -1 when packed. */
typedef struct {
  int b, h, s, d;
} axes;

static axes axes_of(const fa_request *r) {
  if (fa_given(&r->lengths.cu_seqlens_q)) return (axes){-1, 1, 0, 2};
  return r->layout == FA_BHSD ? (axes){0, 1, 2, 3} : (axes){0, 2, 1, 3};
}

static fa_view view_of(const fa_tensor *t, axes a) {
  return (fa_view){t->data, a.b < 0 ? 0 : t->stride[a.b], t->stride[a.h], t->stride[a.s], t->stride[a.d]};
}

static fa_code check_input(const char *name, const fa_tensor *t, const fa_request *r, fa_error *error) {
  if (!fa_given(t)) return fa_fail(error, FA_ERR_TYPE, "%s: is required", name);
  if (t->device == FA_DEVICE_OTHER) return fa_fail(error, FA_ERR_TYPE, "%s: is neither on a CPU nor on a CUDA device", name);
  if (t->dtype == FA_F8_E4M3) return fa_fail(error, FA_ERR_UNSUPPORTED, "%s: dtype float8_e4m3fn is not supported by this version", name);
  if (t->dtype == FA_OTHER)
    return fa_fail(error, FA_ERR_TYPE, "%s: has an unsupported dtype, must be float16, bfloat16, float32 or float64", name);
  if (!is_compute_dtype(t->dtype))
    return fa_fail(error, FA_ERR_TYPE, "%s: dtype %s must be float16, bfloat16, float32 or float64", name, fa_dtype_name(t->dtype));
  TRY(fa_check_device(name, t, &r->q, error));
  if (t->dtype != r->q.dtype)
    return fa_fail(error, FA_ERR_TYPE, "%s: dtype %s must be that of q, %s", name, fa_dtype_name(t->dtype), fa_dtype_name(r->q.dtype));
  if (fa_given(&r->lengths.cu_seqlens_q)) return fa_check_rank(name, t, 3, packed_meaning, error);
  return fa_check_rank(name, t, 4, dense_meaning[r->layout], error);
}

static fa_code check_same(const char *name, const char *what, int64_t value, const char *other, int64_t expected, fa_error *error) {
  if (value == expected) return FA_OK;
  return fa_fail(error, FA_ERR_VALUE, "%s: %s %lld must equal that of %s, %lld", name, what, (long long)value, other, (long long)expected);
}

static fa_code check_head_dim(const char *name, int64_t dim, fa_error *error) {
  if (dim >= 1 && dim <= FA_MAX_HEAD_DIM) return FA_OK;
  return fa_fail(error, FA_ERR_VALUE, "%s: head dim %lld must be in 1..%d", name, (long long)dim, FA_MAX_HEAD_DIM);
}

/* Before the tensors, whose rank depends on it. */
static fa_code check_packed(const fa_request *r, fa_error *error) {
  int has_q = fa_given(&r->lengths.cu_seqlens_q), has_k = fa_given(&r->lengths.cu_seqlens_k);
  if (has_q == has_k) return FA_OK;
  return fa_fail(error, FA_ERR_VALUE, "cu_seqlens_%s: is missing; packed sequences need both cu_seqlens_q and cu_seqlens_k",
                 has_q ? "k" : "q");
}

static fa_code init_tensors(fa_problem *p, const fa_request *r, axes a, fa_error *error) {
  if (r->layout != FA_BSHD && r->layout != FA_BHSD)
    return fa_fail(error, FA_ERR_VALUE, "layout: %d is neither FA_BSHD nor FA_BHSD", (int)r->layout);
  TRY(check_input("q", &r->q, r, error));
  TRY(check_input("k", &r->k, r, error));
  TRY(check_input("v", &r->v, r, error));
  const int64_t *q = r->q.shape, *k = r->k.shape, *v = r->v.shape;
  TRY(check_head_dim("q", q[a.d], error));
  TRY(check_head_dim("v", v[a.d], error));
  TRY(check_same("k", "head dim", k[a.d], "q", q[a.d], error));
  TRY(check_same("v", "heads", v[a.h], "k", k[a.h], error));
  TRY(check_same("v", a.b < 0 ? "total length" : "seqlen", v[a.s], "k", k[a.s], error));
  if (a.b >= 0) {
    TRY(check_same("k", "batch", k[a.b], "q", q[a.b], error));
    TRY(check_same("v", "batch", v[a.b], "q", q[a.b], error));
    TRY(fa_check_at_most("q", "batch", q[a.b], INT32_MAX, error));
  }
  if (q[a.h] < 1 || k[a.h] < 1 || q[a.h] % k[a.h] != 0)
    return fa_fail(error, FA_ERR_VALUE, "k: heads %lld must divide q: heads %lld", (long long)k[a.h], (long long)q[a.h]);
  TRY(fa_check_at_most("q", "heads", q[a.h], INT32_MAX, error));
  TRY(fa_check_at_most("q", "seqlen", q[a.s], a.b < 0 ? INT32_MAX : FA_LENGTH_MAX, error));
  TRY(fa_check_at_most("k", "seqlen", k[a.s], a.b < 0 ? INT32_MAX : FA_LENGTH_MAX, error));

  p->device = r->q.device;
  p->device_index = r->q.device_index;
  p->dtype = r->q.dtype;
  p->heads_q = (int)q[a.h];
  p->heads_k = (int)k[a.h];
  p->group = p->heads_q / p->heads_k;
  p->dim_qk = (int)q[a.d];
  p->dim_v = (int)v[a.d];
  if (a.b >= 0) {
    p->batch = (int)q[a.b];
    p->seqlen_q = (int)q[a.s];
    p->seqlen_k = (int)k[a.s];
  }
  p->total_q = a.b < 0 ? q[a.s] : q[a.s] * q[a.b];
  p->total_k = a.b < 0 ? k[a.s] : k[a.s] * k[a.b];
  p->q = view_of(&r->q, a);
  p->k = view_of(&r->k, a);
  p->v = view_of(&r->v, a);
  return FA_OK;
}

static fa_code check_ints(const char *name, const fa_tensor *t, int64_t count, const fa_request *r, fa_ints *ints, fa_error *error) {
  TRY(fa_check_device(name, t, &r->q, error));
  TRY(fa_check_dtype(name, t, FA_I32, FA_I32, error));
  TRY(fa_check_rank(name, t, 1, "one entry a sequence", error));
  if (count >= 0) TRY(fa_check_shape(name, t, 1, &count, error));
  *ints = (fa_ints){t->data, t->stride[0]};
  return FA_OK;
}

/* CPU only: the entries themselves. Returns the longest sequence in *longest. */
static fa_code check_cumulative(const char *name, fa_ints cu, int batch, int64_t total, int *longest, fa_error *error) {
  if (cu.data[0] != 0) return fa_fail(error, FA_ERR_VALUE, "%s: starts with %d, must start with 0", name, cu.data[0]);
  *longest = 0;
  for (int b = 0; b < batch; b++) {
    int here = cu.data[b * cu.stride], next = cu.data[(b + 1) * cu.stride];
    if (next < here) return fa_fail(error, FA_ERR_VALUE, "%s: decreases from %d to %d at entry %d", name, here, next, b + 1);
    *longest = fa_max(*longest, next - here);
  }
  int last = cu.data[batch * cu.stride];
  if (last > total) return fa_fail(error, FA_ERR_VALUE, "%s: ends with %d, over the total length %lld", name, last, (long long)total);
  return fa_check_at_most(name, "sequence length", *longest, FA_LENGTH_MAX, error);
}

static fa_code check_used(const char *name, fa_ints used, const fa_problem *p, int is_q, fa_error *error) {
  for (int b = 0; b < p->batch; b++) {
    fa_problem slots = *p;
    slots.lengths.used_q.data = slots.lengths.used_k.data = NULL;
    fa_sequence slot = fa_sequence_of(&slots, b);
    int limit = is_q ? slot.slot_q : slot.slot_k, value = used.data[b * used.stride];
    if (value < 0 || value > limit)
      return fa_fail(error, FA_ERR_VALUE, "%s: entry %d is %d, must be in 0..%d (the length of its slot)", name, b, value, limit);
  }
  return FA_OK;
}

static fa_code init_max(const char *name, int given, int64_t value, int64_t total, int longest, int packed, int on_cpu, int *length,
                        fa_error *error) {
  if (given && !packed)
    return fa_fail(error, FA_ERR_VALUE, "%s: %lld is given, but the sequences are not packed (no cu_seqlens)", name, (long long)value);
  if (!packed) return FA_OK;
  if (!given) {
    int64_t bound = on_cpu ? longest : total;
    *length = (int)(bound < FA_LENGTH_MAX ? bound : FA_LENGTH_MAX);
    return FA_OK;
  }
  if (value < 0 || value > FA_LENGTH_MAX)
    return fa_fail(error, FA_ERR_VALUE, "%s: %lld must be in 0..%d", name, (long long)value, FA_LENGTH_MAX);
  if (on_cpu && value < longest)
    return fa_fail(error, FA_ERR_VALUE, "%s: %lld is below the longest sequence, %d", name, (long long)value, longest);
  *length = (int)value;
  return FA_OK;
}

static fa_code init_lengths(fa_problem *p, const fa_request *r, fa_error *error) {
  const fa_lengths *l = &r->lengths;
  int has_q = fa_given(&l->cu_seqlens_q), on_cpu = p->device == FA_CPU;
  int longest_q = 0, longest_k = 0;
  p->lengths.packed = has_q;
  if (has_q) {
    TRY(check_ints("cu_seqlens_q", &l->cu_seqlens_q, -1, r, &p->lengths.cu_q, error));
    if (l->cu_seqlens_q.shape[0] < 1) return fa_fail(error, FA_ERR_VALUE, "cu_seqlens_q: is empty, must have batch + 1 entries");
    TRY(fa_check_at_most("cu_seqlens_q", "entries", l->cu_seqlens_q.shape[0], INT32_MAX, error));
    TRY(check_ints("cu_seqlens_k", &l->cu_seqlens_k, l->cu_seqlens_q.shape[0], r, &p->lengths.cu_k, error));
    p->batch = (int)l->cu_seqlens_q.shape[0] - 1;
    if (on_cpu) {
      TRY(check_cumulative("cu_seqlens_q", p->lengths.cu_q, p->batch, p->total_q, &longest_q, error));
      TRY(check_cumulative("cu_seqlens_k", p->lengths.cu_k, p->batch, p->total_k, &longest_k, error));
    }
  }
  TRY(init_max("max_seqlen_q", l->has_max_q, l->max_seqlen_q, p->total_q, longest_q, has_q, on_cpu, &p->seqlen_q, error));
  TRY(init_max("max_seqlen_k", l->has_max_k, l->max_seqlen_k, p->total_k, longest_k, has_q, on_cpu, &p->seqlen_k, error));
  p->lengths.bounds_given = !has_q || on_cpu || (l->has_max_q && l->has_max_k);
  if (fa_given(&l->seqused_q)) {
    TRY(check_ints("seqused_q", &l->seqused_q, p->batch, r, &p->lengths.used_q, error));
    if (on_cpu) TRY(check_used("seqused_q", p->lengths.used_q, p, 1, error));
  }
  if (fa_given(&l->seqused_k)) {
    TRY(check_ints("seqused_k", &l->seqused_k, p->batch, r, &p->lengths.used_k, error));
    if (on_cpu) TRY(check_used("seqused_k", p->lengths.used_k, p, 0, error));
  }
  return FA_OK;
}

/* out, lse and their gradients: like q with dim_v, and one statistic a row. */
static fa_code check_like_q(const char *name, const fa_tensor *t, const fa_tensor *like, int64_t dim, axes a, const fa_request *r,
                            fa_view *view, fa_error *error) {
  int64_t shape[FA_MAX_DIMS];
  memcpy(shape, like->shape, sizeof shape);
  shape[a.d] = dim;
  TRY(fa_check_device(name, t, &r->q, error));
  TRY(fa_check_dtype(name, t, r->q.dtype, r->q.dtype, error));
  TRY(fa_check_shape(name, t, like->ndim, shape, error));
  *view = view_of(t, a);
  return FA_OK;
}

static fa_code check_statistic(const char *name, const fa_tensor *t, const fa_problem *p, const fa_request *r, fa_view *view,
                               fa_error *error) {
  fa_dtype dtype = fa_statistics_dtype(p->dtype);
  int64_t dense[3] = {p->batch, p->heads_q, p->seqlen_q}, packed[2] = {p->heads_q, p->total_q};
  TRY(fa_check_device(name, t, &r->q, error));
  TRY(fa_check_dtype(name, t, dtype, dtype, error));
  TRY(p->lengths.packed ? fa_check_shape(name, t, 2, packed, error) : fa_check_shape(name, t, 3, dense, error));
  *view = p->lengths.packed ? (fa_view){t->data, 0, t->stride[0], t->stride[1], 0}
                            : (fa_view){t->data, t->stride[0], t->stride[1], t->stride[2], 0};
  return FA_OK;
}

static fa_code init_outputs(fa_problem *p, const fa_request *r, axes a, fa_direction direction, int need, fa_error *error) {
  const struct {
    const char *name;
    const fa_tensor *t;
  } outputs[] = {{"out", &r->out}, {"lse", &r->lse}, {"probs", &r->probs}};
  /* The CPU's forward pass can do without lse; kernels always write it. */
  const int needed[] = {need, need && (direction == FA_BACKWARD || p->device == FA_CUDA), 0};
  for (int i = 0; i < 3; i++) {
    if (needed[i] && !fa_given(outputs[i].t)) return fa_fail(error, FA_ERR_TYPE, "%s: is required", outputs[i].name);
    if (fa_given(outputs[i].t) && direction == FA_FORWARD) TRY(fa_check_writable(outputs[i].name, outputs[i].t, error));
  }
  if (fa_given(&r->out)) TRY(check_like_q("out", &r->out, &r->q, p->dim_v, a, r, &p->out, error));
  if (fa_given(&r->lse)) TRY(check_statistic("lse", &r->lse, p, r, &p->lse, error));
  if (!fa_given(&r->probs)) return FA_OK;
  if (direction == FA_BACKWARD) return fa_fail(error, FA_ERR_VALUE, "probs: is an output of the forward pass only");
  int64_t shape[4] = {p->batch, p->heads_q, (p->seqlen_q + 127ll) / 128 * 128, (p->seqlen_k + 127ll) / 128 * 128};
  TRY(fa_check_bounds_given("probs", p, error));
  TRY(fa_check_device("probs", &r->probs, &r->q, error));
  TRY(fa_check_dtype("probs", &r->probs, p->dtype, p->dtype, error));
  TRY(fa_check_shape("probs", &r->probs, 4, shape, error));
  p->probs = (fa_view){r->probs.data, r->probs.stride[0], r->probs.stride[1], r->probs.stride[2], r->probs.stride[3]};
  return FA_OK;
}

static fa_code init_gradients(fa_problem *p, const fa_request *r, axes a, int need, fa_error *error) {
  const fa_gradients *g = &r->grad;
  const struct {
    const char *name, *of;
    const fa_tensor *t, *needs;
  } written[] = {{"dq", "q", &g->dq, &r->q},
                 {"dk", "k", &g->dk, &r->k},
                 {"dv", "v", &g->dv, &r->v},
                 {"dbias", "bias", &g->dbias, &r->score.bias},
                 {"dalibi_slopes", "alibi_slopes", &g->dalibi, &r->score.alibi_slopes},
                 {"dsinks", "sinks", &g->dsinks, &r->score.sinks}};
  for (int i = 0; i < 6; i++) {
    if (!fa_given(written[i].t)) continue;
    if (!fa_given(written[i].needs)) return fa_fail(error, FA_ERR_VALUE, "%s: is given without %s", written[i].name, written[i].of);
    TRY(fa_check_writable(written[i].name, written[i].t, error));
    TRY(fa_check_dtype(written[i].name, written[i].t, written[i].needs->dtype, written[i].needs->dtype, error));
    TRY(fa_check_shape(written[i].name, written[i].t, written[i].needs->ndim, written[i].needs->shape, error));
  }
  if (fa_given(&g->dout))
    TRY(check_like_q("dout", &g->dout, &r->q, p->dim_v, a, r, &p->grad.dout, error));
  else if (need)
    return fa_fail(error, FA_ERR_TYPE, "dout: is required");
  if (fa_given(&g->dlse)) TRY(check_statistic("dlse", &g->dlse, p, r, &p->grad.dlse, error));
  if (fa_given(&g->dq)) TRY(check_like_q("dq", &g->dq, &r->q, p->dim_qk, a, r, &p->grad.dq, error));
  if (fa_given(&g->dk)) TRY(check_like_q("dk", &g->dk, &r->k, p->dim_qk, a, r, &p->grad.dk, error));
  if (fa_given(&g->dv)) TRY(check_like_q("dv", &g->dv, &r->v, p->dim_v, a, r, &p->grad.dv, error));
  if (fa_given(&g->dbias)) {
    int64_t full[4] = {p->batch, p->heads_q, p->seqlen_q, p->seqlen_k};
    TRY(fa_check_device("dbias", &g->dbias, &r->q, error));
    TRY(fa_broadcast("dbias", &g->dbias, full, &p->grad.dbias, error));
  }
  if (fa_given(&g->dalibi)) TRY(fa_check_alibi("dalibi_slopes", &g->dalibi, p, r, &p->grad.dalibi, error));
  if (fa_given(&g->dsinks)) TRY(fa_check_sinks("dsinks", &g->dsinks, p, r, &p->grad.dsinks, error));
  return FA_OK;
}

fa_code fa_problem_init(fa_problem *problem, const fa_request *request, fa_direction direction, int need_outputs, fa_error *error) {
  fa_problem p;
  memset(&p, 0, sizeof p);
  axes a = axes_of(request);
  TRY(check_packed(request, error));
  p.deterministic = request->deterministic;
  TRY(init_tensors(&p, request, a, error));
  TRY(init_lengths(&p, request, error));
  TRY(fa_init_visibility(&p, request, error));
  TRY(fa_init_score(&p, request, error));
  TRY(fa_init_dropout(&p, request, error));
  TRY(init_outputs(&p, request, a, direction, need_outputs, error));
  if (direction == FA_BACKWARD) TRY(init_gradients(&p, request, a, need_outputs, error));
  *problem = p;
  return FA_OK;
}
