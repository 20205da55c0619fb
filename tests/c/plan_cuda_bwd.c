/* plan_cuda_bwd.c: prints the backward plan of the CUDA engine for one problem on one made-up device, or the error. No driver, no GPU.
 *
 *     plan_cuda_bwd NAME=NUMBER ...
 */
#include <stdio.h>

#include "cuda/plan_bwd.h"
#include "plan_options.h"

static fa_request with_gradients(const plan_shape *s) {
  fa_request r = request_of(s);
  const fa_dtype statistic = s->dtype == FA_F64 ? FA_F64 : FA_F32;
  r.out = r.grad.dout = rows(s, s->seqlen_q, s->heads_q, s->dim_v);
  r.lse = s->packed ? tensor(statistic, 2, s->heads_q, s->batch * s->seqlen_q, 1, 1)
                    : tensor(statistic, 3, s->batch, s->heads_q, s->seqlen_q, 1);
  if (number("dq", 1)) r.grad.dq = rows(s, s->seqlen_q, s->heads_q, s->dim_qk);
  if (number("dk", 1)) r.grad.dk = rows(s, s->seqlen_k, s->heads_k, s->dim_qk);
  if (number("dv", 1)) r.grad.dv = rows(s, s->seqlen_k, s->heads_k, s->dim_v);
  if (number("alibi", 0)) r.score.alibi_slopes = r.grad.dalibi = tensor(statistic, 1, s->heads_q, 1, 1, 1);
  if (number("sinks", 0)) r.score.sinks = r.grad.dsinks = tensor(s->dtype, 1, s->heads_q, 1, 1, 1);
  if (number("bias", 0)) r.score.bias = r.grad.dbias = tensor(s->dtype, 4, 1, s->heads_q, s->seqlen_q, s->seqlen_k);
  return r;
}

int main(int argc, char **argv) {
  count = argc;
  words = argv;
  const plan_shape shape = shape_option();
  const fa_request r = with_gradients(&shape);
  const fa_device_limits limits = device_option();
  fa_problem problem;
  fa_error error;
  char text[8192];
  fa_code code = fa_problem_init(&problem, &r, FA_BACKWARD, 1, &error);
  if (code == FA_OK) code = fa_explain_backward(&problem, &limits, text, sizeof text, &error);
  puts(code == FA_OK ? text : error.message);
  return (int)code;
}
