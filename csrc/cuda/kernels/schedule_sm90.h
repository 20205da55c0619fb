/* schedule_sm90.h: the order in which a persistent grid works through the query tiles of all heads. Read by the host (the struct) and by the
 * kernel's producer warp (the rest).
 *
 * Heads come in sections whose keys and values fit into the L2 cache together. Within a section the last query tile of every head comes first,
 * then the one before: under a causal mask the longest tiles start first, and the short ones fill the gaps at the end.
 *
 *      tile number:   0 1 2 3 | 4 5 6 7 | ...         section of 4 heads
 *      query tile:    last    | last-1  | ... 0
 *      head:          0 1 2 3 | 0 1 2 3 | ...
 */
#ifndef FA_SCHEDULE_SM90_H
#define FA_SCHEDULE_SM90_H

#include "args.h"

typedef struct {
  int heads;        /* heads_q (a group packed into one tile: heads_k) times batch entries; packed: batch 1 */
  int tiles;        /* query tiles of a head; packed: upper bound over all sequences */
  int section;      /* heads that share the L2 cache at a time */
  int splits;       /* parts into which the keys of every tile are cut; they come one after the other */
  int total;        /* heads * tiles * splits */
  float scale_log2; /* not of the order, but known to the host alone: scale * log2(e), so that no thread converts it from double */
  int *next;        /* counts the tiles taken beyond the first of each CTA, from 0; absent: CTA i takes i, i + grid, ... */
} fa_schedule;

#ifdef __CUDACC__
/* Tile `number` as (head counted over the batch, query tile counted from the front). */
FA_INLINE void fa_scheduled_tile(const fa_schedule *s, int number, int *head, int *tile) {
  int of_section = s->section * s->tiles, first = number / of_section * s->section, left = number % of_section;
  int heads = fa_min(s->section, s->heads - first);
  *head = first + left % heads;
  *tile = s->tiles - 1 - left / heads;
}
#endif

#endif
