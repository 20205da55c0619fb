/* plan_bwd.h: the backward plan, pure like plan.h. */
#ifndef FA_CUDA_PLAN_BWD_H
#define FA_CUDA_PLAN_BWD_H

#include "plan.h"

/* Launched in this order; `kernel` is NULL where it is not needed.
 *
 *     prep      bwd_prep                         delta, lse, empty dq_sum
 *     keys      bwd_sm90, bwd_keys_sm90, portable dk, dv; dq_sum where dq is a sum of additions
 *     rows      bwd_rows_sm90, _sm80 or bwd_f64  dq without additions; each tile's share of dalibi
 *     finish    bwd_finish                       dq_sum -> dq
 *     bias      bwd_bias_sm80 or bwd_f64         dbias
 *     heads     bwd_heads                        dsinks, dalibi
 */
enum { FA_BWD_PREP = 0, FA_BWD_KEYS, FA_BWD_ROWS, FA_BWD_FINISH, FA_BWD_BIAS, FA_BWD_HEADS, FA_BWD_LAUNCHES };

typedef struct {
  fa_planned_kernel launches[FA_BWD_LAUNCHES];
  int block_m, block_n, stages;                                       /* of keys, for explain */
  int pad_tiles, key_tiles, row_tiles, row_tile, dq_columns;          /* as in fa_gradient_args */
  int64_t workspace_rows;                                             /* likewise */
  size_t delta_offset, dq_sum_offset, dalibi_offset, workspace_bytes; /* lse_rows lies at 0; an offset of 0: absent */
  size_t queue_offset;                                                /* a counter for each launch, 0 at first; 0: tiles are dealt out */
  int uses_queue;
  int adds_dq; /* 1: the last bits of dq may differ from run to run */
  const char *notes[FA_MAX_NOTES];
  int note_count;
} fa_backward_plan;

fa_code fa_plan_backward(const fa_problem *problem, const fa_device_limits *limits, fa_backward_plan *plan, fa_error *error);

#endif
