/* launch.h: from a planned kernel and its arguments to a launch, and from a problem to what kernels are told (kernels/args.h). */
#ifndef FA_CUDA_LAUNCH_H
#define FA_CUDA_LAUNCH_H

#include "kernels/args.h"
#include "plan.h"

fa_arg_view fa_arg_of_view(const fa_view *view);
fa_arg_grid fa_arg_of_grid(const fa_grid *grid);
fa_arg_heads fa_arg_of_heads(const fa_per_head *heads);
fa_arg_problem fa_arg_of_problem(const fa_problem *problem);

/* Limits of the problem's device. FLASH_ATTN_C_SMEM, when set, lowers its shared memory, so that the variants for smaller devices can be
 * run on any. */
fa_code fa_limits_of(const fa_problem *problem, fa_device_limits *limits, fa_error *error);

/* Device memory for a plan; NULL and FA_OK for 0 bytes. */
fa_code fa_workspace(const fa_context *context, size_t bytes, char **workspace, fa_error *error);

/* Finds or compiles the kernel and launches it with one parameter, the struct at `arguments`. A grid of 0 launches nothing. */
fa_code fa_launch(int device, const fa_planned_kernel *planned, void *arguments, void *stream, fa_error *error);

#endif
