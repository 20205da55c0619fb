/* forward_plan.c: see forward_plan.h. */
#include "forward_few.h"

enum { ENOUGH_TASKS = 32, WANTED_TASKS = 64, LEAST_KEYS = 512, LEAST_KEYS_OF_FEW = 256, MOST_ROW_BYTES = 300 << 10 };

/* As many rows as the second cache holds of Q and O, since every tile of keys is loaded once for all of them; fewer where that would leave
 * too few tasks. */
static int block_rows(const fa_problem *p) {
  int rows = fa_block_m(p), row_bytes = (fa_tile_ld(p->dim_qk) + fa_tile_ld(p->dim_v)) * (p->dtype == FA_F64 ? 8 : 4);
  if (p->visibility.block_size || rows < FA_PATCH_ROWS) return rows;
  int64_t most = (int64_t)p->batch * p->heads_q * p->seqlen_q / ENOUGH_TASKS;
  int fit = (int)(most < MOST_ROW_BYTES / row_bytes ? most : MOST_ROW_BYTES / row_bytes) / FA_PATCH_ROWS * FA_PATCH_ROWS;
  int tiles = fa_ceil_div(p->seqlen_q, fa_max(fit, FA_PATCH_ROWS));
  return fa_ceil_div(fa_ceil_div(p->seqlen_q, tiles), FA_PATCH_ROWS) * FA_PATCH_ROWS;
}

fa_forward_plan fa_forward_plan_of(const fa_problem *p) {
  fa_forward_plan plan = {.block_m = block_rows(p), .stack = 1, .splits = 1, .split_columns = fa_max(p->seqlen_k, 1), .together = 1};
  int tiles_m = fa_ceil_div(p->seqlen_q, plan.block_m);
  if (tiles_m == 1 && !p->visibility.block_size) plan.stack = fa_max(fa_min(FA_PATCH_ROWS / plan.block_m, p->group), 1);
  plan.stacks = fa_ceil_div(p->group, plan.stack);
  int64_t units = (int64_t)p->batch * p->heads_k * plan.stacks, tasks = units * tiles_m;
  int few = plan.block_m * plan.stack <= FA_FEW_ROWS; /* then keys come at the speed of memory, in the order in which they lie there */
  int most = p->seqlen_k / (few ? LEAST_KEYS_OF_FEW : LEAST_KEYS);
  if (tasks == 0 || most < 2 || (tasks >= ENOUGH_TASKS && !few)) return plan;
  int wanted = few ? most : fa_min((int)((WANTED_TASKS + tasks - 1) / tasks), most);
  plan.split_columns = fa_ceil_div(fa_ceil_div(p->seqlen_k, wanted), FA_BLOCK_N) * FA_BLOCK_N;
  plan.splits = fa_ceil_div(p->seqlen_k, plan.split_columns);
  for (int i = 2; i <= FA_MAX_TOGETHER && few && fa_reads_in_place(p) && !p->visibility.block_size; i++)
    if (p->heads_k * plan.stacks % i == 0) plan.together = i;
  return plan;
}
