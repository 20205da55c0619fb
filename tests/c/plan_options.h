/* plan_options.h: what both plan tools share: options in words, tensors that nobody reads, the problem of the forward pass, the device. Set `words`
 * and `count` first.
 */
#ifndef PLAN_OPTIONS_H
#define PLAN_OPTIONS_H

#include <stdlib.h>
#include <string.h>

#include "core/problem.h"
#include "cuda/driver.h"

static int count;
static char **words;

/* NAME=NUMBER on the command line, or `otherwise`. */
static inline long long number(const char *name, long long otherwise) {
  size_t length = strlen(name);
  for (int i = 1; i < count; i++)
    if (!strncmp(words[i], name, length) && words[i][length] == '=') return atoll(words[i] + length + 1);
  return otherwise;
}

typedef struct {
  fa_dtype dtype;
  int packed; /* 2: with the lengths' upper bounds */
  int64_t batch, heads_q, heads_k, seqlen_q, seqlen_k, dim_qk, dim_v, block;
} plan_shape;

static inline plan_shape shape_option(void) {
  plan_shape s = {.dtype = (fa_dtype)number("dtype", FA_BF16), .packed = (int)number("packed", 0), .batch = number("batch", 2)};
  s.heads_q = number("heads_q", 16);
  s.heads_k = number("heads_k", s.heads_q);
  s.seqlen_q = number("seqlen_q", 1024);
  s.seqlen_k = number("seqlen_k", s.seqlen_q);
  s.dim_qk = number("dim_qk", 128);
  s.dim_v = number("dim_v", s.dim_qk);
  s.block = number("block", 0);
  return s;
}

/* At an address of its own. */
static inline fa_tensor tensor(fa_dtype dtype, int ndim, int64_t a, int64_t b, int64_t c, int64_t d) {
  static uintptr_t next = (uintptr_t)1 << 40;
  fa_tensor t = {.dtype = dtype, .device = FA_CUDA, .ndim = ndim, .shape = {a, b, c, d}};
  int64_t stride = 1;
  for (int i = ndim - 1; i >= 0; i--) t.stride[i] = stride, stride *= t.shape[i];
  t.data = (void *)next;
  next += (uintptr_t)1 << 32;
  return t;
}

/* q, k, v and the like; `shift` bytes off their alignment. */
static inline fa_tensor rows(const plan_shape *s, int64_t seqlen, int64_t heads, int64_t dim) {
  fa_tensor t = s->packed ? tensor(s->dtype, 3, s->batch * seqlen, heads, dim, 1) : tensor(s->dtype, 4, s->batch, seqlen, heads, dim);
  t.data = (char *)t.data + number("shift", 0);
  return t;
}

static inline fa_request request_of(const plan_shape *s) {
  fa_request r = {.visibility.causal = (fa_causal)number("causal", 0), .deterministic = (int32_t)number("deterministic", 0)};
  r.q = rows(s, s->seqlen_q, s->heads_q, s->dim_qk);
  r.k = rows(s, s->seqlen_k, s->heads_k, s->dim_qk);
  r.v = rows(s, s->seqlen_k, s->heads_k, s->dim_v);
  if (s->packed) r.lengths.cu_seqlens_q = r.lengths.cu_seqlens_k = tensor(FA_I32, 1, s->batch + 1, 1, 1, 1);
  if (s->packed == 2) {
    r.lengths.has_max_q = r.lengths.has_max_k = 1;
    r.lengths.max_seqlen_q = s->seqlen_q, r.lengths.max_seqlen_k = s->seqlen_k;
  }
  if (s->block) {
    const int64_t blocks_q = (s->seqlen_q + s->block - 1) / s->block, blocks_k = (s->seqlen_k + s->block - 1) / s->block;
    r.visibility.block_mask = tensor(FA_BOOL, 4, 1, 1, blocks_q, blocks_k);
  }
  r.visibility.block_size = s->block;
  r.score.softcap = (double)number("softcap", 0);
  r.dropout.p = (double)number("dropout_percent", 0) / 100;
  return r;
}

static inline fa_device_limits device_option(void) {
  int smem = (int)number("smem", 232448), cc = (int)number("cc", 90);
  return (fa_device_limits){.cc_major = cc / 10,
                            .cc_minor = cc % 10,
                            .sm_count = (int)number("sm_count", 132),
                            .smem_per_block_optin = smem,
                            .smem_per_sm = smem + 1024};
}

#endif
