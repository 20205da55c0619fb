/* list_kernels.c: runs the CUDA engine's host side on a model of a GPU for the shapes that users train and serve with. The fake NVRTC notes
 * the kernels it asks for: that is the list of shipped kernels (list_kernels.py).
 *
 *     list_kernels FAKE_DRIVER CC_MAJOR CC_MINOR SMEM_BYTES SM_COUNT
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>

#include "flash_attn.h"

typedef struct {
  fa_dtype dtype;
  int dim_qk, dim_v, batch, heads_q, heads_k, seqlen_q, seqlen_k;
  fa_causal causal;
  int packed;
} shape;

/* Addresses that only a GPU would read: never touched here. */
static void *next_address(size_t bytes) {
  static char *address = (char *)(1ull << 40);
  void *result = address;
  address += (bytes + 4095) / 4096 * 4096;
  return result;
}

static void *alloc(void *context, size_t bytes) {
  (void)context;
  return next_address(bytes);
}

static fa_tensor tensor(fa_dtype dtype, int ndim, int64_t a, int64_t b, int64_t c, int64_t d) {
  fa_tensor t = {.dtype = dtype, .device = FA_CUDA, .ndim = ndim, .shape = {a, b, c, d}};
  int64_t stride = 1;
  for (int i = ndim - 1; i >= 0; i--) {
    t.stride[i] = stride;
    stride *= t.shape[i];
  }
  t.data = next_address((size_t)stride * 8);
  return t;
}

static fa_tensor rows(const shape *s, int seqlen, int heads, int dim) {
  return s->packed ? tensor(s->dtype, 3, (int64_t)s->batch * seqlen, heads, dim, 1) : tensor(s->dtype, 4, s->batch, seqlen, heads, dim);
}

static fa_request request_of(const shape *s) {
  fa_request r = {.layout = FA_BSHD, .visibility.causal = s->causal};
  const fa_dtype lse = s->dtype == FA_F64 ? FA_F64 : FA_F32;
  r.q = rows(s, s->seqlen_q, s->heads_q, s->dim_qk);
  r.k = rows(s, s->seqlen_k, s->heads_k, s->dim_qk);
  r.v = rows(s, s->seqlen_k, s->heads_k, s->dim_v);
  r.out = rows(s, s->seqlen_q, s->heads_q, s->dim_v);
  r.lse =
      s->packed ? tensor(lse, 2, s->heads_q, (int64_t)s->batch * s->seqlen_q, 1, 1) : tensor(lse, 3, s->batch, s->heads_q, s->seqlen_q, 1);
  if (s->packed) {
    r.lengths.cu_seqlens_q = tensor(FA_I32, 1, s->batch + 1, 1, 1, 1);
    r.lengths.cu_seqlens_k = tensor(FA_I32, 1, s->batch + 1, 1, 1, 1);
    r.lengths.has_max_q = r.lengths.has_max_k = 1;
    r.lengths.max_seqlen_q = s->seqlen_q;
    r.lengths.max_seqlen_k = s->seqlen_k;
  }
  r.grad.dout = rows(s, s->seqlen_q, s->heads_q, s->dim_v);
  r.grad.dq = rows(s, s->seqlen_q, s->heads_q, s->dim_qk);
  r.grad.dk = rows(s, s->seqlen_k, s->heads_k, s->dim_qk);
  r.grad.dv = rows(s, s->seqlen_k, s->heads_k, s->dim_v);
  return r;
}

static int run(const fa_request *request, int with_backward) {
  const fa_context context = {.alloc = alloc};
  fa_request forward = *request;
  fa_error error = {0};
  forward.grad = (fa_gradients){0};
  fa_code code = fa_forward(&forward, &context, &error);
  if (!code && with_backward) code = fa_backward(request, &context, &error);
  if (code)
    fprintf(stderr, "dtype %d, q of %d dims, %lld x %lld x %lld x %lld: %s\n", request->q.dtype, request->q.ndim,
            (long long)request->q.shape[0], (long long)request->q.shape[1], (long long)request->q.shape[2], (long long)request->q.shape[3],
            error.message);
  return code != FA_OK;
}

static int run_shape(const shape *s, int with_backward) {
  const fa_request request = request_of(s);
  return run(&request, with_backward);
}

/* Training: forward and backward, with and without a mask, equal and grouped heads, long and short, dense and packed. */
static int training(fa_dtype dtype, int dim_qk, int dim_v) {
  static const int lengths[] = {512, 1024, 4096, 16384};
  int failures = 0;
  for (int length = 0; length < 4; length++)
    for (int causal = 0; causal < 2; causal++)
      for (int group = 1; group <= 8; group *= 8)
        for (int packed = 0; packed < 2; packed++) {
          const int seqlen = lengths[length], heads = 2048 / dim_qk < 8 ? 8 : 2048 / dim_qk / 8 * 8;
          const fa_causal mask = causal ? FA_BOTTOM_RIGHT : FA_NOT_CAUSAL;
          const shape s = {dtype, dim_qk, dim_v, 16384 / seqlen, heads, heads / group, seqlen, seqlen, mask, packed};
          failures += run_shape(&s, 1);
        }
  return failures;
}

/* Serving: one new query, or a few, against a long cache: split over keys and combined; a large batch: not split. */
static int serving(fa_dtype dtype, int dim) {
  static const int lengths[] = {1, 128};
  int failures = 0;
  for (int length = 0; length < 2; length++)
    for (int group = 1; group <= 8; group *= 8)
      for (int batch = 1; batch <= 128; batch *= 128) {
        const shape s = {dtype, dim, dim, batch, 8, 8 / group, lengths[length], 65536, FA_BOTTOM_RIGHT, 0};
        failures += run_shape(&s, 0);
      }
  return failures;
}

enum { DROPOUT, SOFTCAP, BIAS, MASK, ALIBI, SINKS, BLOCK_MASK, DETERMINISTIC, FEATURES };

/* One feature at a time, with its gradient where it has one. */
static int features(fa_dtype dtype, int dim) {
  const int heads = 16, seqlen = 2048;
  const shape s = {dtype, dim, dim, 2, heads, heads, seqlen, seqlen, FA_BOTTOM_RIGHT, 0};
  int failures = 0;
  for (int feature = 0; feature < FEATURES; feature++) {
    fa_request r = request_of(&s);
    if (feature == DROPOUT) r.dropout.p = 0.1, r.dropout.state = tensor(FA_I64, 1, 2, 1, 1, 1);
    if (feature == SOFTCAP) r.score.softcap = 30;
    if (feature == BIAS) r.score.bias = r.grad.dbias = tensor(dtype, 4, 1, heads, seqlen, seqlen);
    if (feature == MASK) r.visibility.mask = tensor(FA_BOOL, 4, 2, 1, seqlen, seqlen);
    if (feature == ALIBI) r.score.alibi_slopes = r.grad.dalibi = tensor(dtype == FA_F64 ? FA_F64 : FA_F32, 1, heads, 1, 1, 1);
    if (feature == SINKS) r.score.sinks = r.grad.dsinks = tensor(dtype, 1, heads, 1, 1, 1);
    if (feature == BLOCK_MASK) r.visibility.block_mask = tensor(FA_BOOL, 4, 1, 1, seqlen / 128, seqlen / 128);
    if (feature == BLOCK_MASK) r.visibility.block_size = 128;
    if (feature == DETERMINISTIC) r.deterministic = 1;
    failures += run(&r, 1);
  }
  return failures;
}

int main(int argc, char **argv) {
  static const char *const names[] = {"cc_major", "cc_minor", "smem", "sm_count"};
  void *fake = argc == 6 ? dlopen(argv[1], RTLD_NOW | RTLD_GLOBAL) : NULL;
  void (*set)(const char *, long long) = NULL;
  if (fake) *(void **)&set = dlsym(fake, "fake_set");
  if (!set) return 2;
  for (int i = 0; i < 4; i++) set(names[i], atoll(argv[2 + i]));
  set("static_smem", 0); /* of a kernel that was never compiled: unknown */

  static const fa_dtype half_types[] = {FA_BF16, FA_F16};
  static const int dims[] = {64, 96, 128, 192, 256};
  int failures = 0;
  for (int t = 0; t < 2; t++)
    for (int d = 0; d < 5; d++) failures += training(half_types[t], dims[d], dims[d]) + serving(half_types[t], dims[d]);
  for (int d = 0; d < 3; d++) failures += training(FA_F32, dims[d], dims[d]);
  failures += training(FA_BF16, 192, 128) + training(FA_F64, 64, 64);
  for (int d = 0; d <= 2; d += 2) failures += features(FA_BF16, dims[d]) + features(FA_F16, dims[d]);
  failures += features(FA_F32, 64) + features(FA_F64, 64);
  return failures ? 1 : 0;
}
