/* engine_bwd.c: the CUDA engine's backward pass: plan -> workspace -> launches. */
#include "engine.h"
#include "kernels/args_bwd.h"
#include "launch.h"
#include "plan_bwd_sm90.h"
#include "plan_bwd_wide.h"

static fa_arg_bias_gradient bias_gradient(const fa_grid *g) {
  return (fa_arg_bias_gradient){fa_arg_of_grid(g), g->batch, g->heads, g->rows, g->columns};
}

static void *at(char *workspace, size_t offset) { return workspace && offset ? workspace + offset : NULL; }

static fa_gradient_args arguments_of(const fa_problem *p, const fa_backward_plan *plan, char *workspace) {
  return (fa_gradient_args){
      .problem = fa_arg_of_problem(p),
      .q = fa_arg_of_view(&p->q),
      .k = fa_arg_of_view(&p->k),
      .v = fa_arg_of_view(&p->v),
      .out = fa_arg_of_view(&p->out),
      .lse = fa_arg_of_view(&p->lse),
      .dout = fa_arg_of_view(&p->grad.dout),
      .dlse = fa_arg_of_view(&p->grad.dlse),
      .dq = fa_arg_of_view(&p->grad.dq),
      .dk = fa_arg_of_view(&p->grad.dk),
      .dv = fa_arg_of_view(&p->grad.dv),
      .dbias = bias_gradient(&p->grad.dbias),
      .dalibi = fa_arg_of_heads(&p->grad.dalibi),
      .dsinks = fa_arg_of_heads(&p->grad.dsinks),
      .pad_tiles = plan->pad_tiles,
      .key_tiles = plan->key_tiles,
      .row_tiles = plan->row_tiles,
      .row_tile = plan->row_tile,
      .dq_columns = plan->dq_columns,
      .workspace_rows = plan->workspace_rows,
      .lse_rows = workspace,
      .delta_rows = at(workspace, plan->delta_offset),
      .dq_sum = at(workspace, plan->dq_sum_offset),
      .dalibi_tiles = at(workspace, plan->dalibi_offset),
  };
}

fa_code fa_cuda_backward(const fa_problem *problem, const fa_context *context, fa_error *error) {
  fa_device_limits limits;
  fa_backward_plan plan;
  char *workspace;
  fa_code code = fa_limits_of(problem, &limits, error);
  if (code == FA_OK) code = fa_plan_backward(problem, &limits, &plan, error);
  if (code == FA_OK) code = fa_workspace(context, plan.workspace_bytes, &workspace, error);
  if (code != FA_OK) return code;
  fa_gradient_args arguments = arguments_of(problem, &plan, workspace);
  void *stream = context ? context->stream : NULL;
  int *queues = at(workspace, plan.queue_offset);
  if (queues) code = fa_driver_memset(problem->device_index, queues, 0, FA_BWD_LAUNCHES * sizeof *queues, stream, error);
  for (int i = 0; i < FA_BWD_LAUNCHES && code == FA_OK; i++)
    if (fa_launch_is_wide(&plan, i))
      code = fa_launch_backward_wide(problem, &plan, i, &arguments, queues ? &queues[i] : NULL, stream, error);
    else if (i == FA_BWD_KEYS && fa_plan_is_backward_sm90(&plan))
      code = fa_launch_backward_sm90(problem, &plan, &arguments, stream, error);
    else if (plan.launches[i].kernel)
      code = fa_launch(problem->device_index, &plan.launches[i], &arguments, stream, error);
  return code;
}
