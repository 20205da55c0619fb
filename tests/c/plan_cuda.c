/* plan_cuda.c: prints the forward plan of the CUDA engine for one problem on one made-up device, or the error. No driver, no GPU.
 *
 *     plan_cuda NAME=NUMBER ...
 */
#include <stdio.h>

#include "cuda/plan.h"
#include "plan_options.h"

int main(int argc, char **argv) {
  count = argc;
  words = argv;
  const plan_shape shape = shape_option();
  const fa_request r = request_of(&shape);
  const fa_device_limits limits = device_option();
  fa_problem problem;
  fa_error error;
  char text[4096];
  fa_code code = fa_problem_init(&problem, &r, FA_FORWARD, 0, &error);
  if (code == FA_OK) code = fa_explain_forward(&problem, &limits, text, sizeof text, &error);
  puts(code == FA_OK ? text : error.message);
  return (int)code;
}
