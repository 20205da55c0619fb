/* plan_sm90.c: can the Hopper kernel run this forward problem, and with which tile? */
#include "plan_sm90.h"

#include <stddef.h>
#include <string.h>

typedef struct {
  int dim_qk, dim_v, masking, score, varlen, block, keys, warpgroups, block_n, stages, q_stages, turns;
} tile_row;

static const tile_row tile_rows[] = {
#define FA_SM90_TILE(qk, v, masking, score, varlen, block, keys, wg, n, kv, q, turns) \
  {qk, v, masking, score, varlen, block, keys, wg, n, kv, q, turns},
#include "tiles_sm90.def"
#undef FA_SM90_TILE
};

enum {
  ANY = 2,
  QUERY_ROWS = 64,        /* of a warpgroup */
  CHUNK = 64,             /* columns of a swizzled row of 128 bytes */
  SECTION_KIB = 32 << 10, /* keys and values that a section of heads may keep in the L2 cache */
  TILE_SLOTS = 4,
  SPLIT_BLOCKS = 8, /* from here on it pays to split the keys of a problem with few query tiles */
};

static int fits(int wanted, int is) { return wanted == ANY || wanted == is; }
static int chunks(int dim) { return (dim + CHUNK - 1) / CHUNK; }

static int has_masking(const fa_problem *p) {
  const fa_rule rule = p->visibility.rule;
  return rule.causal || rule.window_left >= 0 || rule.window_right >= 0;
}

static int has_varlen(const fa_problem *p) { return p->lengths.packed || p->lengths.used_q.data || p->lengths.used_k.data; }

/* As laid out at the head of fwd_sm90.cu. */
static int smem_of(const tile_row *t) {
  int slab = QUERY_ROWS * 128 * chunks(t->dim_qk);
  int ring = t->stages * t->block_n * 128 * (chunks(t->dim_qk) + chunks(t->dim_v));
  int tiles = TILE_SLOTS * 48 + (t->stages + 1) / 2 * 8;
  int barriers = 2 * t->warpgroups * t->q_stages + 4 * t->stages + 2 * TILE_SLOTS;
  return t->q_stages * t->warpgroups * slab + ring + tiles + 8 * barriers;
}

static int has_blocks(const fa_problem *p) { return p->visibility.block_mask.data != NULL; }

/* Every tile lies within one row of the block mask, every key block within one column. */
static int divides_blocks(const fa_problem *p, const tile_row *t) {
  int size = p->visibility.block_size;
  return !has_blocks(p) || (size % (QUERY_ROWS * t->warpgroups) == 0 && size % t->block_n == 0);
}

/* Tiles are of unequal length. */
static int is_uneven(const fa_problem *p) { return has_masking(p) || has_varlen(p) || has_blocks(p); }

static const tile_row *choose_row(const fa_problem *p, const fa_device_limits *limits) {
  for (size_t i = 0; i < sizeof tile_rows / sizeof *tile_rows; i++) {
    const tile_row *t = &tile_rows[i];
    if (p->dim_qk <= t->dim_qk && p->dim_v <= t->dim_v && fits(t->masking, has_masking(p)) && fits(t->score, fa_changes_scores(p)) &&
        fits(t->varlen, has_varlen(p)) && t->block == has_blocks(p) && divides_blocks(p, t) && p->seqlen_k >= t->keys &&
        smem_of(t) <= limits->smem_per_block_optin)
      return t;
  }
  return NULL;
}

/* The TMA counts strides in bytes, unsigned, below 2^40; broadcast (stride 0) dimensions are left to the portable kernel. */
static int tma_can_read(const fa_view *view, int batch, int heads, int positions, int dim) {
  const int64_t limit = (int64_t)1 << 39, strides[] = {view->b, view->h, view->s};
  const int extents[] = {batch, heads, positions};
  for (int i = 0; i < 3; i++)
    if (extents[i] > 1 && (strides[i] <= 0 || strides[i] >= limit)) return 0;
  return fa_rows_are_aligned(view, dim, FA_BF16);
}

static int tma_can_read_all(const fa_problem *p) {
  int b = p->lengths.packed ? 1 : p->batch;
  return tma_can_read(&p->q, b, p->heads_q, p->seqlen_q, p->dim_qk) && tma_can_read(&p->k, b, p->heads_k, p->seqlen_k, p->dim_qk) &&
         tma_can_read(&p->v, b, p->heads_k, p->seqlen_k, p->dim_v) &&
         (!p->out.data || tma_can_read(&p->out, b, p->heads_q, p->seqlen_q, p->dim_v));
}

static const char *why_not(const fa_problem *p, const fa_device_limits *limits) {
  if (limits->cc_major != 9 || limits->cc_minor != 0) return "fwd_sm90: the device is not of compute capability 9.0";
  if (p->dtype != FA_F16 && p->dtype != FA_BF16) return "fwd_sm90: q is neither float16 nor bfloat16";
  if (p->dropout.p > 0) return "fwd_sm90: dropout_p is not 0";
  if (p->score.bias.data) return "fwd_sm90: there is a bias";
  if (p->visibility.mask.data) return "fwd_sm90: there is a mask";
  if (p->seqlen_q == 0 || p->seqlen_k == 0 || p->batch == 0) return "fwd_sm90: there is nothing to multiply";
  if (p->total_q > INT32_MAX || p->total_k > INT32_MAX) return "fwd_sm90: more than 2^31 positions";
  if (!tma_can_read_all(p))
    return "fwd_sm90: q, k, v or out has rows that are not contiguous, 16-byte aligned and a multiple of 16 bytes, or is expanded";
  return NULL;
}

/* Few query tiles and many keys: the portable kernel splits the keys over the GPU, this one does not. */
static int wants_split(const fa_problem *p, const fa_device_limits *limits, const tile_row *t, int64_t tiles) {
  return p->lengths.bounds_given && tiles * 2 <= limits->sm_count && p->seqlen_k >= SPLIT_BLOCKS * t->block_n;
}

static void add_constants(fa_planned_kernel *k, const fa_problem *p, const tile_row *t) {
  const fa_constant constants[] = {
      {"DTYPE", (int)p->dtype},  {"HEAD_DIM", t->dim_qk},       {"DIM_V", t->dim_v},
      {"BLOCK_N", t->block_n},   {"WARPGROUPS", t->warpgroups}, {"STAGES", t->stages},
      {"Q_STAGES", t->q_stages}, {"PINGPONG", t->turns},        {"OVERLAP", 1},

      {"LAZY_RESCALE", 1},       {"MASKING", has_masking(p)},   {"SCORE", fa_changes_scores(p)},
      {"VARLEN", has_varlen(p)}, {"BLOCK_MASK", has_blocks(p)},
  };
  for (size_t i = 0; i < sizeof constants / sizeof *constants; i++) fa_add_constant(k, constants[i].name, constants[i].value);
}

const char *fa_plan_forward_sm90(const fa_problem *p, const fa_device_limits *limits, fa_forward_plan *plan) {
  const char *reason = why_not(p, limits);
  if (reason) return reason;
  const tile_row *t = choose_row(p, limits);
  if (!t && has_blocks(p)) return "fwd_sm90: no tile divides the blocks of block_mask";
  if (!t) return "fwd_sm90: no tile for these head dims within the device's shared memory";
  int block_m = QUERY_ROWS * t->warpgroups;
  int64_t tiles = fa_sequence_tiles(p, p->total_q, p->seqlen_q, block_m), heads = (int64_t)p->heads_q * (p->lengths.packed ? 1 : p->batch);
  if (tiles * heads > INT32_MAX / 2) return "fwd_sm90: more than 2^30 query tiles";
  if (wants_split(p, limits, t, tiles * heads)) return "fwd_sm90: the query rows are too few to fill the GPU, so the keys are split";

  int64_t grid = tiles * heads < limits->sm_count ? tiles * heads : limits->sm_count;
  plan->main = (fa_planned_kernel){.kernel = "fwd_sm90", .grid = grid, .threads = 128 * (t->warpgroups + 1), .smem_bytes = smem_of(t)};
  add_constants(&plan->main, p, t);
  plan->block_m = block_m;
  plan->block_n = t->block_n;
  plan->stages = t->stages;
  plan->tiles = (int)tiles;
  plan->splits = 1;
  plan->workspace_bytes = tiles * heads > grid && is_uneven(p) ? FA_WORKSPACE_ALIGNMENT : 0; /* the queue's counter */
  return NULL;
}

int fa_plan_is_sm90(const fa_forward_plan *plan) { return plan->main.kernel && strcmp(plan->main.kernel, "fwd_sm90") == 0; }

fa_schedule fa_schedule_sm90(const fa_problem *p, const fa_forward_plan *plan) {
  int heads = p->heads_q * (p->lengths.packed ? 1 : p->batch);
  int64_t section = p->group;
  if (is_uneven(p)) { /* tiles of unequal length: heads side by side, so that each starts with its longest */
    int64_t head_bytes = (int64_t)p->seqlen_k * (p->dim_qk + p->dim_v) * 2, fitting = ((int64_t)SECTION_KIB << 10) / head_bytes;
    section *= fitting < 1 ? 1 : fitting;
  }
  return (fa_schedule){
      .heads = heads,
      .tiles = plan->tiles,
      .section = section < heads ? (int)section : heads,
      .total = heads * plan->tiles,
      .scale_log2 = (float)(p->score.scale * 1.4426950408889634),
  };
}
