/* engine_bwd.c: the CUDA engine's backward pass. */
#include "../core/error.h"
#include "engine.h"
#include "plan.h"

fa_code fa_cuda_backward(const fa_problem *problem, const fa_context *context, fa_error *error) {
  (void)problem, (void)context;
  return fa_fail(error, FA_ERR_UNSUPPORTED, "q: no CUDA backward in this build");
}

fa_code fa_explain_backward(const fa_problem *problem, const fa_device_limits *limits, char *text, size_t bytes, fa_error *error) {
  (void)problem, (void)limits, (void)text, (void)bytes;
  return fa_fail(error, FA_ERR_UNSUPPORTED, "q: no CUDA backward in this build");
}
