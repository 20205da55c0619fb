/* plan_bwd_sm90.h: the Hopper backward kernels' part in the plan and in the launch. Pure but for the launch. */
#ifndef FA_CUDA_PLAN_BWD_SM90_H
#define FA_CUDA_PLAN_BWD_SM90_H

#include "kernels/args_bwd.h"
#include "plan_bwd.h"

/* A row of tiles_bwd_sm90.def. */
typedef struct {
  const char *kernel;
  int dim_qk, dim_v, block_m, block_n, stages;
} fa_backward_tile_sm90;

/* The tile with which a Hopper kernel can make dk and dv, and add up dq. NULL when none can; then *reason says why not, a sentence for explain.
 * `aligned`: rows of all tensors are contiguous and start on 16 bytes. */
const fa_backward_tile_sm90 *fa_choose_backward_sm90(const fa_problem *problem, const fa_device_limits *limits, int aligned,
                                                     const char **reason);

/* Fills the launch of the keys, and the tile's part of the plan. plan->adds_dq is decided. */
void fa_plan_backward_sm90(const fa_problem *problem, const fa_backward_tile_sm90 *tile, fa_backward_plan *plan);

/* 1 when the plan's keys are such a kernel's. */
int fa_plan_is_backward_sm90(const fa_backward_plan *plan);

/* Launches it. */
fa_code fa_launch_backward_sm90(const fa_problem *problem, const fa_backward_plan *plan, fa_gradient_args *arguments, void *stream,
                                fa_error *error);

#endif
