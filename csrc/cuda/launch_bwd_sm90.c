/* launch_bwd_sm90.c: tensor maps, the order of the key tiles, and the launch of a Hopper backward kernel. */
#include "plan_bwd_sm90.h"
#include "plan_sm90.h"

enum { SECTION_KIB = 32 << 10 /* of queries and their gradients that a section of heads may keep in the L2 cache */ };

static int is_uneven(const fa_problem *p) {
  const fa_rule rule = p->visibility.rule;
  return rule.causal || rule.window_left >= 0 || rule.window_right >= 0 || p->lengths.packed || p->lengths.used_q.data ||
         p->lengths.used_k.data || p->visibility.block_mask.data;
}

/* Tiles of unequal length: heads side by side, so that each starts with its longest. */
static fa_schedule schedule_of(const fa_problem *p, const fa_backward_plan *plan) {
  int heads = p->heads_k * (p->lengths.packed ? 1 : p->batch);
  int64_t section = 1;
  if (is_uneven(p)) {
    int64_t row_bytes = (int64_t)(p->dim_qk + p->dim_v) * 2 + (int64_t)plan->dq_columns * 4;
    section = fa_max(1, (int)(((int64_t)SECTION_KIB << 10) / (row_bytes * p->group * p->seqlen_q)));
  }
  return (fa_schedule){
      .heads = heads,
      .tiles = plan->key_tiles,
      .section = section < heads ? (int)section : heads,
      .splits = 1,
      .total = heads * plan->key_tiles,
      .scale_log2 = (float)(p->score.scale * 1.4426950408889634),
  };
}

static fa_code map_all(const fa_problem *p, const fa_backward_plan *plan, fa_tensor_map map[4], fa_error *error) {
  int packed = p->lengths.packed, batch = packed ? 1 : p->batch;
  int64_t rows_q = packed ? p->total_q : p->seqlen_q, rows_k = packed ? p->total_k : p->seqlen_k;
  fa_code code = fa_map_view(p, &p->q, p->dim_qk, rows_q, p->heads_q, batch, plan->block_m, &map[0], error);
  if (code == FA_OK) code = fa_map_view(p, &p->k, p->dim_qk, rows_k, p->heads_k, batch, plan->block_n, &map[1], error);
  if (code == FA_OK) code = fa_map_view(p, &p->v, p->dim_v, rows_k, p->heads_k, batch, plan->block_n, &map[2], error);
  if (code == FA_OK) code = fa_map_view(p, &p->grad.dout, p->dim_v, rows_q, p->heads_q, batch, plan->block_m, &map[3], error);
  return code;
}

fa_code fa_launch_backward_sm90(const fa_problem *p, const fa_backward_plan *plan, fa_gradient_args *arguments, void *stream,
                                fa_error *error) {
  const fa_planned_kernel *planned = &plan->launches[FA_BWD_KEYS];
  const fa_variant variant = {planned->kernel, planned->kernel, planned->constant_count, planned->constants, planned->smem_bytes};
  fa_schedule schedule = schedule_of(p, plan);
  const fa_kernel *kernel;
  fa_tensor_map map[4];
  if (planned->grid == 0) return FA_OK;
  fa_code code = fa_store_get(p->device_index, &variant, &kernel, error);
  if (code == FA_OK) code = map_all(p, plan, map, error);
  if (code != FA_OK) return code;
  const fa_launch_shape shape = {
      .grid = {(unsigned)planned->grid, 1, 1},
      .block = {(unsigned)planned->threads, 1, 1},
      .smem_bytes = (unsigned)planned->smem_bytes,
      .stream = stream,
  };
  void *parameters[] = {arguments, &schedule, &map[0], &map[1], &map[2], &map[3]};
  return fa_driver_launch(kernel, &shape, parameters, error);
}
