/* plan_bwd.c: the backward plan. */
#include "plan_bwd.h"

#include <stdio.h>
#include <string.h>

#include "../core/error.h"
#include "kernels/args_bwd.h"
#include "plan_bwd_sm90.h"
#include "plan_bwd_wide.h"

/* bwd_keys_sm80: a warp owns keys. bwd_sm80: warps share out each product of a tile anew, S and dP each among all of them or among half. */
enum { KEYS, TILES, PAIRS };

typedef struct {
  int kernel, element_bytes, dim, plain, block_m, block_n, warps, s_warps, kv_warps, dq_warps, stages, ctas;
} key_tile;

typedef struct {
  int element_bytes, dim, block_n, warps, stages;
} row_tile;

static const key_tile key_tiles[] = {
#define FA_BWD_TILE(kernel, size, dim, plain, m, n, warps, s, kv, dq, stages, ctas) \
  {kernel, size, dim, plain, m, n, warps, s, kv, dq, stages, ctas},
#include "tiles_bwd.def"
#undef FA_BWD_TILE
};

static const row_tile row_tiles[] = {
#define FA_BWD_ROW_TILE(size, dim, n, warps, stages) {size, dim, n, warps, stages},
#include "tiles_bwd.def"
#undef FA_BWD_ROW_TILE
};

enum {
  DIM_PAD = 32,
  PLAIN_TILE = 32,      /* rows and keys of a tile of bwd_f64 */
  WORK_SMEM = 128,      /* what bwd_sm80 keeps beside its tiles, rounded up */
  MEMORY_THREADS = 256, /* of a CTA of bwd_prep, bwd_finish, bwd_heads, bwd_f64 */
};

/* What the plan decides once and every part of it reads. */
typedef struct {
  const fa_problem *problem;
  int smem_limit, smem_per_sm;
  int aligned, score, dropout;
  int wants_keys, wants_rows; /* dk or dv; dq or dalibi */
  const key_tile *keys;
  const row_tile *rows;
  int wide;                            /* 1: bwd_keys_sm90 and bwd_rows_sm90, which are planned elsewhere */
  const fa_backward_tile_sm90 *hopper; /* instead of `keys` */
  int plain;                           /* 1: bwd_f64 */
} choice;

static void note(fa_backward_plan *plan, const char *text) {
  if (plan->note_count < FA_MAX_NOTES) plan->notes[plan->note_count++] = text;
}

static int gradient_is_aligned(const fa_view *view, int dim, fa_dtype dtype) {
  return !view->data || fa_rows_are_aligned(view, dim, dtype);
}

static int all_rows_are_aligned(const fa_problem *p) {
  return fa_rows_are_aligned(&p->q, p->dim_qk, p->dtype) && fa_rows_are_aligned(&p->k, p->dim_qk, p->dtype) &&
         fa_rows_are_aligned(&p->v, p->dim_v, p->dtype) && fa_rows_are_aligned(&p->out, p->dim_v, p->dtype) &&
         fa_rows_are_aligned(&p->grad.dout, p->dim_v, p->dtype) && gradient_is_aligned(&p->grad.dq, p->dim_qk, p->dtype) &&
         gradient_is_aligned(&p->grad.dk, p->dim_qk, p->dtype) && gradient_is_aligned(&p->grad.dv, p->dim_v, p->dtype);
}

/* ---- tiles ---- */

/* A warp has whole fragments of dK, dV and dQ; with KEYS all columns of the first two. */
static int pad_of(const key_tile *t) {
  return fa_max(DIM_PAD, 16 * t->warps / (t->kernel == KEYS ? t->dq_warps : fa_min(t->kv_warps, t->dq_warps)));
}

/* fp32: scales of a row of Q or K and of dO or V (split.h). */
static int scale_bytes(int element_bytes) { return element_bytes == 4 ? 2 * (int)sizeof(float) : 0; }

static int key_smem(const fa_problem *p, const key_tile *t) {
  int dims = fa_round_up(p->dim_qk, pad_of(t)) + fa_round_up(p->dim_v, pad_of(t));
  int score_tiles = t->stages == 3 ? 4 : 2; /* P and dS, of one tile or of two; with KEYS dS of two */
  int statistics = t->kernel == KEYS || (t->stages >= 2 && t->ctas == 1) ? t->stages * 2 * t->block_m * (int)sizeof(float) : 0;
  int exchange = t->kernel == PAIRS ? t->block_m * t->block_n * (int)sizeof(float) : 0;
  int rows = t->block_n + t->stages * t->block_m, elements = rows * dims + score_tiles * t->block_m * t->block_n;
  return elements * t->element_bytes + rows * scale_bytes(t->element_bytes) + statistics + exchange + WORK_SMEM;
}

static int row_smem(const fa_problem *p, const row_tile *t, int stages) {
  int dims = fa_round_up(p->dim_qk, DIM_PAD) + fa_round_up(p->dim_v, DIM_PAD);
  return (16 * t->warps + stages * t->block_n) * (dims * t->element_bytes + scale_bytes(t->element_bytes));
}

/* Two slices of operands, P and dS. */
static int plain_smem(const fa_problem *p) { return 4 * PLAIN_TILE * (PLAIN_TILE + 1) * fa_dtype_bytes(p->dtype); }

static const key_tile *choose_keys(const choice *c) {
  const fa_problem *p = c->problem;
  int block = p->visibility.block_size, plain = c->aligned && !c->score && !c->dropout, dim = fa_max(p->dim_qk, p->dim_v);
  for (size_t i = 0; i < sizeof key_tiles / sizeof *key_tiles; i++) {
    const key_tile *t = &key_tiles[i];
    if (t->element_bytes != fa_dtype_bytes(p->dtype) || t->dim < dim || (t->plain && !plain)) continue;
    if (block && (block % t->block_m || block % t->block_n)) continue;
    int bytes = key_smem(p, t);
    if (bytes <= c->smem_limit && (t->ctas == 1 || t->ctas * (bytes + FA_RESERVED_SMEM) <= c->smem_per_sm)) return t;
  }
  return NULL;
}

static const row_tile *choose_rows(const choice *c) {
  const fa_problem *p = c->problem;
  for (size_t i = 0; i < sizeof row_tiles / sizeof *row_tiles; i++) {
    const row_tile *t = &row_tiles[i];
    if (t->element_bytes != fa_dtype_bytes(p->dtype) || t->dim < fa_max(p->dim_qk, p->dim_v)) continue;
    if (row_smem(p, t, t->stages) <= c->smem_limit) return t;
  }
  return NULL;
}

static choice choose(const fa_problem *p, const fa_device_limits *limits, fa_backward_plan *plan) {
  choice c = {.problem = p, .smem_limit = limits->smem_per_block_optin, .smem_per_sm = limits->smem_per_sm};
  c.aligned = p->dtype != FA_F64 && all_rows_are_aligned(p);
  c.score = p->score.softcap > 0 || p->score.bias.data || p->score.alibi.data || p->visibility.mask.data;
  c.dropout = p->dropout.p > 0;
  c.wants_keys = p->grad.dk.data || p->grad.dv.data;
  c.wants_rows = p->grad.dq.data || p->grad.dalibi.data;
  c.keys = choose_keys(&c);
  c.rows = choose_rows(&c);
  c.plain = !c.keys || !c.rows;
  const char *reason = fa_plan_backward_wide(p, limits, plan);
  c.wide = !reason;
  if (c.wide) return c;
  int is_wide = fa_max(p->dim_qk, p->dim_v) > 128;
  if (is_wide && limits->cc_major == 9) note(plan, reason);
  plan->adds_dq = !c.plain && p->grad.dq.data && !p->grad.dalibi.data && !p->deterministic && c.wants_keys;
  if (c.wants_keys && !is_wide) {
    c.hopper = fa_choose_backward_sm90(p, limits, c.aligned, &reason);
    if (!c.hopper) note(plan, reason);
  }
  if (p->dtype == FA_F64) note(plan, "float64 runs on CUDA cores, for gradient checks");
  if (c.plain && p->dtype != FA_F64) note(plan, "the tiles of these head dims do not fit this GPU's shared memory: runs on CUDA cores");
  if (!c.plain && !c.aligned)
    note(plan,
         "q, k, v, out or a gradient: rows are not contiguous, 16-byte aligned and a multiple of 16 bytes: loaded element by element");
  if (!c.plain && p->dtype == FA_F32) note(plan, "float32 runs on tensor cores in products of two fp16 terms");
  if (!c.plain && c.wants_keys && c.wants_rows && !plan->adds_dq)
    note(plan, "dq comes from a kernel of its own, since deterministic or the gradient of alibi_slopes is asked for");
  return c;
}

/* ---- launches ---- */

/* CTAs for `tiles` tiles of each sequence (dense) or in all (packed). */
static int64_t grid_of(const fa_problem *p, int64_t tiles, int heads) { return tiles * heads * (p->lengths.packed ? 1 : p->batch); }

static int64_t query_tiles(const fa_problem *p, int rows) { return fa_sequence_tiles(p, p->total_q, p->seqlen_q, rows); }

static fa_planned_kernel *add_launch(fa_backward_plan *plan, int which, const char *name, int64_t grid, int threads, int smem_bytes,
                                     int dtype) {
  fa_planned_kernel *k = &plan->launches[which];
  *k = (fa_planned_kernel){.kernel = name, .grid = grid, .threads = threads, .smem_bytes = smem_bytes};
  fa_add_constant(k, "DTYPE", dtype);
  return k;
}

static fa_planned_kernel *add_plain(const choice *c, fa_backward_plan *plan, int which, int role, int64_t grid) {
  fa_planned_kernel *k = add_launch(plan, which, "bwd_f64", grid, MEMORY_THREADS, plain_smem(c->problem), (int)c->problem->dtype);
  fa_add_constant(k, "ROLE", role);
  fa_add_constant(k, "SLICES", fa_ceil_div(fa_max(c->problem->dim_qk, c->problem->dim_v), PLAIN_TILE));
  fa_add_constant(k, "DROPOUT", c->dropout);
  return k;
}

static void plan_keys(const choice *c, fa_backward_plan *plan) {
  const fa_problem *p = c->problem;
  if (c->hopper) {
    fa_plan_backward_sm90(p, c->hopper, plan);
    return;
  }
  const key_tile *t = c->keys;
  plan->block_m = c->plain ? PLAIN_TILE : t->block_m;
  plan->block_n = c->plain ? PLAIN_TILE : t->block_n;
  plan->stages = c->plain ? 1 : t->stages;
  int64_t tiles = fa_sequence_tiles(p, p->total_k, p->seqlen_k, plan->block_n);
  plan->key_tiles = (int)tiles;
  if (!c->wants_keys) return;
  if (c->plain) {
    add_plain(c, plan, FA_BWD_KEYS, 0, grid_of(p, tiles, p->heads_k));
    return;
  }
  int dim_qk = fa_round_up(p->dim_qk, pad_of(t)), dim_v = fa_round_up(p->dim_v, pad_of(t));
  const char *kernel = t->kernel == KEYS ? "bwd_keys_sm80" : "bwd_sm80";
  fa_planned_kernel *k = add_launch(plan, FA_BWD_KEYS, kernel, grid_of(p, tiles, p->heads_k), 32 * t->warps, key_smem(p, t), (int)p->dtype);
  const fa_constant shared[] = {{"HEAD_DIM", dim_qk}, {"DIM_V", dim_v},          {"BLOCK_M", t->block_m}, {"BLOCK_N", t->block_n},
                                {"WARPS", t->warps},  {"DQ_WARPS", t->dq_warps}, {"CTAS", t->ctas},       {"ADD_DQ", plan->adds_dq}};
  const fa_constant of_tiles[] = {{"S_WARPS", t->s_warps},        {"KV_WARPS", t->kv_warps}, {"STAGES", t->stages},
                                  {"PAIRED", t->kernel == PAIRS}, {"ALIGNED", c->aligned},   {"SCORE", c->score},
                                  {"DROPOUT", c->dropout}};
  for (size_t i = 0; i < sizeof shared / sizeof *shared; i++) fa_add_constant(k, shared[i].name, shared[i].value);
  if (t->kernel != KEYS)
    for (size_t i = 0; i < sizeof of_tiles / sizeof *of_tiles; i++) fa_add_constant(k, of_tiles[i].name, of_tiles[i].value);
  plan->dq_columns = plan->adds_dq ? dim_qk : 0;
}

static void plan_rows(const choice *c, fa_backward_plan *plan) {
  const fa_problem *p = c->problem;
  plan->row_tile = c->plain ? PLAIN_TILE : 16 * c->rows->warps;
  int64_t tiles = query_tiles(p, plan->row_tile);
  plan->row_tiles = (int)tiles;
  if (!c->wants_rows || plan->adds_dq) return;
  if (c->plain) {
    add_plain(c, plan, FA_BWD_ROWS, 1, grid_of(p, tiles, p->heads_q));
    return;
  }
  fa_planned_kernel *k = add_launch(plan, FA_BWD_ROWS, "bwd_rows_sm80", grid_of(p, tiles, p->heads_q), 32 * c->rows->warps,
                                    row_smem(p, c->rows, c->rows->stages), (int)p->dtype);
  const fa_constant constants[] = {{"HEAD_DIM", fa_round_up(p->dim_qk, DIM_PAD)},
                                   {"DIM_V", fa_round_up(p->dim_v, DIM_PAD)},
                                   {"BLOCK_N", c->rows->block_n},
                                   {"WARPS", c->rows->warps},
                                   {"STAGES", c->rows->stages},
                                   {"ALIGNED", c->aligned},
                                   {"SCORE", c->score},
                                   {"DROPOUT", c->dropout}};
  for (size_t i = 0; i < sizeof constants / sizeof *constants; i++) fa_add_constant(k, constants[i].name, constants[i].value);
}

static void plan_bias(const choice *c, fa_backward_plan *plan) {
  const fa_problem *p = c->problem;
  const fa_grid *g = &p->grad.dbias;
  if (!g->data) return;
  int rows = plan->row_tile, columns = c->plain ? PLAIN_TILE : c->rows->block_n;
  int64_t grid = (int64_t)fa_ceil_div(g->rows, rows) * fa_ceil_div(g->columns, columns) * g->heads * g->batch;
  if (c->plain) {
    add_plain(c, plan, FA_BWD_BIAS, 2, grid);
    return;
  }
  int smem_bytes = fa_max(row_smem(p, c->rows, 1), rows * columns * 4);
  fa_planned_kernel *k = add_launch(plan, FA_BWD_BIAS, "bwd_bias_sm80", grid, 32 * c->rows->warps, smem_bytes, (int)p->dtype);
  const fa_constant constants[] = {{"HEAD_DIM", fa_round_up(p->dim_qk, DIM_PAD)},
                                   {"DIM_V", fa_round_up(p->dim_v, DIM_PAD)},
                                   {"BLOCK_N", c->rows->block_n},
                                   {"WARPS", c->rows->warps},
                                   {"ALIGNED", c->aligned},
                                   {"DROPOUT", c->dropout}};
  for (size_t i = 0; i < sizeof constants / sizeof *constants; i++) fa_add_constant(k, constants[i].name, constants[i].value);
}

/* What only moves memory. */
static void plan_helpers(const choice *c, fa_backward_plan *plan) {
  const fa_problem *p = c->problem;
  int64_t tiles = query_tiles(p, FA_ROW_PAD), grid = grid_of(p, tiles, p->heads_q);
  plan->pad_tiles = (int)tiles;
  fa_add_constant(add_launch(plan, FA_BWD_PREP, "bwd_prep", grid, MEMORY_THREADS, 0, (int)p->dtype), "ALIGNED", c->aligned);
  if (plan->adds_dq)
    fa_add_constant(add_launch(plan, FA_BWD_FINISH, "bwd_finish", grid, MEMORY_THREADS, 0, (int)p->dtype), "ALIGNED", c->aligned);
  if (p->grad.dsinks.data || p->grad.dalibi.data)
    add_launch(plan, FA_BWD_HEADS, "bwd_heads", p->heads_q, MEMORY_THREADS, MEMORY_THREADS * (int)sizeof(double), (int)p->dtype);
}

static void plan_workspace(const choice *c, fa_backward_plan *plan) {
  const fa_problem *p = c->problem;
  size_t real = p->dtype == FA_F64 ? 8 : 4;
  plan->workspace_rows = p->lengths.packed ? (p->total_q / FA_ROW_PAD + p->batch) * FA_ROW_PAD : fa_round_up(p->seqlen_q, FA_ROW_PAD);
  size_t rows = (size_t)grid_of(p, plan->workspace_rows, p->heads_q), bytes = fa_align_workspace(rows * real);
  plan->delta_offset = bytes;
  bytes += fa_align_workspace(rows * real);
  if (plan->adds_dq) {
    plan->dq_sum_offset = bytes;
    bytes += fa_align_workspace(rows * (size_t)plan->dq_columns * sizeof(float));
  }
  if (p->grad.dalibi.data) {
    plan->dalibi_offset = bytes;
    bytes += fa_align_workspace(rows / (size_t)plan->row_tile * sizeof(double));
  }
  if (plan->uses_queue) {
    plan->queue_offset = bytes;
    bytes += FA_WORKSPACE_ALIGNMENT;
  }
  plan->workspace_bytes = rows ? bytes : 0;
}

fa_code fa_plan_backward(const fa_problem *p, const fa_device_limits *limits, fa_backward_plan *plan, fa_error *error) {
  memset(plan, 0, sizeof *plan);
  choice c = choose(p, limits, plan);
  if (!c.wide) {
    plan_keys(&c, plan);
    plan_rows(&c, plan);
  }
  plan_bias(&c, plan);
  plan_helpers(&c, plan);
  plan_workspace(&c, plan);
  for (int i = 0; i < FA_BWD_LAUNCHES; i++)
    if (plan->launches[i].grid > INT32_MAX)
      return fa_fail(error, FA_ERR_UNSUPPORTED, "q: batch, heads and seqlen make %lld tiles, the limit of a GPU grid is %d",
                     (long long)plan->launches[i].grid, INT32_MAX);
  return FA_OK;
}

/* ---- explain ---- */

static int describe_launch(const fa_planned_kernel *k, int first, char *text, size_t bytes) {
  int used = snprintf(text, bytes, "%s{\"kernel\": \"%s\", \"ctas\": %lld, \"threads\": %d, \"smem_bytes\": %d, \"constants\": {",
                      first ? "" : ", ", k->kernel, (long long)k->grid, k->threads, k->smem_bytes);
  for (int i = 0; i < k->constant_count; i++)
    used += snprintf(text + used, bytes - (size_t)used, "%s\"%s\": %d", i ? ", " : "", k->constants[i].name, k->constants[i].value);
  return used + snprintf(text + used, bytes - (size_t)used, "}}");
}

fa_code fa_explain_backward(const fa_problem *p, const fa_device_limits *limits, char *text, size_t bytes, fa_error *error) {
  fa_backward_plan plan;
  char notes[FA_MAX_NOTES * 192] = "", launches[FA_BWD_LAUNCHES * 512] = "";
  fa_code code = fa_plan_backward(p, limits, &plan, error);
  if (code != FA_OK) return code;
  for (int i = 0, used = 0; i < plan.note_count; i++)
    used += snprintf(notes + used, sizeof notes - (size_t)used, "%s\"%s\"", i ? ", " : "", plan.notes[i]);
  for (int i = 0, used = 0; i < FA_BWD_LAUNCHES; i++)
    if (plan.launches[i].kernel) used += describe_launch(&plan.launches[i], used == 0, launches + used, sizeof launches - (size_t)used);
  const char *main_kernel = plan.launches[FA_BWD_KEYS].kernel ? plan.launches[FA_BWD_KEYS].kernel : plan.launches[FA_BWD_ROWS].kernel;
  int needed =
      snprintf(text, bytes,
               "{\"engine\": \"cuda\", \"kernel\": \"%s\", \"arithmetic\": \"%s\", \"block_m\": %d, \"block_n\": %d, \"stages\": %d, "
               "\"splits\": 1, \"workspace_bytes\": %zu, \"deterministic\": %s, \"launches\": [%s], \"notes\": [%s]}",
               main_kernel ? main_kernel : plan.launches[FA_BWD_PREP].kernel, p->dtype == FA_F64 ? "float64" : "float32", plan.block_m,
               plan.block_n, plan.stages, plan.workspace_bytes, plan.adds_dq ? "false" : "true", launches, notes);
  if (needed < 0 || (size_t)needed >= bytes)
    return fa_fail(error, FA_ERR_VALUE, "text: %zu bytes are too few, %d needed", bytes, needed + 1);
  return FA_OK;
}
