/* dispatch.c: the public functions: check the request once, then hand it to the engine of its device. */
#include <stdio.h>
#include <string.h>

#include "../cpu/engine.h"
#include "../cuda/engine.h"
#include "error.h"
#include "problem.h"

fa_code fa_forward(const fa_request *request, const fa_context *context, fa_error *error) {
  fa_problem problem;
  fa_code code = fa_problem_init(&problem, request, FA_FORWARD, 1, error);
  if (code != FA_OK) return code;
  return problem.device == FA_CUDA ? fa_cuda_forward(&problem, context, error) : fa_cpu_run(&problem, FA_FORWARD, error);
}

fa_code fa_backward(const fa_request *request, const fa_context *context, fa_error *error) {
  fa_problem problem;
  fa_code code = fa_problem_init(&problem, request, FA_BACKWARD, 1, error);
  if (code != FA_OK) return code;
  return problem.device == FA_CUDA ? fa_cuda_backward(&problem, context, error) : fa_cpu_run(&problem, FA_BACKWARD, error);
}

fa_code fa_explain(const fa_request *request, int backward, char *text, size_t bytes, fa_error *error) {
  fa_problem problem;
  fa_direction direction = backward ? FA_BACKWARD : FA_FORWARD;
  fa_code code = fa_problem_init(&problem, request, direction, 0, error);
  if (code != FA_OK) return code;
  return problem.device == FA_CUDA ? fa_cuda_explain(&problem, direction, text, bytes, error)
                                   : fa_cpu_explain(&problem, direction, text, bytes, error);
}

fa_code fa_describe(char *text, size_t bytes, fa_error *error) {
  char cpu[1024], cuda[8192];
  fa_cpu_describe(cpu, sizeof cpu);
  fa_cuda_describe(cuda, sizeof cuda);
  int needed = snprintf(text, bytes, "{\"cpu\": %s, \"cuda\": %s}", cpu, cuda);
  if (needed < 0 || (size_t)needed >= bytes)
    return fa_fail(error, FA_ERR_VALUE, "text: %zu bytes are too few, %d needed", bytes, needed + 1);
  return FA_OK;
}
