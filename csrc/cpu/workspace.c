/* workspace.c: see workspace.h. A few blocks at most are kept, the last ones given back; each slot is only ever exchanged, so threads and
 * forked children need no lock. */
#include "workspace.h"

#include <stdatomic.h>
#include <stdlib.h>

enum { KEPT_BLOCKS = 4, ALIGNMENT = 64 };

static const size_t LEAST_KEPT = (size_t)1 << 20, MOST_KEPT = (size_t)256 << 20; /* bytes of a block */

typedef union {
  size_t bytes; /* behind it */
  char line[ALIGNMENT];
} block;

static _Atomic(block *) kept[KEPT_BLOCKS]; /* newest first */

static block *fresh(size_t bytes) {
  size_t rounded = (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
  block *b = aligned_alloc(ALIGNMENT, sizeof(block) + rounded);
  if (b) b->bytes = rounded;
  return b;
}

void *fa_workspace_take(size_t bytes) {
  block *b = NULL;
  for (int i = 0; i < KEPT_BLOCKS && bytes >= LEAST_KEPT && !b; i++) {
    block *none = NULL;
    b = atomic_exchange(&kept[i], NULL);
    if (!b || b->bytes >= bytes) continue;
    if (!atomic_compare_exchange_strong(&kept[i], &none, b)) free(b); /* another thread has filled the slot meanwhile */
    b = NULL;
  }
  if (!b) b = fresh(bytes);
  return b ? b + 1 : NULL;
}

void fa_workspace_give(void *memory) {
  if (!memory) return;
  block *b = (block *)memory - 1;
  for (int i = 0; i < KEPT_BLOCKS && b && b->bytes >= LEAST_KEPT && b->bytes <= MOST_KEPT; i++) b = atomic_exchange(&kept[i], b);
  free(b);
}
