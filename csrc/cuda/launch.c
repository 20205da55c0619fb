/* launch.c: see launch.h. */
#include "launch.h"

#include <stdlib.h>

#include "../core/error.h"
#include "../core/philox.h"

_Static_assert((int)FA_ARG_F32 == (int)FA_F32 && (int)FA_ARG_F64 == (int)FA_F64 && (int)FA_ARG_F16 == (int)FA_F16 &&
                   (int)FA_ARG_BF16 == (int)FA_BF16,
               "kernels and host number the element types alike");

fa_arg_view fa_arg_of_view(const fa_view *v) { return (fa_arg_view){v->data, v->b, v->h, v->s, v->d}; }

fa_arg_grid fa_arg_of_grid(const fa_grid *g) { return (fa_arg_grid){g->data, g->b, g->h, g->m, g->n, (int)g->dtype, 0}; }

fa_arg_heads fa_arg_of_heads(const fa_per_head *h) { return (fa_arg_heads){h->data, h->b, h->h, (int)h->dtype, 0}; }

fa_arg_problem fa_arg_of_problem(const fa_problem *p) {
  return (fa_arg_problem){
      .batch = p->batch,
      .heads_q = p->heads_q,
      .heads_k = p->heads_k,
      .group = p->group,
      .seqlen_q = p->seqlen_q,
      .seqlen_k = p->seqlen_k,
      .dim_qk = p->dim_qk,
      .dim_v = p->dim_v,
      .packed = p->lengths.packed,
      .total_q = p->total_q,
      .total_k = p->total_k,
      .cu_q = {p->lengths.cu_q.data, p->lengths.cu_q.stride, p->total_q},
      .cu_k = {p->lengths.cu_k.data, p->lengths.cu_k.stride, p->total_k},
      .used_q = {p->lengths.used_q.data, p->lengths.used_q.stride, 0},
      .used_k = {p->lengths.used_k.data, p->lengths.used_k.stride, 0},
      .rule = p->visibility.rule,
      .block_size = p->visibility.block_size,
      .mask = fa_arg_of_grid(&p->visibility.mask),
      .block_mask = fa_arg_of_grid(&p->visibility.block_mask),
      .scale = p->score.scale,
      .softcap = p->score.softcap,
      .bias = fa_arg_of_grid(&p->score.bias),
      .alibi = fa_arg_of_heads(&p->score.alibi),
      .sinks = fa_arg_of_heads(&p->score.sinks),
      .keep_scale = 1.0 / (1.0 - p->dropout.p),
      .dropout_threshold = p->dropout.p > 0 ? fa_dropout_threshold(p->dropout.p) : 0,
      .seed = p->dropout.seed,
      .offset = p->dropout.offset,
      .rng_state = p->dropout.state,
      .rng_stride = p->dropout.state_stride,
  };
}

fa_code fa_limits_of(const fa_problem *problem, fa_device_limits *limits, fa_error *error) {
  const fa_device_limits *found;
  fa_code code = fa_driver_device(problem->device_index, &found, error);
  if (code != FA_OK) return code;
  *limits = *found;
  const char *cap = getenv("FLASH_ATTN_C_SMEM");
  if (cap && *cap) limits->smem_per_block_optin = fa_min(limits->smem_per_block_optin, atoi(cap));
  return FA_OK;
}

fa_code fa_workspace(const fa_context *context, size_t bytes, char **workspace, fa_error *error) {
  *workspace = NULL;
  if (bytes == 0) return FA_OK;
  if (!context || !context->alloc) return fa_fail(error, FA_ERR_VALUE, "alloc: %zu bytes of device workspace are needed", bytes);
  *workspace = context->alloc(context->alloc_ctx, bytes);
  return *workspace ? FA_OK : fa_fail(error, FA_ERR_MEMORY, "alloc: %zu bytes of device workspace could not be had", bytes);
}

fa_code fa_launch(int device, const fa_planned_kernel *planned, void *arguments, void *stream, fa_error *error) {
  const fa_kernel *kernel;
  const fa_variant variant = {planned->kernel, planned->kernel, planned->constant_count, planned->constants, planned->smem_bytes};
  if (planned->grid == 0) return FA_OK;
  fa_code code = fa_store_get(device, &variant, &kernel, error);
  if (code != FA_OK) return code;
  const fa_launch_shape shape = {
      .grid = {(unsigned)planned->grid, (unsigned)fa_max(1, planned->grid_y), 1},
      .block = {(unsigned)planned->threads, 1, 1},
      .smem_bytes = (unsigned)planned->smem_bytes,
      .stream = stream,
  };
  void *parameters[] = {arguments};
  return fa_driver_launch(kernel, &shape, parameters, error);
}
