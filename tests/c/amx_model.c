/* amx_model.c: the door through which tests/test_amx.py runs the AMX passes, built on the emulated instructions of amx_emulated.h. */
#include "csrc/core/problem.h"
#include "csrc/cpu/amx.h"

int amx_run(const fa_request *request, int backward, fa_error *error) {
  fa_problem problem;
  fa_direction direction = backward ? FA_BACKWARD : FA_FORWARD;
  fa_code code = fa_problem_init(&problem, request, direction, 1, error);
  if (code != FA_OK) return code;
  return backward ? fa_cpu_backward_amx(&problem, error) : fa_cpu_forward_amx(&problem, error);
}
