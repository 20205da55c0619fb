/* amx_forward.h: what the passes of the AMX forward share. */
#ifndef FA_CPU_AMX_FORWARD_H
#define FA_CPU_AMX_FORWARD_H

#include "amx.h"
#include "amx_index.h"
#include "amx_lanes.h"
#include "amx_pack.h"
#include "job.h"

/* Packed keys of one head, from a block of 32 on. */
typedef struct {
  uint16_t *k, *v;   /* FA_AMX_DIMS_LEFT, FA_AMX_ROWS_LEFT */
  uint8_t *v_finite; /* [block] */
} fa_amx_keys;

typedef struct {
  fa_tile_index index;        /* tiles of 64 keys, which are two blocks */
  fa_amx_keys keys;           /* of all heads; unused where a task packs its head's own */
  int parts, strips;          /* strips: most that are at work at a time */
  int64_t k_halves, v_halves; /* of a block */
  float factor;               /* products -> log2 units; LOG2_E where fa_score_tile makes the scores */
} fa_amx_forward_shared;

static inline fa_amx_keys fa_amx_keys_from(const fa_amx_forward_shared *shared, fa_amx_keys keys, int64_t block) {
  return (fa_amx_keys){keys.k + block * shared->k_halves, keys.v + block * shared->v_halves, keys.v_finite + block};
}

/* Query rows [m0, m0 + 32 * strips) of a head, padding included. */
size_t fa_amx_queries_scratch(const fa_problem *problem, const fa_amx_forward_shared *shared);
void fa_amx_queries(const fa_amx_forward_shared *shared, const fa_head *head, fa_amx_keys keys, int m0, fa_arena arena);

#endif
