/* workspace.h: memory that passes work in, kept for the next call: fresh pages from the system, zeroed one by one as threads touch them, cost
 * a backward pass up to a third of its time. */
#ifndef FA_CPU_WORKSPACE_H
#define FA_CPU_WORKSPACE_H

#include <stddef.h>

/* 64-byte aligned, contents arbitrary. NULL: there is no memory. */
void *fa_workspace_take(size_t bytes);
void fa_workspace_give(void *memory);

#endif
