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
  fa_tile_index strips;                                  /* of 32 query rows */
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

/* The pass over keys: a task is one key head and every copies-th block of keys. */
size_t fa_amx_keys_scratch(const fa_problem *problem);
void fa_amx_keys_task(int64_t item, int worker, void *job);

/* Keys of a block, whose K, V, dK and dV stay while the queries pass. */
enum { FA_AMX_BLOCK_KEYS = 128 };

#endif
