/* threads.h: one parallel loop. torch's own pool when torch is loaded in this process, else a small pool of our own. */
#ifndef FA_THREADS_H
#define FA_THREADS_H

#include <stdatomic.h>
#include <stdint.h>

/* Workers a loop started now would use, at least 1: torch's number, or FLASH_ATTN_C_NUM_THREADS, OMP_NUM_THREADS, or the CPUs this
 * process may run on. 1 inside a parallel region; in a forked child the same number, on our own pool. */
int fa_thread_count(void);

/* Calls fn(item, worker, context) once for each item of [0, items), items taken in rising order from a shared counter, so start the
 * longest first. worker is in [0, workers) and no two calls at one time share it; the caller sizes its scratch by workers, which is at
 * most fa_thread_count(). workers == 1 runs in the caller. fn must not call fa_parallel. */
void fa_parallel(int64_t items, int workers, void (*fn)(int64_t item, int worker, void *context), void *context);

/* Waits, inside a loop, until an item that was taken earlier has raised *value above limit. */
void fa_wait_above(atomic_int *value, int limit);

/* "torch" or "own", for doctor and explain. */
const char *fa_thread_source(void);

#endif
