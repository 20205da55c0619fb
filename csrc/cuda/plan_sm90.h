/* plan_sm90.h: the Hopper forward kernel's part in the plan and in the launch. Pure but for the launch. */
#ifndef FA_CUDA_PLAN_SM90_H
#define FA_CUDA_PLAN_SM90_H

#include "kernels/args.h"
#include "kernels/schedule_sm90.h"
#include "plan.h"

/* Fills the plan (main, tiles, splits, the queue's bytes) when fwd_sm90 can run the problem and is the better choice, and returns NULL. Otherwise leaves it as it
 * is and returns why not, a sentence for explain. */
const char *fa_plan_forward_sm90(const fa_problem *problem, const fa_device_limits *limits, fa_forward_plan *plan);

/* 1 when the plan's main kernel is fwd_sm90. */
int fa_plan_is_sm90(const fa_forward_plan *plan);

/* 1 when such a plan splits the keys or packs heads into one tile: the constant FEW_ROWS. */
int fa_plan_has_few_rows(const fa_forward_plan *plan);

/* The order of tiles for a plan that fa_plan_forward_sm90 has filled; `next` is left NULL. */
fa_schedule fa_schedule_sm90(const fa_problem *problem, const fa_forward_plan *plan);

/* 1 when the TMA can read the view: strides that it can count, none of them 0, rows contiguous and on 16 bytes. */
int fa_tma_can_read(const fa_view *view, int batch, int heads, int positions, int dim);

/* A tensor map (dim, position, head, batch) with boxes of 64 columns by `rows` positions, swizzled. */
fa_code fa_map_view(const fa_problem *problem, const fa_view *view, int dim, int64_t positions, int heads, int batch, int rows,
                    fa_tensor_map *map, fa_error *error);

/* Launches such a plan. `workspace` has plan->workspace_bytes. */
fa_code fa_launch_forward_sm90(const fa_problem *problem, const fa_forward_plan *plan, fa_forward_args *arguments, char *workspace,
                               void *stream, fa_error *error);

#endif
