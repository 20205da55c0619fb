/* work_sm90.h: a tile of 64 * WARPGROUPS query rows, from the producer, who finds it, to the consumers, who read it from shared memory.
 *
 * With FEW_ROWS a tile has BLOCK_M >> pack_log2 positions of 1 << pack_log2 heads of a group, of which the group may have fewer: row r is of position
 * r >> pack_log2, and the rest of r numbers the head. So the keys are read once for the group.
 *
 * Expects BLOCK_M, BLOCK_N, MASKING, VARLEN, BLOCK_MASK, FEW_ROWS.
 */
#ifndef FA_WORK_SM90_H
#define FA_WORK_SM90_H

#include "ptx_sm90.h"
#include "schedule_sm90.h"
#include "tile.h"

#define WORK_BYTES 48
#define NO_MORE_TILES -1
#define LISTED_BLOCKS 1024 /* 32 for each lane of the producer */

typedef struct {
  int b, h, m0;            /* batch entry, or NO_MORE_TILES; head, or the group's first; first position within the sequence */
  int first, last, blocks; /* key blocks from first to last that some row sees, and how many: BLOCK_MASK leaves gaps */
  int split;               /* FEW_ROWS: of the tile's keys these blocks are part number `split` */
  int len_q, len_k;        /* lengths of the sequence, and rows of it that the tensors hold: VARLEN only */
  int slot_q;
  int q_start;     /* where the sequence starts in the tensors: VARLEN only */
  unsigned listed; /* BLOCK_MASK: a word of the list of blocks, which is the producer's; see list_blocks */
} work;

/* Tells the compiler that a value is the same in all lanes. Descriptors made from it live in uniform registers, where wgmma wants them: otherwise
 * each product needs four moves there, and each warp 16 registers more. */
FA_INLINE int uniform(uint32_t x) { return (int)__shfl_sync(0xFFFFFFFFu, x, 0); }

FA_INLINE void send_work(uint32_t slot_smem, const work *t) {
  const uint32_t place[4] = {(uint32_t)t->b, (uint32_t)t->h, (uint32_t)t->m0, (uint32_t)t->first};
  const uint32_t keys[4] = {(uint32_t)t->last, (uint32_t)t->blocks, (uint32_t)t->q_start, (uint32_t)t->split};
  const uint32_t lengths[4] = {(uint32_t)t->len_q, (uint32_t)t->len_k, (uint32_t)t->slot_q, 0};
  st_shared_v4(slot_smem, place);
  st_shared_v4(slot_smem + 16, keys);
  if (VARLEN) st_shared_v4(slot_smem + 32, lengths);
}

FA_INLINE work receive_work(const fa_arg_problem *p, uint32_t slot_smem) {
  uint32_t place[4], keys[4], lengths[4];
  ld_shared_v4(place, slot_smem);
  ld_shared_v4(keys, slot_smem + 16);
  work t = {
      uniform(place[0]), uniform(place[1]), uniform(place[2]), uniform(place[3]), uniform(keys[0]), uniform(keys[1]), 0, 0, 0, 0, 0, 0};
  t.len_q = t.slot_q = p->seqlen_q;
  t.len_k = p->seqlen_k;
  if (FEW_ROWS) t.split = uniform(keys[3]);
  if (VARLEN) {
    ld_shared_v4(lengths, slot_smem + 32);
    t.len_q = uniform(lengths[0]);
    t.len_k = uniform(lengths[1]);
    t.slot_q = uniform(lengths[2]);
    t.q_start = uniform(keys[2]);
  }
  return t;
}

/* Positions that `rows` rows of a tile have. */
FA_INLINE int positions_of(const fa_arg_problem *p, int rows) { return FEW_ROWS ? rows >> p->pack_log2 : rows; }

/* Head and position of a row of the tile. `used`: the sequence has it; `held`: so do the tensors, and it is to be written. */
typedef struct {
  int h, position, used, held;
} row_place;

FA_INLINE row_place place_of_row(const fa_arg_problem *p, const work *t, int row) {
  row_place place = {t->h, t->m0 + row, t->m0 + row < t->len_q, t->m0 + row < t->slot_q};
  if (FEW_ROWS) {
    int head = row & ((1 << p->pack_log2) - 1), position = t->m0 + (row >> p->pack_log2);
    place.h = t->h + fa_min(head, p->group - 1);
    place.position = position;
    place.used = position < t->len_q && head < p->group;
    place.held = position < t->slot_q && head < p->group;
  }
  return place;
}

/* FEW_ROWS: where the statistics and the partial O of position 0 of a head lie in the workspace, in rows. */
FA_INLINE int64_t partial_row(const fa_arg_problem *p, const work *t, int h) {
  fa_tile tile = {t->b, h, 0, 0, 0, 0, 0, 0, t->q_start, 0};
  return t->split * fa_statistics_rows(p) + fa_statistics_row(p, &tile, 0);
}

/* Key blocks [first, last] that the rows [m0, m1) see by the rules of mask.h. */
FA_INLINE void seen_blocks(const fa_arg_problem *p, int len_q, int len_k, int m0, int m1, int *first, int *last) {
  fa_range seen = {0, len_k};
  if (MASKING) seen = fa_visited_keys(p->rule, len_q, len_k, m0, m1);
  *first = seen.lo / BLOCK_N;
  *last = m1 > m0 && seen.hi > 0 ? fa_ceil_div(seen.hi, BLOCK_N) - 1 : *first - 1;
}

/* Whether the block mask lets the tile see key j. */
FA_INLINE int block_is_seen(const fa_arg_problem *p, int b, int h, int m0, int j) {
  const char *mask = (const char *)p->block_mask.data + b * p->block_mask.b + h * p->block_mask.h;
  return mask[m0 / p->block_size * p->block_mask.m + j / p->block_size * p->block_mask.n];
}

/* Which of the blocks n, n - 1, ... n - 31 the tile sees: one bit each. All lanes of the warp take part. */
FA_INLINE unsigned seen_from(const fa_arg_problem *p, const work *t, int n) {
  n -= laneid();
  return __ballot_sync(0xFFFFFFFFu, n >= t->first && block_is_seen(p, t->b, t->h, t->m0, n * BLOCK_N));
}

/* Lane i's word of the list of blocks that the tile sees: of n - 32 i and the 31 before it, one bit each. Their number, over all lanes, is added to
 * *count. */
FA_INLINE unsigned list_blocks(const fa_arg_problem *p, const work *t, int n, int *count) {
  int lane = laneid();
  unsigned mine = 0;
#pragma unroll 4 /* reads side by side */
  for (int i = 0; i < 32 && n - 32 * i >= t->first; i++) {
    unsigned seen = seen_from(p, t, n - 32 * i);
    *count += __popc(seen);
    if (lane == i) mine = seen;
  }
  return mine;
}

/* The last block up to n that the tile sees, below t->first when there is none. All lanes of the warp take part. Blocks are asked for from last to
 * first, each once. */
FA_INLINE int next_block(const fa_arg_problem *p, work *t, int n) {
  while (BLOCK_MASK && n >= t->first) {
    int i = t->last - n, ignored = 0;
    if (i > 0 && i % LISTED_BLOCKS == 0) t->listed = list_blocks(p, t, n, &ignored);
    unsigned seen = __shfl_sync(0xFFFFFFFFu, t->listed, i / 32 % 32) >> i % 32;
    if (seen) return n + 1 - __ffs((int)seen);
    n -= 32 - i % 32;
  }
  return n;
}

/* Tile `number` of the schedule; b < 0 when there is none. All lanes of the warp take part. */
FA_INLINE work find_work(const fa_arg_problem *p, const fa_schedule *schedule, int number, int *k_start) {
  int head, index, of_sequence;
  int positions = positions_of(p, BLOCK_M), heads_of_tile = FEW_ROWS && p->pack_log2 ? p->group : 1, heads = p->heads_q / heads_of_tile,
      split = 0;
  work none = {NO_MORE_TILES, 0, 0, 0, -1, 0, 0, 0, 0, 0, 0, 0};
  if (number >= schedule->total) return none;
  if (FEW_ROWS) {
    split = number % schedule->splits;
    number /= schedule->splits;
  }
  fa_scheduled_tile(schedule, number, &head, &index);
  fa_tile found = {head / heads, head % heads, index * positions, 0, p->seqlen_q, 0, p->seqlen_q, p->seqlen_k, 0, 0};
  if (VARLEN && p->packed) {
    if (fa_find_sequence(p->cu_q, p->batch, positions, schedule->tiles - 1 - index, &found.b, &index, &of_sequence)) {
      fa_read_lengths(p, &found);
      of_sequence = fa_min(of_sequence, fa_ceil_div(found.slot_q, positions)); /* of which the tensors hold that many */
      if (index >= of_sequence) return none;
      found.m0 = (of_sequence - 1 - index) * positions;
    } else if (!fa_slack_tile(p, index, positions, &found)) {
      return none;
    }
  } else if (VARLEN) {
    fa_read_lengths(p, &found);
  }
  work t = {found.b, found.h * heads_of_tile, found.m0, 0, -1, 0, split, found.len_q, found.len_k, found.slot_q, (int)found.q_start, 0};
  *k_start = (int)found.k_start;
  seen_blocks(p, t.len_q, t.len_k, t.m0, fa_min(t.m0 + positions, t.len_q), &t.first, &t.last);
  if (FEW_ROWS) {
    int share = fa_ceil_div(fa_max(0, t.last - t.first + 1), schedule->splits);
    t.first += split * share;
    t.last = fa_min(t.last, t.first + share - 1);
  }
  t.blocks = fa_max(0, t.last - t.first + 1);
  if (BLOCK_MASK) {
    t.blocks = 0;
    t.listed = list_blocks(p, &t, t.last, &t.blocks);
    for (int n = t.last - LISTED_BLOCKS; n >= t.first; n -= LISTED_BLOCKS) list_blocks(p, &t, n, &t.blocks);
  }
  return t;
}

#endif
