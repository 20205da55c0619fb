/* launch_bwd_wide.c: tensor maps and launches of bwd_keys_sm90 and bwd_rows_sm90. */
#include "plan_bwd_wide.h"
#include "plan_sm90.h"

enum { BOX_ROWS = 64 };

fa_code fa_launch_backward_wide(const fa_problem *p, const fa_backward_plan *plan, int which, fa_gradient_args *arguments, int *queue,
                                void *stream, fa_error *error) {
  const fa_planned_kernel *planned = &plan->launches[which];
  const fa_variant variant = {planned->kernel, planned->kernel, planned->constant_count, planned->constants, planned->smem_bytes};
  int packed = p->lengths.packed, batch = packed ? 1 : p->batch;
  int64_t rows_q = packed ? p->total_q : p->seqlen_q, rows_k = packed ? p->total_k : p->seqlen_k;
  fa_schedule schedule = fa_schedule_backward_wide(p, plan, which);
  const fa_kernel *kernel;
  fa_tensor_map map[4];
  schedule.next = queue;
  if (planned->grid == 0) return FA_OK;
  fa_code code = fa_store_get(p->device_index, &variant, &kernel, error);
  if (code == FA_OK) code = fa_map_view(p, &p->q, p->dim_qk, rows_q, p->heads_q, batch, BOX_ROWS, &map[0], error);
  if (code == FA_OK) code = fa_map_view(p, &p->k, p->dim_qk, rows_k, p->heads_k, batch, BOX_ROWS, &map[1], error);
  if (code == FA_OK) code = fa_map_view(p, &p->v, p->dim_v, rows_k, p->heads_k, batch, BOX_ROWS, &map[2], error);
  if (code == FA_OK) code = fa_map_view(p, &p->grad.dout, p->dim_v, rows_q, p->heads_q, batch, BOX_ROWS, &map[3], error);
  if (code != FA_OK) return code;
  const fa_launch_shape shape = {
      .grid = {(unsigned)planned->grid, 1, 1},
      .block = {(unsigned)planned->threads, 1, 1},
      .smem_bytes = (unsigned)planned->smem_bytes,
      .programmatic = which == FA_BWD_KEYS || plan->launches[FA_BWD_KEYS].kernel, /* bwd_rows_sm90 waits for bwd_keys_sm90 when it ends */
      .stream = stream,
  };
  void *parameters[] = {arguments, &schedule, &map[0], &map[1], &map[2], &map[3]};
  return fa_driver_launch(kernel, &shape, parameters, error);
}
