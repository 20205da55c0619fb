/* plan_sm90.c: can the Hopper kernel run this forward problem, and with which tile? */
#include "plan_sm90.h"

#include <stddef.h>
#include <string.h>

typedef struct {
  int dim_qk, dim_v, masking, features, varlen, block, few, keys, tiles, warpgroups, block_n, stages, q_stages, turns;
} tile_row;

static const tile_row tile_rows[] = {
#define FA_SM90_TILE(qk, v, masking, features, varlen, block, few, keys, tiles, wg, n, kv, q, turns) \
  {qk, v, masking, features, varlen, block, few, keys, tiles, wg, n, kv, q, turns},
#include "tiles_sm90.def"
#undef FA_SM90_TILE
};

enum {
  ANY = 2,
  QUERY_ROWS = 64,        /* of a warpgroup */
  CHUNK = 64,             /* columns of a swizzled row of 128 bytes */
  SECTION_KIB = 32 << 10, /* keys and values that a section of heads may keep in the L2 cache */
  TILE_SLOTS = 4,
  SHIFT_BYTES = 4096, /* of a warp */
  MAX_PACK_LOG2 = 6,  /* a warpgroup's rows hold at least one position */
  MAX_SPLITS = 128,
  /* For the choice of splits, as measured on an H200. In units of the time that an SM takes for a key block: what a tile takes besides its blocks, and
   * what combining parts takes besides their bytes; the bytes that an SM gets from memory in that time while all others load too; how much slower
   * the parts move. */
  TILE_COST = 2,
  COMBINE_COST = 6,
  BYTES_OF_BLOCK_TIME = 34 << 10,
  COMBINE_SLOWNESS = 2,
};

/* What a tile must have registers for. */
enum { PLAIN, SCORES, BIAS_OR_DROPOUT };

/* The constant SCORE. */
enum { NO_SCORE, SCORE, SCORE_AND_BIAS, SCORE_AND_TILES };

static int fits(int wanted, int is) { return wanted == ANY || wanted == is; }
static int chunks(int dim) { return (dim + CHUNK - 1) / CHUNK; }

/* A lone last query sees every key: under a causal mask as without. */
static int has_masking(const fa_problem *p) {
  const fa_rule rule = p->visibility.rule;
  return (rule.causal && (rule.causal != 1 || p->seqlen_q > 1)) || rule.window_left >= 0 || rule.window_right >= 0;
}

static int has_varlen(const fa_problem *p) { return p->lengths.packed || p->lengths.used_q.data || p->lengths.used_k.data; }

static int has_blocks(const fa_problem *p) { return p->visibility.block_mask.data != NULL; }

/* Rows of a bias or mask can be copied in chunks of 16 bytes. */
static int has_chunks(const fa_grid *g, int size) {
  return g->n == 1 && g->b * size % 16 == 0 && g->h * size % 16 == 0 && g->m * size % 16 == 0 && (uintptr_t)g->data % 16 == 0;
}

static int score_of(const fa_problem *p) {
  const fa_grid *bias = &p->score.bias, *mask = &p->visibility.mask;
  if (bias->data && !mask->data && bias->dtype == p->dtype && !has_blocks(p) && has_chunks(bias, 2)) return SCORE_AND_TILES;
  if (mask->data && !bias->data && !has_blocks(p) && has_chunks(mask, 1)) return SCORE_AND_TILES;
  if (bias->data || mask->data) return SCORE_AND_BIAS;
  return fa_changes_scores(p) ? SCORE : NO_SCORE;
}

static int features_of(const fa_problem *p) {
  if (score_of(p) >= SCORE_AND_BIAS || p->dropout.p > 0) return BIAS_OR_DROPOUT;
  return score_of(p) == SCORE ? SCORES : PLAIN;
}

/* As laid out at the head of fwd_sm90.cu. */
static int smem_of(const fa_problem *p, const tile_row *t) {
  int slab = QUERY_ROWS * 128 * chunks(t->dim_qk);
  int ring = t->stages * t->block_n * 128 * (chunks(t->dim_qk) + chunks(t->dim_v));
  int tiles = TILE_SLOTS * 48 + (t->stages + 1) / 2 * 8;
  int shifts = score_of(p) == SCORE_AND_TILES ? 4 * t->warpgroups * SHIFT_BYTES : 0;
  int barriers = 2 * t->warpgroups * t->q_stages + 4 * t->stages + 2 * TILE_SLOTS;
  return t->q_stages * t->warpgroups * slab + ring + shifts + tiles + 8 * barriers;
}

/* Every tile lies within one row of the block mask, every key block within one column. */
static int divides_blocks(const fa_problem *p, const tile_row *t) {
  int size = p->visibility.block_size;
  return !has_blocks(p) || (size % (QUERY_ROWS * t->warpgroups) == 0 && size % t->block_n == 0);
}

/* Tiles are of unequal length. */
static int is_uneven(const fa_problem *p) { return has_masking(p) || has_varlen(p) || has_blocks(p); }

/* The rows of a sequence and group fit one warpgroup, which then has the SM's shared memory for the loads of keys. */
static int has_few_rows(const fa_problem *p) {
  int padded = 1;
  while (padded < p->group) padded *= 2;
  return (int64_t)p->seqlen_q * padded <= QUERY_ROWS;
}

static int64_t tiles_in_all(const fa_problem *p, const tile_row *t) {
  return fa_sequence_tiles(p, p->total_q, p->seqlen_q, QUERY_ROWS * t->warpgroups) * p->heads_q * (p->lengths.packed ? 1 : p->batch);
}

/* Keys that a row sees at most. */
static int64_t keys_of_row(const fa_problem *p) {
  const fa_rule rule = p->visibility.rule;
  int64_t all = p->seqlen_k, before = rule.window_left < 0 ? all : rule.window_left,
          behind = rule.window_right < 0 ? all : rule.window_right;
  if (rule.causal) behind = 0;
  return before + 1 + behind < all ? before + 1 + behind : all;
}

static const tile_row *choose_row(const fa_problem *p, const fa_device_limits *limits) {
  for (size_t i = 0; i < sizeof tile_rows / sizeof *tile_rows; i++) {
    const tile_row *t = &tile_rows[i];
    if (p->dim_qk <= t->dim_qk && p->dim_v <= t->dim_v && fits(t->masking, has_masking(p)) && features_of(p) <= t->features &&
        fits(t->varlen, has_varlen(p)) && t->block == has_blocks(p) && fits(t->few, has_few_rows(p)) && divides_blocks(p, t) &&
        keys_of_row(p) >= t->keys && tiles_in_all(p, t) >= (int64_t)t->tiles * limits->sm_count &&
        smem_of(p, t) <= limits->smem_per_block_optin)
      return t;
  }
  return NULL;
}

/* The TMA counts strides in bytes, unsigned, below 2^40; broadcast (stride 0) dimensions are left to the portable kernel. */
int fa_tma_can_read(const fa_view *view, int batch, int heads, int positions, int dim) {
  const int64_t limit = (int64_t)1 << 39, strides[] = {view->b, view->h, view->s};
  const int extents[] = {batch, heads, positions};
  for (int i = 0; i < 3; i++)
    if (extents[i] > 1 && (strides[i] <= 0 || strides[i] >= limit)) return 0;
  return fa_rows_are_aligned(view, dim, FA_BF16);
}

static int tma_can_read_all(const fa_problem *p) {
  int b = p->lengths.packed ? 1 : p->batch;
  return fa_tma_can_read(&p->q, b, p->heads_q, p->seqlen_q, p->dim_qk) && fa_tma_can_read(&p->k, b, p->heads_k, p->seqlen_k, p->dim_qk) &&
         fa_tma_can_read(&p->v, b, p->heads_k, p->seqlen_k, p->dim_v) &&
         (!p->out.data || fa_tma_can_read(&p->out, b, p->heads_q, p->seqlen_q, p->dim_v));
}

static const char *why_not(const fa_problem *p, const fa_device_limits *limits) {
  if (limits->cc_major != 9 || limits->cc_minor != 0) return "fwd_sm90: the device is not of compute capability 9.0";
  if (p->dtype != FA_F16 && p->dtype != FA_BF16) return "fwd_sm90: q is neither float16 nor bfloat16";
  if (p->seqlen_q == 0 || p->seqlen_k == 0 || p->batch == 0) return "fwd_sm90: there is nothing to multiply";
  if (p->total_q > INT32_MAX || p->total_k > INT32_MAX) return "fwd_sm90: more than 2^31 positions";
  if (!tma_can_read_all(p))
    return "fwd_sm90: q, k, v or out has rows that are not contiguous, 16-byte aligned and a multiple of 16 bytes, or is expanded";
  return NULL;
}

/* Query tiles of all heads, with 1 << pack_log2 heads of a group in a tile. */
static int64_t count_tiles(const fa_problem *p, const tile_row *t, int pack_log2, int64_t *heads) {
  *heads = (int64_t)(pack_log2 ? p->heads_k : p->heads_q) * (p->lengths.packed ? 1 : p->batch);
  return fa_sequence_tiles(p, p->total_q, p->seqlen_q, QUERY_ROWS * t->warpgroups >> pack_log2);
}

/* Packs the heads of a group into one tile, as a power of 2, where that makes clearly fewer tiles of a sequence: with few query rows a tile of one
 * head is mostly empty, and every head reads the keys anew. Returns the logarithm, 0 for no packing. */
static int choose_pack(const fa_problem *p, const tile_row *t) {
  int log2 = 0, block_m = QUERY_ROWS * t->warpgroups;
  while (1 << log2 < p->group) log2++;
  if (log2 == 0 || log2 > MAX_PACK_LOG2 || has_blocks(p)) return 0;
  int64_t apart = (int64_t)p->group * fa_ceil_div(p->seqlen_q, block_m), together = fa_ceil_div(p->seqlen_q, block_m >> log2);
  return 8 * together <= 7 * apart ? log2 : 0;
}

/* Time of `ctas` tiles side by side, of `share` key blocks each, in units of the time that an SM takes for a block: more where the memory cannot bring
 * all their keys in that time. Tiles of one head read the same keys, from the cache. */
static double time_of_wave(const fa_problem *p, const fa_device_limits *limits, const tile_row *t, int64_t tiles, int64_t ctas,
                           int64_t share) {
  double own_keys = (double)p->batch * p->heads_k / (double)tiles, busy = (double)ctas / limits->sm_count;
  double loading = busy * (own_keys < 1 ? own_keys : 1) * t->block_n * (p->dim_qk + p->dim_v) * 2 / BYTES_OF_BLOCK_TIME;
  return ctas == 0 ? 0 : (double)share * (loading > 1 ? loading : 1) + TILE_COST;
}

/* Time of all tiles with their keys in so many parts, which are written and read once more. */
static double time_of_splits(const fa_problem *p, const fa_device_limits *limits, const tile_row *t, int64_t tiles, int splits) {
  int64_t blocks = fa_ceil_div(p->seqlen_k, t->block_n), share = (blocks + splits - 1) / splits, ctas = tiles * splits,
          sms = limits->sm_count;
  double parts_bytes = (double)splits * p->heads_q * (double)p->total_q * p->dim_v * 8;
  double time = (double)(ctas / sms) * time_of_wave(p, limits, t, tiles, sms, share) + time_of_wave(p, limits, t, tiles, ctas % sms, share);
  return splits == 1 ? time : time + COMBINE_COST + COMBINE_SLOWNESS * parts_bytes / ((double)BYTES_OF_BLOCK_TIME * limits->sm_count);
}

/* The split of the keys with the shortest time, when there is not a tile for every SM, or tiles are alike and their last wave leaves SMs idle. Depends on
 * shapes and device only. */
static int choose_splits(const fa_problem *p, const fa_device_limits *limits, const tile_row *t, int64_t tiles) {
  int64_t blocks = fa_ceil_div(p->seqlen_k, t->block_n), most = is_uneven(p) ? 1 : 4;
  int chosen = 1;
  if (!p->lengths.bounds_given || tiles == 0 || tiles >= most * limits->sm_count) return 1;
  double best = time_of_splits(p, limits, t, tiles, 1);
  for (int splits = 2; splits <= blocks && splits <= MAX_SPLITS; splits++) {
    double time = time_of_splits(p, limits, t, tiles, splits);
    if (time < best) best = time, chosen = splits;
  }
  return chosen;
}

/* O leaves through the slab of Q: where another stage takes the next Q meanwhile, and a tile's rows end where the tensor does. */
static int sends_output(const fa_problem *p, const fa_forward_plan *plan, const tile_row *t) {
  return t->q_stages > 1 && !has_varlen(p) && !fa_plan_has_few_rows(plan) && chunks(t->dim_v) <= chunks(t->dim_qk);
}

static void add_constants(fa_planned_kernel *k, const fa_problem *p, const fa_forward_plan *plan, const tile_row *t) {
  const fa_constant constants[] = {
      {"DTYPE", (int)p->dtype},      {"HEAD_DIM", t->dim_qk},
      {"DIM_V", t->dim_v},           {"BLOCK_N", t->block_n},
      {"WARPGROUPS", t->warpgroups}, {"STAGES", t->stages},
      {"Q_STAGES", t->q_stages},     {"TMA_STORE", sends_output(p, plan, t)},
      {"PINGPONG", t->turns},        {"OVERLAP", 1},
      {"LAZY_RESCALE", 1},           {"QUEUE", 1},
      {"MASKING", has_masking(p)},   {"SCORE", score_of(p)},
      {"VARLEN", has_varlen(p)},     {"BLOCK_MASK", has_blocks(p)},
      {"DROPOUT", p->dropout.p > 0}, {"FEW_ROWS", fa_plan_has_few_rows(plan)},
  };
  for (size_t i = 0; i < sizeof constants / sizeof *constants; i++) fa_add_constant(k, constants[i].name, constants[i].value);
}

const char *fa_plan_forward_sm90(const fa_problem *p, const fa_device_limits *limits, fa_forward_plan *plan) {
  const char *reason = why_not(p, limits);
  if (reason) return reason;
  const tile_row *t = choose_row(p, limits);
  if (!t && has_blocks(p)) return "fwd_sm90: no tile divides the blocks of block_mask";
  if (!t) return "fwd_sm90: no tile for these head dims within the device's shared memory";
  int pack_log2 = choose_pack(p, t);
  int64_t heads, tiles = count_tiles(p, t, pack_log2, &heads);
  if (tiles * heads > INT32_MAX / 2) return "fwd_sm90: more than 2^30 query tiles";
  int splits = choose_splits(p, limits, t, tiles * heads);
  if (splits > 1 && has_blocks(p))
    return "fwd_sm90: the query rows are too few to fill the GPU, and under a block_mask it cannot split the keys";

  int64_t all = tiles * heads * splits, grid = all < limits->sm_count ? all : limits->sm_count;
  plan->main = (fa_planned_kernel){.kernel = "fwd_sm90", .grid = grid, .threads = 128 * (t->warpgroups + 1), .smem_bytes = smem_of(p, t)};
  plan->block_m = QUERY_ROWS * t->warpgroups;
  plan->block_n = t->block_n;
  plan->stages = t->stages;
  plan->tiles = (int)tiles;
  plan->splits = splits;
  plan->pack_log2 = pack_log2;
  plan->queue_bytes = all > grid && is_uneven(p) ? FA_WORKSPACE_ALIGNMENT : 0;
  add_constants(&plan->main, p, plan, t);
  if (pack_log2) plan->notes[plan->note_count++] = "the query heads of a group share a tile, since one alone would leave it mostly empty";
  return NULL;
}

int fa_plan_has_few_rows(const fa_forward_plan *plan) { return plan->splits > 1 || plan->pack_log2 > 0; }

int fa_plan_is_sm90(const fa_forward_plan *plan) { return plan->main.kernel && strcmp(plan->main.kernel, "fwd_sm90") == 0; }

fa_schedule fa_schedule_sm90(const fa_problem *p, const fa_forward_plan *plan) {
  int heads = (plan->pack_log2 ? p->heads_k : p->heads_q) * (p->lengths.packed ? 1 : p->batch);
  int64_t section = 1;
  if (is_uneven(p)) { /* tiles of unequal length: heads side by side, so that each starts with its longest */
    int64_t sharing = plan->pack_log2 ? 1 : p->group, head_bytes = (int64_t)p->seqlen_k * (p->dim_qk + p->dim_v) * 2,
            fitting = ((int64_t)SECTION_KIB << 10) / head_bytes;
    section = sharing * (fitting < 1 ? 1 : fitting);
  }
  return (fa_schedule){
      .heads = heads,
      .tiles = plan->tiles,
      .section = section < heads ? (int)section : heads,
      .splits = plan->splits,
      .total = heads * plan->tiles * plan->splits,
      .scale_log2 = (float)(p->score.scale * 1.4426950408889634),
  };
}
