/* plan.h: what will be launched for a problem, decided from the problem and the device's limits alone: no driver, no GPU, no global state. Running,
 * explaining and sizing the workspace all read the same plan. */
#ifndef FA_CUDA_PLAN_H
#define FA_CUDA_PLAN_H

#include "../core/problem.h"
#include "store/store.h"

enum {
  FA_MAX_CONSTANTS = 24,
  FA_MAX_NOTES = 4,
  FA_WORKSPACE_ALIGNMENT = 256,
  FA_RESERVED_SMEM = 1024, /* what the driver takes of an SM for each CTA */
};

/* One launch. `kernel` is NULL when it is not needed; file and entry have the same name. */
typedef struct {
  const char *kernel;
  fa_constant constants[FA_MAX_CONSTANTS];
  int constant_count;
  int64_t grid; /* CTAs on the first axis */
  int grid_y;   /* and on the second; 0 means 1 */
  int threads;
  int smem_bytes; /* dynamic */
} fa_planned_kernel;

static inline void fa_add_constant(fa_planned_kernel *k, const char *name, int value) {
  k->constants[k->constant_count++] = (fa_constant){name, value};
}

static inline int fa_round_up(int x, int multiple) { return (x + multiple - 1) / multiple * multiple; }

static inline size_t fa_align_workspace(size_t bytes) {
  return (bytes + FA_WORKSPACE_ALIGNMENT - 1) / FA_WORKSPACE_ALIGNMENT * FA_WORKSPACE_ALIGNMENT;
}

/* 1 when the rows of a view are contiguous and start on 16 bytes, with a dim that fills whole 16-byte chunks: what cp.async and TMA need. */
int fa_rows_are_aligned(const fa_view *view, int dim, fa_dtype dtype);

/* Scores are more than scale * q.k under a positive scale (the constant SCORE). */
int fa_changes_scores(const fa_problem *problem);

/* Tiles of `rows` positions over all sequences of one head: exact for dense problems (one sequence), an upper bound for packed ones, which
 * includes the rows behind the last sequence. */
int64_t fa_sequence_tiles(const fa_problem *problem, int64_t total, int seqlen, int rows);

typedef struct {
  fa_planned_kernel main;    /* fwd_sm90, fwd_sm80 or fwd_f64 */
  fa_planned_kernel combine; /* when the keys are split */
  fa_planned_kernel probs;   /* when probs is asked for */
  int block_m, block_n, stages;
  int tiles, splits; /* as in fa_forward_args */
  int combine_tiles;
  int pack_log2;                              /* fwd_sm90: as in fa_arg_problem */
  size_t workspace_bytes, partial_lse_offset; /* partial results of splits first, then */
  size_t queue_bytes;                         /* fwd_sm90: the counter of its queue, the last bytes of the workspace */
  const char *notes[FA_MAX_NOTES];
  int note_count;
} fa_forward_plan;

fa_code fa_plan_forward(const fa_problem *problem, const fa_device_limits *limits, fa_forward_plan *plan, fa_error *error);
fa_code fa_explain_forward(const fa_problem *problem, const fa_device_limits *limits, char *text, size_t bytes, fa_error *error);

/* plan_bwd.c */
fa_code fa_explain_backward(const fa_problem *problem, const fa_device_limits *limits, char *text, size_t bytes, fa_error *error);

#endif
