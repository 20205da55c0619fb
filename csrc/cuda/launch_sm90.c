/* launch_sm90.c: tensor maps, the queue's counter, and the launch of fwd_sm90. */
#include "plan_sm90.h"

enum { MAP_COLUMNS = 64, QUERY_ROWS = 64, OUT_ROWS = 16 };

/* Dimensions of one element may have any stride: it is not used. */
fa_code fa_map_view(const fa_problem *p, const fa_view *view, int dim, int64_t positions, int heads, int batch, int rows,
                    fa_tensor_map *map, fa_error *error) {
  uint64_t size = (uint64_t)fa_dtype_bytes(p->dtype);
  const fa_tensor_map_shape shape = {
      .dtype = p->dtype,
      .rank = 4,
      .base = view->data,
      .dims = {(uint64_t)dim, (uint64_t)positions, (uint64_t)heads, (uint64_t)batch},
      .stride_bytes = {positions > 1 ? (uint64_t)view->s * size : 16, heads > 1 ? (uint64_t)view->h * size : 16,
                       batch > 1 ? (uint64_t)view->b * size : 16},
      .box = {MAP_COLUMNS, (uint32_t)rows, 1, 1},
      .swizzle = FA_SWIZZLE_128B,
      .l2_promotion = FA_L2_256B,
  };
  return fa_driver_tensor_map(p->device_index, &shape, map, error);
}

/* Queries as (dim, head of a group, position, group, batch): a box is the rows of a warpgroup, 1 << pack_log2 heads of them side by side. Heads
 * that a group does not have arrive as zeros. */
static fa_code map_groups(const fa_problem *p, int pack_log2, int64_t positions, int batch, fa_tensor_map *map, fa_error *error) {
  uint64_t size = (uint64_t)fa_dtype_bytes(p->dtype), head = p->heads_q > 1 ? (uint64_t)p->q.h * size : 16;
  const fa_tensor_map_shape shape = {
      .dtype = p->dtype,
      .rank = 5,
      .base = p->q.data,
      .dims = {(uint64_t)p->dim_qk, (uint64_t)p->group, (uint64_t)positions, (uint64_t)p->heads_k, (uint64_t)batch},
      .stride_bytes = {head, positions > 1 ? (uint64_t)p->q.s * size : 16, head * (uint64_t)p->group,
                       batch > 1 ? (uint64_t)p->q.b * size : 16},
      .box = {MAP_COLUMNS, 1u << pack_log2, QUERY_ROWS >> pack_log2, 1, 1},
      .swizzle = FA_SWIZZLE_128B,
      .l2_promotion = FA_L2_256B,
  };
  return fa_driver_tensor_map(p->device_index, &shape, map, error);
}

static fa_code map_all(const fa_problem *p, const fa_forward_plan *plan, fa_tensor_map map[4], fa_error *error) {
  int packed = p->lengths.packed, batch = packed ? 1 : p->batch, block_n = plan->block_n;
  int64_t rows_q = packed ? p->total_q : p->seqlen_q, rows_k = packed ? p->total_k : p->seqlen_k;
  fa_code code = fa_plan_has_few_rows(plan) ? map_groups(p, plan->pack_log2, rows_q, batch, &map[0], error)
                                            : fa_map_view(p, &p->q, p->dim_qk, rows_q, p->heads_q, batch, QUERY_ROWS, &map[0], error);
  if (code == FA_OK) code = fa_map_view(p, &p->k, p->dim_qk, rows_k, p->heads_k, batch, block_n, &map[1], error);
  if (code == FA_OK) code = fa_map_view(p, &p->v, p->dim_v, rows_k, p->heads_k, batch, block_n, &map[2], error);
  if (code == FA_OK) code = fa_map_view(p, &p->out, p->dim_v, rows_q, p->heads_q, batch, OUT_ROWS, &map[3], error);
  return code;
}

fa_code fa_launch_forward_sm90(const fa_problem *p, const fa_forward_plan *plan, fa_forward_args *arguments, char *workspace, void *stream,
                               fa_error *error) {
  const fa_planned_kernel *planned = &plan->main;
  const fa_variant variant = {planned->kernel, planned->kernel, planned->constant_count, planned->constants, planned->smem_bytes};
  fa_schedule schedule = fa_schedule_sm90(p, plan);
  const fa_kernel *kernel;
  fa_tensor_map map[4];
  if (planned->grid == 0) return FA_OK;
  fa_code code = fa_store_get(p->device_index, &variant, &kernel, error);
  if (code == FA_OK) code = map_all(p, plan, map, error);
  arguments->problem.pack_log2 = plan->pack_log2;
  if (code == FA_OK && plan->queue_bytes) {
    schedule.next = (int *)(void *)(workspace + plan->workspace_bytes - plan->queue_bytes);
    code = fa_driver_memset(p->device_index, schedule.next, 0, sizeof *schedule.next, stream, error);
  }
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
