/* amx_forward.h: what the passes of the AMX forward share. */
#ifndef FA_CPU_AMX_FORWARD_H
#define FA_CPU_AMX_FORWARD_H

#include "amx.h"
#include "amx_index.h"
#include "amx_lanes.h"
#include "amx_pack.h"
#include "job.h"

typedef struct {
  fa_tile_index index;        /* tiles of 64 keys */
  uint16_t *k, *v;            /* FA_AMX_DIMS_LEFT, FA_AMX_ROWS_LEFT, two blocks of 32 keys a tile */
  uint8_t *v_finite;          /* [tile] */
  float *k_norm;              /* [tile]: the largest |k|^2, of finite elements */
  float *v_top;               /* [tile]: the largest finite |v| */
  int parts, strips;          /* strips: of a task */
  int64_t k_halves, v_halves; /* of 32 keys */
  float factor;               /* products -> log2 units; LOG2_E where fa_score_tile makes the scores */
} fa_amx_forward_shared;

/* The pass over queries: a task is `strips` strips of 32 query rows of one head. */
size_t fa_amx_queries_scratch(const fa_problem *problem, const fa_amx_forward_shared *shared);
void fa_amx_queries_task(int64_t item, int worker, void *job);

/* Rows [start, end) of a head's slot that are there but not used: out 0, lse -inf. */
void fa_amx_write_padding(const fa_head *head, int start, int end);

#endif
