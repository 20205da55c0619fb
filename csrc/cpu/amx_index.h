/* amx_index.h: where the tiles of rows of every sequence and head lie in a packed copy, whatever the lengths. */
#ifndef FA_AMX_INDEX_H
#define FA_AMX_INDEX_H

#include "head.h"

/* Tiles of `size` rows: sequence b's start at start[b] * heads, tile n of head h at (start[b] * heads + h * tiles(b) + n). */
typedef struct {
  int64_t *start;     /* [batch + 1] */
  int heads, longest; /* tiles of the longest sequence */
} fa_tile_index;

static inline size_t fa_tile_index_bytes(const fa_problem *p) { return ((size_t)p->batch + 1) * sizeof(int64_t); }

static inline fa_tile_index fa_index_tiles(const fa_problem *p, int of_keys, int size, int64_t *start) {
  fa_tile_index index = {start, of_keys ? p->heads_k : p->heads_q, 0};
  start[0] = 0;
  for (int b = 0; b < p->batch; b++) {
    fa_sequence seq = fa_sequence_of(p, b);
    int tiles = fa_ceil_div(of_keys ? seq.len_k : seq.len_q, size);
    start[b + 1] = start[b] + tiles;
    index.longest = fa_max(index.longest, tiles);
  }
  return index;
}

static inline int64_t fa_tile_at(const fa_tile_index *index, int b, int h, int n) {
  return index->start[b] * index->heads + h * (index->start[b + 1] - index->start[b]) + n;
}

static inline int64_t fa_tile_count(const fa_tile_index *index, int batch) { return index->start[batch] * index->heads; }

#endif
