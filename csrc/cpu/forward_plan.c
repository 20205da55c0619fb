/* forward_plan.c: see forward_plan.h. */
#include "forward_plan.h"

enum { ENOUGH_TASKS = 32, WANTED_TASKS = 64, SPLIT_LEAST = 512, MOST_ROW_BYTES = 300 << 10, FEW_ROWS = 16 };

/* As many rows as the second cache holds of Q and O, since every tile of keys is loaded once for all of them; fewer where that would leave
 * too few tasks. */
static int block_rows(const fa_problem *p) {
  int rows = fa_block_m(p), row_bytes = (fa_tile_ld(p->dim_qk) + fa_tile_ld(p->dim_v)) * (p->dtype == FA_F64 ? 8 : 4);
  if (p->visibility.block_size || rows < FA_PATCH_ROWS) return rows;
  int64_t all = (int64_t)p->batch * p->heads_q * p->seqlen_q, most = all / WANTED_TASKS;
  int fit = (int)(most < MOST_ROW_BYTES / row_bytes ? most : MOST_ROW_BYTES / row_bytes);
  return fa_max(fit / FA_PATCH_ROWS, 1) * FA_PATCH_ROWS;
}

fa_forward_plan fa_forward_plan_of(const fa_problem *p) {
  fa_forward_plan plan = {block_rows(p), 1, p->group, 1, fa_max(p->seqlen_k, 1), 1};
  int tiles_m = fa_ceil_div(p->seqlen_q, plan.block_m), most = p->seqlen_k / SPLIT_LEAST;
  if (tiles_m == 1 && !p->visibility.block_size) plan.stack = fa_max(fa_min(FA_PATCH_ROWS / plan.block_m, p->group), 1);
  plan.stacks = fa_ceil_div(p->group, plan.stack);
  int64_t units = (int64_t)p->batch * p->heads_k * plan.stacks, tasks = units * tiles_m;
  int few = plan.block_m * plan.stack <= FEW_ROWS; /* then the keys come at the speed of memory, in the order in which they lie there */
  if (tasks == 0 || most < 2 || (tasks >= ENOUGH_TASKS && !few)) return plan;
  int wanted = few ? most : fa_min((int)((WANTED_TASKS + tasks - 1) / tasks), most);
  plan.split_columns = fa_ceil_div(fa_ceil_div(p->seqlen_k, wanted), FA_BLOCK_N) * FA_BLOCK_N;
  plan.splits = fa_ceil_div(p->seqlen_k, plan.split_columns);
  for (int i = 2; i <= FA_MAX_TOGETHER && few; i++)
    if (p->heads_k * plan.stacks % i == 0) plan.together = i;
  return plan;
}
