/* job.c: see job.h. */
#include "job.h"

#include "../core/error.h"
#include "threads.h"
#include "workspace.h"

void *fa_take(fa_arena *arena, size_t bytes) {
  char *piece = arena->base ? arena->base + arena->used : NULL;
  arena->used += (bytes + 63) / 64 * 64;
  return piece;
}

fa_code fa_job_init(fa_job *job, const fa_problem *problem, fa_error *error) {
  const fa_tier *tier;
  fa_code code = fa_cpu_tier(&tier, NULL, error);
  if (code != FA_OK) return code;
  *job = (fa_job){.problem = problem, .ops = fa_ops_for(tier, problem->dtype), .ops_f64 = tier->f64, .block_m = fa_block_m(problem)};
  job->tiles_m = fa_ceil_div(problem->seqlen_q, job->block_m);
  return FA_OK;
}

/* Problems this small run in the calling thread: waking others costs more than the work. */
static int workers_for(const fa_problem *problem, int64_t tasks) {
  double pairs = (double)problem->batch * problem->heads_q * problem->seqlen_q * problem->seqlen_k;
  if (tasks <= 1 || pairs * (problem->dim_qk + problem->dim_v) < 5e5) return 1;
  int threads = fa_thread_count();
  return tasks < threads ? (int)tasks : threads;
}

enum { STACK_BYTES = 1 << 14 };

fa_code fa_job_run(fa_job *job, size_t scratch_bytes, int64_t tasks, void (*task)(int64_t item, int worker, void *job), fa_error *error) {
  if (tasks <= 0) return FA_OK;
  int workers = workers_for(job->problem, tasks);
  job->scratch_bytes = scratch_bytes;
  if (workers == 1 && scratch_bytes <= STACK_BYTES) { /* small problems are over sooner than an allocation of this size */
    _Alignas(64) char scratch[STACK_BYTES];
    job->scratch = scratch;
    fa_parallel(tasks, workers, task, job);
    job->scratch = NULL;
    return FA_OK;
  }
  job->scratch = fa_workspace_take(scratch_bytes * (size_t)workers);
  if (!job->scratch) return fa_fail(error, FA_ERR_MEMORY, "cannot allocate %zu bytes of scratch", scratch_bytes * (size_t)workers);
  fa_parallel(tasks, workers, task, job);
  fa_workspace_give(job->scratch);
  return FA_OK;
}
