/* job.h: a pass over a problem: tasks that share nothing but read-only input, each worker with scratch of its own. */
#ifndef FA_CPU_JOB_H
#define FA_CPU_JOB_H

#include "head.h"

/* Scratch and workspace are laid out by carving functions: run once with base NULL to count bytes, then with memory. 64-byte aligned. */
typedef struct {
  char *base;
  size_t used;
} fa_arena;

void *fa_take(fa_arena *arena, size_t bytes);

typedef struct {
  const fa_problem *problem;
  const fa_tile_ops *ops;     /* for the problem's dtype */
  const fa_tile_ops *ops_f64; /* for sums that need more */
  const void *extra;          /* what this pass needs besides */
  int block_m, tiles_m;       /* query rows of a tile, tiles of the longest sequence */
  char *scratch;
  size_t scratch_bytes; /* of one worker */
} fa_job;

/* Chooses the tier and the tiles. */
fa_code fa_job_init(fa_job *job, const fa_problem *problem, fa_error *error);

/* Runs task(0 .. tasks-1); the task finds its scratch with fa_job_scratch. */
fa_code fa_job_run(fa_job *job, size_t scratch_bytes, int64_t tasks, void (*task)(int64_t item, int worker, void *job), fa_error *error);

static inline fa_arena fa_job_scratch(const fa_job *job, int worker) {
  return (fa_arena){job->scratch + (size_t)worker * job->scratch_bytes, 0};
}

#endif
