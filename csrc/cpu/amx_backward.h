/* amx_backward.h: what the passes of the AMX backward share. */
#ifndef FA_CPU_AMX_BACKWARD_H
#define FA_CPU_AMX_BACKWARD_H

#include "amx.h"
#include "amx_index.h"
#include "amx_lanes.h"
#include "amx_pack.h"
#include "job.h"

/* Per strip of 32 query rows: lse in log2 units (as it is, where fa_score_tile makes the scores) with +inf for rows that see nothing, and
 * delta = rowsum(dout * out) - dlse. */
typedef struct {
  _Alignas(64) float shift[STRIP], delta[STRIP];
} fa_strip_statistics;

typedef struct {
  fa_tile_index index;                                   /* strips of 32 query rows */
  int64_t origin;                                        /* the first strip that the arrays below hold, */
  int64_t strips;                                        /* and how many */
  int dtype_parts;                                       /* fa_amx_parts */
  int copies;                                            /* of dQ, summed in order */
  float factor;                                          /* products -> log2 units */
  int64_t q_halves, v_halves;                            /* of 32 rows */
  uint16_t *q_scores, *q_rows, *dout_scores, *dout_rows; /* [strip] FA_AMX_DIMS_RIGHT, FA_AMX_ROWS_RIGHT, ... */
  fa_strip_statistics *statistics;
  uint8_t *finite;  /* [strip]: q and dout hold no NaN and no infinity */
  float *dq;        /* [copy][strip][dims][32] */
  uint8_t *dq_made; /* [copy][strip]: 0: nothing was added yet, and dq is not even initialised */
} fa_amx_backward_shared;

/* The place of a head's n-th strip in those arrays. */
static inline int64_t fa_strip_at(const fa_amx_backward_shared *shared, const fa_head *head, int n) {
  return fa_tile_at(&shared->index, head->b, head->h, n) - shared->origin;
}

/* The pass over keys for one key head, whose first query head is given: every copies-th block of keys, from number `copy` on. */
size_t fa_amx_keys_scratch(const fa_problem *problem);
void fa_amx_keys_of_head(const fa_amx_backward_shared *shared, fa_head head, int copy, fa_arena arena);

/* Keys of a block, whose K, V, dK and dV stay while the queries pass. */
enum { FA_AMX_BLOCK_KEYS = 256 };

#endif
