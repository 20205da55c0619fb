/* engine.c: the CUDA engine's forward pass: plan -> workspace -> launches. The backward pass is in engine_bwd.c. */
#include "engine.h"

#include "launch.h"
#include "plan_sm90.h"

static fa_forward_args arguments_of(const fa_problem *problem, const fa_forward_plan *plan, char *workspace) {
  return (fa_forward_args){
      .problem = fa_arg_of_problem(problem),
      .q = fa_arg_of_view(&problem->q),
      .k = fa_arg_of_view(&problem->k),
      .v = fa_arg_of_view(&problem->v),
      .out = fa_arg_of_view(&problem->out),
      .lse = fa_arg_of_view(&problem->lse),
      .probs = fa_arg_of_view(&problem->probs),
      .tiles = plan->tiles,
      .splits = plan->splits,
      .partial_out = workspace,
      .partial_lse = workspace ? workspace + plan->partial_lse_offset : NULL,
  };
}

fa_code fa_cuda_forward(const fa_problem *problem, const fa_context *context, fa_error *error) {
  fa_device_limits limits;
  fa_forward_plan plan;
  char *workspace;
  fa_code code = fa_limits_of(problem, &limits, error);
  if (code == FA_OK) code = fa_plan_forward(problem, &limits, &plan, error);
  if (code == FA_OK) code = fa_workspace(context, plan.workspace_bytes, &workspace, error);
  if (code != FA_OK) return code;

  void *stream = context ? context->stream : NULL;
  fa_forward_args arguments = arguments_of(problem, &plan, workspace);
  code = fa_plan_is_sm90(&plan) ? fa_launch_forward_sm90(problem, &plan, &arguments, workspace, stream, error)
                                : fa_launch(problem->device_index, &plan.main, &arguments, stream, error);
  if (code == FA_OK && plan.combine.kernel) {
    arguments.tiles = plan.combine_tiles;
    code = fa_launch(problem->device_index, &plan.combine, &arguments, stream, error);
  }
  if (code == FA_OK && plan.probs.kernel) code = fa_launch(problem->device_index, &plan.probs, &arguments, stream, error);
  return code;
}

fa_code fa_cuda_explain(const fa_problem *problem, fa_direction direction, char *text, size_t bytes, fa_error *error) {
  fa_device_limits limits;
  fa_code code = fa_limits_of(problem, &limits, error);
  if (code != FA_OK) return code;
  return direction == FA_BACKWARD ? fa_explain_backward(problem, &limits, text, bytes, error)
                                  : fa_explain_forward(problem, &limits, text, bytes, error);
}
