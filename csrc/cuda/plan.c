/* plan.c: the forward plan. */
#include "plan.h"

#include <stdio.h>
#include <string.h>

#include "../core/error.h"
#include "kernels/args.h"
#include "plan_sm90.h"

typedef struct {
  int element_bytes, dim, columns, plain, room, most_cc, block_m, block_n, warps, stages, ctas;
} forward_tile;

static const forward_tile forward_tiles[] = {
#define FA_FWD_TILE(size, dim, columns, plain, room, cc, m, n, warps, stages, ctas) \
  {size, dim, columns, plain, room, cc, m, n, warps, stages, ctas},
#include "tiles.def"
#undef FA_FWD_TILE
};

enum {
  DIM_PAD = 32,        /* swizzled rows are multiples of four 16-byte chunks */
  PLAIN_ROWS = 4,      /* query rows of a CTA of fwd_f64 and probs: a warp each */
  MIN_SPLIT_TILES = 4, /* key tiles that a split should have at least */
  MAX_SPLITS = 256,
};

int fa_rows_are_aligned(const fa_view *view, int dim, fa_dtype dtype) {
  int64_t size = fa_dtype_bytes(dtype), bytes = 16;
  int strides = view->b * size % bytes == 0 && view->h * size % bytes == 0 && view->s * size % bytes == 0;
  return (view->d == 1 || dim == 1) && strides && dim * size % bytes == 0 && (uintptr_t)view->data % (uintptr_t)bytes == 0;
}

int fa_changes_scores(const fa_problem *p) {
  return p->score.scale <= 0 || p->score.softcap > 0 || p->score.bias.data || p->score.alibi.data || p->visibility.mask.data;
}

int64_t fa_sequence_tiles(const fa_problem *p, int64_t total, int seqlen, int rows) {
  int64_t each = ((int64_t)seqlen + rows - 1) / rows;
  if (!p->lengths.packed) return each;
  int64_t unbounded = total / rows + p->batch + 1, bounded = each * p->batch + (total + rows - 1) / rows;
  return bounded < unbounded ? bounded : unbounded;
}

/* As laid out in fwd_sm80.cu. */
static int smem_of(const forward_tile *t, int dim_qk, int columns) {
  int tiles = (t->block_m * dim_qk + t->stages * t->block_n * (dim_qk + columns)) * t->element_bytes;
  if (t->element_bytes == 4) tiles += (t->block_m + 2 * t->stages * t->block_n) * (int)sizeof(float); /* scales of rows (split.h) */
  return fa_max(tiles, t->block_m * (columns + 8) * 4);
}

static const forward_tile *choose_tile(const fa_problem *p, const fa_device_limits *limits, int plain, int dim_qk, int dim_v) {
  int block = p->visibility.block_size, cc = limits->cc_major * 10 + limits->cc_minor;
  for (size_t i = 0; i < sizeof forward_tiles / sizeof *forward_tiles; i++) {
    const forward_tile *t = &forward_tiles[i];
    if (t->element_bytes != fa_dtype_bytes(p->dtype) || t->dim < fa_max(dim_qk, dim_v) || (t->plain && !plain)) continue;
    if ((t->most_cc && cc > t->most_cc) || (block && (block % t->block_m || block % t->block_n))) continue;
    int bytes = smem_of(t, dim_qk, fa_min(dim_v, t->columns));
    if (bytes > limits->smem_per_block_optin || (t->room && t->ctas * (bytes + FA_RESERVED_SMEM) > limits->smem_per_sm)) continue;
    return t;
  }
  return NULL;
}

/* Splits the keys when the query tiles alone leave more than half of the SMs without work. Depends on shapes and device only. */
static int choose_splits(const fa_problem *p, const fa_device_limits *limits, const forward_tile *t, int64_t ctas) {
  int64_t wanted = (int64_t)limits->sm_count * t->ctas, key_tiles = fa_ceil_div(p->seqlen_k, t->block_n);
  if (!p->lengths.bounds_given || ctas == 0 || ctas * 2 > wanted) return 1;
  int64_t splits = wanted / ctas, most = key_tiles / MIN_SPLIT_TILES;
  splits = splits < most ? splits : most;
  splits = splits < MAX_SPLITS ? splits : MAX_SPLITS;
  if (splits <= 1) return 1;
  int64_t share = (key_tiles + splits - 1) / splits; /* no split stays empty */
  return (int)((key_tiles + share - 1) / share);
}

static fa_code check_grid(int64_t ctas, fa_error *error) {
  if (ctas <= INT32_MAX) return FA_OK;
  return fa_fail(error, FA_ERR_UNSUPPORTED, "q: batch, heads and seqlen make %lld tiles, the limit of a GPU grid is %d", (long long)ctas,
                 INT32_MAX);
}

static void note(fa_forward_plan *plan, const char *text) {
  if (plan->note_count < FA_MAX_NOTES) plan->notes[plan->note_count++] = text;
}

/* A kernel of so many warps that each work on their own: fwd_f64, probs, combine. */
static fa_planned_kernel of_warps(const char *name, fa_dtype dtype, int warps, int64_t grid) {
  fa_planned_kernel k = {.kernel = name, .grid = grid, .threads = 32 * warps};
  fa_add_constant(&k, "DTYPE", (int)dtype);
  return k;
}

static fa_code plan_f64(const fa_problem *p, fa_forward_plan *plan, fa_error *error) {
  int64_t heads = (int64_t)p->batch * p->heads_q, tiles = fa_sequence_tiles(p, p->total_q, p->seqlen_q, PLAIN_ROWS);
  if (p->lengths.packed) heads = p->heads_q;
  plan->block_m = PLAIN_ROWS;
  plan->block_n = 32;
  plan->tiles = (int)fa_max(1, (int)tiles);
  plan->main = of_warps("fwd_f64", p->dtype, PLAIN_ROWS, tiles * heads);
  note(plan, "float64 runs on CUDA cores, for gradient checks");
  return check_grid(tiles * heads, error);
}

static fa_code plan_sm80(const fa_problem *p, const fa_device_limits *limits, fa_forward_plan *plan, fa_error *error) {
  int dim_qk = fa_round_up(p->dim_qk, DIM_PAD), dim_v = fa_round_up(p->dim_v, DIM_PAD);
  int aligned = fa_rows_are_aligned(&p->q, p->dim_qk, p->dtype) && fa_rows_are_aligned(&p->k, p->dim_qk, p->dtype) &&
                fa_rows_are_aligned(&p->v, p->dim_v, p->dtype);
  int score = fa_changes_scores(p), dropout = p->dropout.p > 0, block_mask = p->visibility.block_size != 0;
  const forward_tile *t = choose_tile(p, limits, aligned && !score && !dropout && !block_mask, dim_qk, dim_v);
  if (!t)
    return fa_fail(error, FA_ERR_UNSUPPORTED,
                   "q: head dims %d and %d with a block size of %d fit no kernel within %d bytes of shared memory", p->dim_qk, p->dim_v,
                   p->visibility.block_size, limits->smem_per_block_optin);
  int columns = fa_min(dim_v, t->columns), parts = fa_ceil_div(dim_v, columns);
  int64_t tiles = fa_sequence_tiles(p, p->total_q, p->seqlen_q, t->block_m),
          heads = (int64_t)p->heads_q * (p->lengths.packed ? 1 : p->batch);
  plan->block_m = t->block_m;
  plan->block_n = t->block_n;
  plan->stages = t->stages;
  plan->splits = choose_splits(p, limits, t, tiles * heads * parts);
  fa_code code = check_grid(tiles * heads * plan->splits, error);
  if (code != FA_OK) return code;
  plan->tiles = fa_max(1, (int)tiles);

  fa_planned_kernel *k = &plan->main;
  *k = (fa_planned_kernel){.kernel = "fwd_sm80",
                           .grid = tiles * heads * plan->splits,
                           .grid_y = parts,
                           .threads = 32 * t->warps,
                           .smem_bytes = smem_of(t, dim_qk, columns)};
  const fa_constant constants[] = {
      {"DTYPE", (int)p->dtype}, {"HEAD_DIM", dim_qk}, {"DIM_V", columns},    {"BLOCK_M", t->block_m},
      {"BLOCK_N", t->block_n},  {"WARPS", t->warps},  {"STAGES", t->stages}, {"CTAS", t->ctas},
      {"ALIGNED", aligned},     {"SCORE", score},     {"DROPOUT", dropout},  {"BLOCK_MASK", block_mask},
  };
  for (size_t i = 0; i < sizeof constants / sizeof *constants; i++) fa_add_constant(k, constants[i].name, constants[i].value);
  if (!aligned) note(plan, "q, k or v: rows are not contiguous, 16-byte aligned and a multiple of 16 bytes: loaded element by element");
  if (p->dtype == FA_F32) note(plan, "float32 runs on tensor cores in products of two fp16 terms");
  return FA_OK;
}

static fa_code plan_combine(const fa_problem *p, fa_forward_plan *plan, fa_error *error) {
  if (plan->splits == 1) return FA_OK;
  int rows_of_cta = FA_COMBINE_WARPS / fa_combine_team(plan->splits);
  int64_t tiles = fa_sequence_tiles(p, p->total_q, p->seqlen_q, rows_of_cta),
          heads = (int64_t)p->heads_q * (p->lengths.packed ? 1 : p->batch);
  size_t rows = (size_t)p->heads_q * (size_t)p->total_q, splits = (size_t)plan->splits;
  plan->combine_tiles = (int)tiles;
  plan->combine = of_warps("combine", p->dtype, FA_COMBINE_WARPS, tiles * heads);
  plan->combine.smem_bytes = FA_COMBINE_WARPS * FA_COMBINE_DIM * (int)sizeof(float);
  plan->partial_lse_offset = fa_align_workspace(rows * splits * (size_t)p->dim_v * sizeof(float));
  plan->workspace_bytes = fa_align_workspace(plan->partial_lse_offset + rows * splits * sizeof(float));
  note(plan, "the keys are split over CTAs, since the query rows are too few to fill the GPU");
  return check_grid(tiles * heads, error);
}

fa_code fa_plan_forward(const fa_problem *p, const fa_device_limits *limits, fa_forward_plan *plan, fa_error *error) {
  memset(plan, 0, sizeof *plan);
  plan->splits = 1;
  fa_code code = FA_OK;
  const char *not_sm90 = fa_plan_forward_sm90(p, limits, plan);
  if (not_sm90) {
    code = p->dtype == FA_F64 ? plan_f64(p, plan, error) : plan_sm80(p, limits, plan, error);
    note(plan, not_sm90);
  }
  if (code == FA_OK) code = plan_combine(p, plan, error);
  plan->workspace_bytes += plan->queue_bytes;
  if (code == FA_OK && p->probs.data) {
    int64_t tiles = (p->seqlen_q + 127ll) / 128 * (128 / PLAIN_ROWS);
    plan->probs = of_warps("probs", p->dtype, PLAIN_ROWS, tiles * p->heads_q * p->batch);
    code = check_grid(plan->probs.grid, error);
  }
  return code;
}

fa_code fa_explain_forward(const fa_problem *p, const fa_device_limits *limits, char *text, size_t bytes, fa_error *error) {
  fa_forward_plan plan;
  char notes[512] = "", constants[512] = "";
  fa_code code = fa_plan_forward(p, limits, &plan, error);
  if (code != FA_OK) return code;
  for (int i = 0, used = 0; i < plan.note_count; i++)
    used += snprintf(notes + used, sizeof notes - (size_t)used, "%s\"%s\"", i ? ", " : "", plan.notes[i]);
  for (int i = 0, used = 0; i < plan.main.constant_count; i++)
    used += snprintf(constants + used, sizeof constants - (size_t)used, "%s\"%s\": %d", i ? ", " : "", plan.main.constants[i].name,
                     plan.main.constants[i].value);
  int needed =
      snprintf(text, bytes,
               "{\"engine\": \"cuda\", \"kernel\": \"%s\", \"arithmetic\": \"%s\", \"block_m\": %d, \"block_n\": %d, "
               "\"splits\": %d, \"ctas\": %lld, \"threads\": %d, \"smem_bytes\": %d, \"constants\": {%s}, \"workspace_bytes\": %zu, "
               "\"deterministic\": true, \"notes\": [%s]}",
               plan.main.kernel, p->dtype == FA_F64 ? "float64" : "float32", plan.block_m, plan.block_n, plan.splits,
               (long long)plan.main.grid * fa_max(1, plan.main.grid_y), plan.main.threads, plan.main.smem_bytes, constants,
               plan.workspace_bytes, notes);
  if (needed < 0 || (size_t)needed >= bytes)
    return fa_fail(error, FA_ERR_VALUE, "text: %zu bytes are too few, %d needed", bytes, needed + 1);
  return FA_OK;
}
