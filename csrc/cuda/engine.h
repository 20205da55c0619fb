/* engine.h: the CUDA engine's doors. Nothing here touches the driver until the first call with a CUDA tensor. */
#ifndef FA_CUDA_ENGINE_H
#define FA_CUDA_ENGINE_H

#include "../core/problem.h"

fa_code fa_cuda_forward(const fa_problem *problem, const fa_context *context, fa_error *error);
fa_code fa_cuda_backward(const fa_problem *problem, const fa_context *context, fa_error *error);
fa_code fa_cuda_explain(const fa_problem *problem, fa_direction direction, char *text, size_t bytes, fa_error *error);

/* JSON members for fa_describe: driver, devices, NVRTC, cache. Never fails: what is missing is said in the text. */
void fa_cuda_describe(char *text, size_t bytes);

#endif
