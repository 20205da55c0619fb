/* plan_cuda_bwd.c: prints the backward plan of the CUDA engine for one problem on one made-up device, or the error. No driver, no GPU.
 *
 *     plan_cuda_bwd NAME=NUMBER ...
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cuda/plan_bwd.h"

static int count;
static char **words;

static long long number(const char *name, long long otherwise) {
  size_t length = strlen(name);
  for (int i = 1; i < count; i++)
    if (!strncmp(words[i], name, length) && words[i][length] == '=') return atoll(words[i] + length + 1);
  return otherwise;
}

/* Addresses that nobody reads. */
static fa_tensor tensor(fa_dtype dtype, int ndim, int64_t a, int64_t b, int64_t c, int64_t d) {
  static uintptr_t next = (uintptr_t)1 << 40;
  fa_tensor t = {.dtype = dtype, .device = FA_CUDA, .ndim = ndim, .shape = {a, b, c, d}};
  int64_t stride = 1;
  for (int i = ndim - 1; i >= 0; i--) t.stride[i] = stride, stride *= t.shape[i];
  t.data = (void *)next;
  next += (uintptr_t)1 << 32;
  return t;
}

static fa_tensor rows(fa_dtype dtype, int packed, int64_t batch, int64_t seqlen, int64_t heads, int64_t dim) {
  return packed ? tensor(dtype, 3, batch * seqlen, heads, dim, 1) : tensor(dtype, 4, batch, seqlen, heads, dim);
}

int main(int argc, char **argv) {
  count = argc;
  words = argv;
  fa_dtype dtype = (fa_dtype)number("dtype", FA_BF16), statistic = dtype == FA_F64 ? FA_F64 : FA_F32;
  int packed = (int)number("packed", 0);
  int64_t batch = number("batch", 2), heads_q = number("heads_q", 16), heads_k = number("heads_k", heads_q),
          seqlen_q = number("seqlen_q", 1024);
  int64_t seqlen_k = number("seqlen_k", seqlen_q), dim_qk = number("dim_qk", 128), dim_v = number("dim_v", dim_qk),
          block = number("block", 0);
  fa_request r = {.visibility.causal = (fa_causal)number("causal", 0), .deterministic = (int32_t)number("deterministic", 0)};
  r.q = rows(dtype, packed, batch, seqlen_q, heads_q, dim_qk);
  r.k = rows(dtype, packed, batch, seqlen_k, heads_k, dim_qk);
  r.v = rows(dtype, packed, batch, seqlen_k, heads_k, dim_v);
  r.out = r.grad.dout = rows(dtype, packed, batch, seqlen_q, heads_q, dim_v);
  r.lse = packed ? tensor(statistic, 2, heads_q, batch * seqlen_q, 1, 1) : tensor(statistic, 3, batch, heads_q, seqlen_q, 1);
  if (number("dq", 1)) r.grad.dq = rows(dtype, packed, batch, seqlen_q, heads_q, dim_qk);
  if (number("dk", 1)) r.grad.dk = rows(dtype, packed, batch, seqlen_k, heads_k, dim_qk);
  if (number("dv", 1)) r.grad.dv = rows(dtype, packed, batch, seqlen_k, heads_k, dim_v);
  if (packed) r.lengths.cu_seqlens_q = r.lengths.cu_seqlens_k = tensor(FA_I32, 1, batch + 1, 1, 1, 1);
  if (block) r.visibility.block_mask = tensor(FA_BOOL, 4, 1, 1, (seqlen_q + block - 1) / block, (seqlen_k + block - 1) / block);
  r.visibility.block_size = block;
  r.score.softcap = (double)number("softcap", 0);
  r.dropout.p = (double)number("dropout_percent", 0) / 100;
  if (number("alibi", 0)) r.score.alibi_slopes = r.grad.dalibi = tensor(statistic, 1, heads_q, 1, 1, 1);
  if (number("sinks", 0)) r.score.sinks = r.grad.dsinks = tensor(dtype, 1, heads_q, 1, 1, 1);
  if (number("bias", 0)) r.score.bias = r.grad.dbias = tensor(dtype, 4, 1, heads_q, seqlen_q, seqlen_k);

  int smem = (int)number("smem", 232448);
  fa_device_limits limits = {.cc_major = 9, .sm_count = 132, .smem_per_block_optin = smem, .smem_per_sm = smem + 1024};
  fa_problem problem;
  fa_error error;
  char text[8192];
  fa_code code = fa_problem_init(&problem, &r, FA_BACKWARD, 1, &error);
  if (code == FA_OK) code = fa_explain_backward(&problem, &limits, text, sizeof text, &error);
  puts(code == FA_OK ? text : error.message);
  return (int)code;
}
