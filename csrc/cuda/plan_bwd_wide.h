/* plan_bwd_wide.h: the Hopper backward kernels for head dims above 128, in the plan and in the launch. Pure but for the launch. */
#ifndef FA_CUDA_PLAN_BWD_WIDE_H
#define FA_CUDA_PLAN_BWD_WIDE_H

#include "kernels/args_bwd.h"
#include "kernels/schedule_sm90.h"
#include "plan_bwd.h"

/* Fills the launches of dk and dv and of dq when bwd_keys_sm90 and bwd_rows_sm90 can run the problem and are the better choice, and returns NULL. Otherwise
 * leaves the plan as it is and returns why not, a sentence for explain. */
const char *fa_plan_backward_wide(const fa_problem *problem, const fa_device_limits *limits, fa_backward_plan *plan);

/* 1 when launch `which` of the plan is one of them. */
int fa_launch_is_wide(const fa_backward_plan *plan, int which);

/* The order of its tiles; `next` is left NULL. */
fa_schedule fa_schedule_backward_wide(const fa_problem *problem, const fa_backward_plan *plan, int which);

/* Launches it. `queue` counts its tiles, from 0; NULL: they are dealt out. */
fa_code fa_launch_backward_wide(const fa_problem *problem, const fa_backward_plan *plan, int which, fa_gradient_args *arguments, int *queue,
                                void *stream, fa_error *error);

#endif
