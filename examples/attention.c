/* attention.c: the C API with no Python: a causal forward and backward pass, one row checked against the plain formula and one gradient
 * against a difference quotient.
 *
 *   python3 setup.py embed
 *   cc -std=gnu11 -O2 -I. examples/attention.c csrc/core/ *.c csrc/cpu/ *.c csrc/cuda/ *.c csrc/cuda/store/ *.c build/embedded_sources.c \
 *      -lm -lpthread -ldl -o attention        (without the blanks before *.c)
 */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "csrc/flash_attn.h"

enum { SEQLEN = 37, HEADS = 2, DIM = 16, COUNT = SEQLEN * HEADS * DIM };

static float q[COUNT], k[COUNT], v[COUNT], out[COUNT], lse[HEADS * SEQLEN], dout[COUNT], dq[COUNT], dk[COUNT], dv[COUNT];

/* A contiguous float32 tensor (1, a, b, c) or, with c == 0, (1, a, b). */
static fa_tensor tensor(float *data, int64_t a, int64_t b, int64_t c) {
  if (!c) return (fa_tensor){.data = data, .dtype = FA_F32, .ndim = 3, .shape = {1, a, b}, .stride = {a * b, b, 1}};
  return (fa_tensor){.data = data, .dtype = FA_F32, .ndim = 4, .shape = {1, a, b, c}, .stride = {a * b * c, b * c, c, 1}};
}

/* Largest error of one row of `out` against softmax(q k / sqrt(dim)) v over the keys that the row sees. */
static double row_error(int head, int row) {
  double sum = 0, expected[DIM] = {0}, worst = 0;
  for (int j = 0; j <= row; j++) {
    double score = 0;
    for (int d = 0; d < DIM; d++) score += q[(row * HEADS + head) * DIM + d] * k[(j * HEADS + head) * DIM + d];
    double p = exp(score / sqrt(DIM));
    sum += p;
    for (int d = 0; d < DIM; d++) expected[d] += p * v[(j * HEADS + head) * DIM + d];
  }
  for (int d = 0; d < DIM; d++) worst = fmax(worst, fabs(expected[d] / sum - out[(row * HEADS + head) * DIM + d]));
  return worst;
}

static double loss(void) {
  double sum = 0;
  for (int i = 0; i < COUNT; i++) sum += (double)out[i] * dout[i];
  return sum;
}

int main(void) {
  fa_error error = {FA_OK, ""};
  fa_request request;
  for (int i = 0; i < COUNT; i++) q[i] = sinf(i), k[i] = cosf(2 * i), v[i] = sinf(3 * i), dout[i] = cosf(i);

  memset(&request, 0, sizeof request);
  request.q = tensor(q, SEQLEN, HEADS, DIM);
  request.k = tensor(k, SEQLEN, HEADS, DIM);
  request.v = tensor(v, SEQLEN, HEADS, DIM);
  request.out = tensor(out, SEQLEN, HEADS, DIM);
  request.lse = tensor(lse, HEADS, SEQLEN, 0);
  request.visibility.causal = FA_BOTTOM_RIGHT;
  if (fa_forward(&request, NULL, &error) != FA_OK) return fprintf(stderr, "%s\n", error.message), 1;
  double forward_error = row_error(1, SEQLEN - 1);

  request.grad.dout = tensor(dout, SEQLEN, HEADS, DIM);
  request.grad.dq = tensor(dq, SEQLEN, HEADS, DIM);
  request.grad.dk = tensor(dk, SEQLEN, HEADS, DIM);
  request.grad.dv = tensor(dv, SEQLEN, HEADS, DIM);
  if (fa_backward(&request, NULL, &error) != FA_OK) return fprintf(stderr, "%s\n", error.message), 1;

  const int probe = 7;
  const float step = 0.05f;
  double low, high;
  k[probe] -= step;
  fa_forward(&request, NULL, &error);
  low = loss();
  k[probe] += 2 * step;
  fa_forward(&request, NULL, &error);
  high = loss();
  double gradient_error = fabs((high - low) / (2 * step) - dk[probe]);

  printf("largest error in the last row %.1e, of one gradient %.1e\n", forward_error, gradient_error);
  return forward_error < 1e-5 && gradient_error < 1e-3 ? 0 : 1;
}
