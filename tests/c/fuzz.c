/* fuzz.c: random requests through the public API, meant for a build with sanitizers.
 *
 *   fuzz [seconds [seed]]
 *
 * Every tensor has its own allocation of exactly the bytes that its shape and strides reach, so a sanitizer sees one element too many.
 * Gaps between elements are poisoned: with NaN where the library reads, with a pattern that must survive where it writes. Each call
 * either does its work, or refuses with a message that starts with the name of an argument and writes nothing.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "csrc/core/numeric.h"
#include "csrc/core/problem.h"
#include "csrc/flash_attn.h"

static uint64_t random_state;

static uint32_t draw(void) {
  random_state = random_state * 6364136223846793005u + 1442695040888963407u;
  return (uint32_t)(random_state >> 33);
}

static int below(int n) { return (int)(draw() % (uint32_t)n); }
static int one_in(int n) { return below(n) == 0; }
static double uniform(void) { return draw() / 2147483648.0 * 2 - 1; }

/* ---- Tensors ---- */

enum { POOL = 32, GAP = 0xAB };

typedef struct {
  unsigned char *memory;
  size_t bytes;
  fa_tensor tensor;
} allocation;

static allocation pool[POOL];
static int pool_count;

/* Random order of the axes in memory and random gaps between the steps of each. */
static void random_strides(fa_tensor *t) {
  int order[FA_MAX_DIMS];
  int64_t stride = 1 + (one_in(6) ? 1 + below(2) : 0);
  for (int i = 0; i < t->ndim; i++) order[i] = t->ndim - 1 - i;
  for (int i = t->ndim - 1; i > 0; i--)
    if (one_in(3)) {
      int j = below(i + 1), swap = order[i];
      order[i] = order[j];
      order[j] = swap;
    }
  for (int i = 0; i < t->ndim; i++) {
    t->stride[order[i]] = stride;
    stride *= t->shape[order[i]] > 0 ? t->shape[order[i]] : 1;
    if (one_in(5)) stride += below(5);
  }
}

static size_t reach(const fa_tensor *t) {
  int64_t last = 0;
  for (int i = 0; i < t->ndim; i++) {
    if (t->shape[i] == 0) return 0;
    last += (t->shape[i] - 1) * t->stride[i];
  }
  return (size_t)(last + 1) * (size_t)fa_dtype_bytes(t->dtype);
}

static fa_tensor make(fa_dtype dtype, int ndim, const int64_t *shape, int with_random_strides) {
  allocation *a = &pool[pool_count++];
  fa_tensor t = {.dtype = dtype, .ndim = ndim};
  int64_t compact = 1;
  for (int i = 0; i < ndim; i++) t.shape[i] = shape[i];
  for (int i = ndim - 1; i >= 0; i--) {
    t.stride[i] = compact;
    compact *= shape[i];
  }
  if (with_random_strides) random_strides(&t);
  a->bytes = reach(&t);
  a->memory = malloc(a->bytes ? a->bytes : 1);
  memset(a->memory, GAP, a->bytes);
  t.data = a->memory;
  a->tensor = t;
  return t;
}

static void put(const fa_tensor *t, int64_t offset, double value) {
  switch (t->dtype) {
    case FA_F64: ((double *)t->data)[offset] = value; break;
    case FA_F32: ((float *)t->data)[offset] = (float)value; break;
    case FA_F16: ((uint16_t *)t->data)[offset] = fa_to_f16((float)value); break;
    case FA_BF16: ((uint16_t *)t->data)[offset] = fa_to_bf16((float)value); break;
    default: ((unsigned char *)t->data)[offset] = value > -0.5; break;
  }
}

static double get(const fa_tensor *t, int64_t offset) {
  switch (t->dtype) {
    case FA_F64: return ((double *)t->data)[offset];
    case FA_F32: return ((float *)t->data)[offset];
    case FA_F16: return fa_from_f16(((uint16_t *)t->data)[offset]);
    default: return fa_from_bf16(((uint16_t *)t->data)[offset]);
  }
}

/* Calls visit for the offset of every element. */
static void each(const fa_tensor *t, void (*visit)(const fa_tensor *t, int64_t offset, void *context), void *context) {
  int64_t index[FA_MAX_DIMS] = {0}, count = 1;
  for (int i = 0; i < t->ndim; i++) count *= t->shape[i];
  for (; count > 0; count--) {
    int64_t offset = 0;
    for (int i = 0; i < t->ndim; i++) offset += index[i] * t->stride[i];
    visit(t, offset, context);
    for (int i = t->ndim - 1; i >= 0 && ++index[i] == t->shape[i]; i--) index[i] = 0;
  }
}

static void put_random(const fa_tensor *t, int64_t offset, void *context) {
  (void)context;
  put(t, offset, uniform());
}

static void clear_bytes(const fa_tensor *t, int64_t offset, void *context) {
  (void)t;
  size_t size = (size_t)fa_dtype_bytes(t->dtype);
  memset((unsigned char *)context + (size_t)offset * size, GAP, size);
}

static void count_not_finite(const fa_tensor *t, int64_t offset, void *context) { *(int *)context += !isfinite(get(t, offset)); }

static fa_tensor input(fa_dtype dtype, int ndim, const int64_t *shape) {
  fa_tensor t = make(dtype, ndim, shape, 1);
  if (dtype != FA_BOOL) memset(pool[pool_count - 1].memory, 0xFF, pool[pool_count - 1].bytes); /* NaN in every float type */
  each(&t, put_random, NULL);
  return t;
}

/* 1 when a byte between the elements of a written tensor changed, or any byte when nothing may have been written. */
static int gaps_changed(const allocation *a, int refused) {
  unsigned char *copy = malloc(a->bytes ? a->bytes : 1);
  int changed = 0;
  memcpy(copy, a->memory, a->bytes);
  if (!refused) each(&a->tensor, clear_bytes, copy);
  for (size_t i = 0; i < a->bytes; i++) changed |= copy[i] != GAP;
  free(copy);
  return changed;
}

/* ---- Requests ---- */

typedef struct {
  fa_dtype dtype, stat;
  int batch, heads_q, heads_k, len_q, len_k, dim, dim_v, packed;
} sizes;

static sizes random_sizes(void) {
  static const fa_dtype dtypes[] = {FA_F32, FA_F64, FA_F16, FA_BF16};
  sizes z = {.dtype = dtypes[below(4)], .heads_k = 1 + below(3), .packed = one_in(3)};
  z.stat = z.dtype == FA_F64 ? FA_F64 : FA_F32;
  z.heads_q = z.heads_k * (1 + below(3));
  z.batch = one_in(20) ? 0 : 1 + below(3);
  z.len_q = one_in(15) ? 0 : 1 + below(one_in(4) ? 150 : 40);
  z.len_k = one_in(15) ? 0 : 1 + below(one_in(4) ? 150 : 40);
  z.dim = 1 + below(one_in(8) ? 256 : 40);
  z.dim_v = one_in(3) ? 1 + below(one_in(8) ? 256 : 40) : z.dim;
  return z;
}

static fa_tensor like_q(const sizes *z, int length, int heads, int dim, fa_layout layout, int is_input) {
  int64_t bshd[4] = {z->batch, length, heads, dim}, bhsd[4] = {z->batch, heads, length, dim},
          flat[3] = {(int64_t)z->batch * length, heads, dim};
  const int64_t *shape = z->packed ? flat : layout == FA_BHSD ? bhsd : bshd;
  int ndim = z->packed ? 3 : 4;
  return is_input ? input(z->dtype, ndim, shape) : make(z->dtype, ndim, shape, 1);
}

static fa_tensor statistic(const sizes *z, int is_input) {
  int64_t dense[3] = {z->batch, z->heads_q, z->len_q}, flat[2] = {z->heads_q, (int64_t)z->batch * z->len_q};
  const int64_t *shape = z->packed ? flat : dense;
  int ndim = z->packed ? 2 : 3;
  return is_input ? input(z->stat, ndim, shape) : make(z->stat, ndim, shape, 1);
}

/* Rising from 0 to at most total, in batch + 1 entries. */
static fa_tensor cumulative(const sizes *z, int length) {
  int64_t count = z->batch + 1;
  fa_tensor t = make(FA_I32, 1, &count, 0);
  int32_t *entries = t.data;
  entries[0] = 0;
  for (int b = 1; b <= z->batch; b++) {
    int room = b * length - entries[b - 1];
    entries[b] = entries[b - 1] + (one_in(4) ? 0 : below(room + 1));
  }
  return t;
}

static fa_tensor used(const sizes *z, const fa_tensor *cumulative_lengths, int length) {
  int64_t count = z->batch;
  fa_tensor t = make(FA_I32, 1, &count, 0);
  for (int b = 0; b < z->batch; b++) {
    const int32_t *cu = cumulative_lengths->data;
    int slot = z->packed ? cu[b + 1] - cu[b] : length;
    ((int32_t *)t.data)[b] = below(slot + 1);
  }
  return t;
}

static fa_tensor broadcast_input(const sizes *z, fa_dtype dtype) {
  int64_t shape[4] = {one_in(2) ? 1 : z->batch, one_in(2) ? 1 : z->heads_q, one_in(4) ? 1 : z->len_q, one_in(4) ? 1 : z->len_k};
  int skip = one_in(3) ? 2 : 0;
  return input(dtype, 4 - skip, shape + skip);
}

static void add_lengths(fa_request *r, const sizes *z) {
  if (z->packed) {
    r->lengths.cu_seqlens_q = cumulative(z, z->len_q);
    r->lengths.cu_seqlens_k = cumulative(z, z->len_k);
    r->lengths.has_max_q = r->lengths.has_max_k = 1;
    r->lengths.max_seqlen_q = z->len_q * (int64_t)z->batch;
    r->lengths.max_seqlen_k = z->len_k * (int64_t)z->batch;
  }
  if (one_in(4)) r->lengths.seqused_q = used(z, &r->lengths.cu_seqlens_q, z->len_q);
  if (one_in(4)) r->lengths.seqused_k = used(z, &r->lengths.cu_seqlens_k, z->len_k);
}

static void add_features(fa_request *r, const sizes *z) {
  int64_t per_head[2] = {z->batch, z->heads_q};
  int64_t blocks[4] = {z->batch, z->heads_q, (z->len_q + 63) / 64, (z->len_k + 63) / 64};
  if (one_in(3)) r->visibility.causal = one_in(2) ? FA_BOTTOM_RIGHT : FA_TOP_LEFT;
  if (one_in(4)) {
    r->visibility.has_window = 1;
    r->visibility.window_left = one_in(3) ? FA_UNBOUNDED : below(50);
    r->visibility.window_right = one_in(3) ? FA_UNBOUNDED : below(50);
  }
  if (one_in(5)) r->score.softcap = 1 + below(20);
  if (one_in(5)) r->score.has_scale = 1, r->score.scale = uniform();
  if (one_in(5)) r->dropout.p = (1 + below(99)) / 100.0, r->dropout.seed = draw(), r->dropout.offset = draw();
  if (one_in(5)) r->score.alibi_slopes = one_in(2) ? input(z->stat, 1, per_head + 1) : input(z->stat, 2, per_head);
  if (one_in(5)) r->score.sinks = input(one_in(2) ? FA_F32 : z->dtype, 1, per_head + 1);
  if (z->packed) return; /* the rest needs tensors over max_seqlen, which here is the total */
  if (one_in(4)) r->visibility.mask = broadcast_input(z, FA_BOOL);
  if (one_in(4)) r->score.bias = broadcast_input(z, one_in(2) ? FA_F32 : z->dtype);
  if (one_in(5)) r->visibility.block_mask = input(FA_BOOL, 4, blocks), r->visibility.block_size = 64;
}

static void add_gradients(fa_request *r, const sizes *z) {
  r->grad.dout = like_q(z, z->len_q, z->heads_q, z->dim_v, r->layout, 1);
  if (one_in(3)) r->grad.dlse = statistic(z, 1);
}

/* One random damage; the result may still be legal. */
static void damage(fa_request *r) {
  fa_tensor *tensors[] = {
      &r->q, &r->k, &r->v, &r->out, &r->lse, &r->score.bias, &r->visibility.mask, &r->score.sinks, &r->lengths.seqused_k};
  fa_tensor *t = tensors[below(9)];
  switch (below(8)) {
    case 0: t->dtype = one_in(2) ? FA_OTHER : FA_I64; break;
    case 1: t->ndim = below(FA_MAX_DIMS + 1); break;
    case 2: r->dropout.p = uniform() * 3; break;
    case 3: r->score.softcap = one_in(2) ? NAN : -1; break;
    case 4: r->visibility.has_window = 1, r->visibility.window_left = -1 - below(5); break;
    case 5: r->visibility.block_size = below(200); break;
    case 6: t->device = FA_DEVICE_OTHER; break;
    default: r->out.read_only = 1; break;
  }
}

/* ---- One round ---- */

static int names_argument(const char *message) {
  static const char names[] =
      " q k v out lse bias mask alibi_slopes sinks block_mask cu_seqlens_q cu_seqlens_k seqused_q seqused_k rng_state probs causal window "
      "scale "
      "softcap dropout_p block_size max_seqlen_q max_seqlen_k layout dout dlse dq dk dv dbias dalibi_slopes dsinks ";
  char word[32];
  const char *colon = strchr(message, ':');
  if (!colon || colon - message > 24) return 0;
  snprintf(word, sizeof word, " %.*s ", (int)(colon - message), message);
  return strstr(names, word) != NULL;
}

/* Tensors of the pool from `first` on are those that the call writes. Returns the number of faults. */
static int check(fa_code code, const fa_error *error, int first, const fa_tensor *finite) {
  int faults = 0;
  if (code != FA_OK && !names_argument(error->message)) faults++;
  for (int i = first; i < pool_count; i++) faults += gaps_changed(&pool[i], code != FA_OK);
  if (code == FA_OK && finite) each(finite, count_not_finite, &faults);
  if (faults) fprintf(stderr, "%d faults, code %d: %s\n", faults, (int)code, error->message);
  return faults;
}

static int backward_round(fa_request *r, const sizes *z) {
  fa_error error = {FA_OK, ""};
  add_gradients(r, z);
  int first = pool_count;
  if (!one_in(8)) r->grad.dq = make(z->dtype, r->q.ndim, r->q.shape, 1);
  if (!one_in(8)) r->grad.dk = make(z->dtype, r->k.ndim, r->k.shape, 1);
  if (!one_in(8)) r->grad.dv = make(z->dtype, r->v.ndim, r->v.shape, 1);
  if (r->score.bias.dtype && one_in(2)) r->grad.dbias = make(r->score.bias.dtype, r->score.bias.ndim, r->score.bias.shape, 1);
  if (r->score.sinks.dtype && one_in(2)) r->grad.dsinks = make(r->score.sinks.dtype, 1, r->score.sinks.shape, 1);
  if (r->score.alibi_slopes.dtype && one_in(2))
    r->grad.dalibi = make(r->score.alibi_slopes.dtype, r->score.alibi_slopes.ndim, r->score.alibi_slopes.shape, 1);
  fa_code code = fa_backward(r, NULL, &error);
  return check(code, &error, first, r->grad.dq.dtype ? &r->grad.dq : NULL);
}

static int one_round(int *refused) {
  fa_error error = {FA_OK, ""};
  fa_request r;
  sizes z = random_sizes();
  memset(&r, 0, sizeof r);
  pool_count = 0;
  r.layout = one_in(2) ? FA_BHSD : FA_BSHD;
  r.q = like_q(&z, z.len_q, z.heads_q, z.dim, r.layout, 1);
  r.k = like_q(&z, z.len_k, z.heads_k, z.dim, r.layout, 1);
  r.v = like_q(&z, z.len_k, z.heads_k, z.dim_v, r.layout, 1);
  add_lengths(&r, &z);
  add_features(&r, &z);
  int first = pool_count;
  r.out = like_q(&z, z.len_q, z.heads_q, z.dim_v, r.layout, 0);
  r.lse = statistic(&z, 0);
  int damaged = one_in(6);
  if (damaged) damage(&r);
  fa_code code = fa_forward(&r, NULL, &error);
  int faults = check(code, &error, first, damaged ? NULL : &r.out);
  *refused += code != FA_OK;
  if (code != FA_OK && !damaged) {
    fprintf(stderr, "refused with nothing wrong: %s\n", error.message);
    faults++;
  }
  if (code == FA_OK && !damaged) faults += backward_round(&r, &z);
  for (int i = 0; i < pool_count; i++) free(pool[i].memory);
  return faults;
}

int main(int argc, char **argv) {
  double seconds = argc > 1 ? atof(argv[1]) : 10;
  uint64_t seed = argc > 2 ? strtoull(argv[2], NULL, 10) : 1;
  int rounds = 0, refused = 0, failed = 0;
  time_t end = time(NULL) + (time_t)seconds;
  while (time(NULL) < end) {
    random_state = seed + (uint64_t)rounds * 0x9E3779B97F4A7C15u;
    if (one_round(&refused)) {
      failed++;
      fprintf(stderr, "in round %d of seed %llu\n", rounds, (unsigned long long)seed);
    }
    rounds++;
  }
  printf("%d rounds, %d refused; %d passed, %d failed\n", rounds, refused, rounds - failed, failed);
  return failed != 0;
}
