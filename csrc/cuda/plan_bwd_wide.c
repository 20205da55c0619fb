/* plan_bwd_wide.c: can the Hopper kernels for wide heads run this backward problem, and with which stages? */
#include "plan_bwd_wide.h"

#include <string.h>

enum {
  ROWS = 64,  /* of a box, and of a warpgroup */
  CHUNK = 64, /* columns of a swizzled row of 128 bytes */
  THREADS = 384,
  SECTION_KIB = 32 << 10, /* what a section of heads may keep in the L2 cache of the side that passes by */
  LEAST_DIM = 129,        /* of the larger head dim: below it bwd_sm90 and the portable kernels are faster */
  QUERY_ROWS = 2 * ROWS,
};

static int chunks(int dim) { return (dim + CHUNK - 1) / CHUNK; }
/* The TMA's boxes of columns; wgmma has no shape of 5 or 7 chunks in the table of ptx_sm90.h, nor are there such dims. */
static int padded(int dim) { return CHUNK * chunks(dim); }

static int has_masking(const fa_problem *p) {
  const fa_rule rule = p->visibility.rule;
  return rule.causal || rule.window_left >= 0 || rule.window_right >= 0;
}

static int has_varlen(const fa_problem *p) { return p->lengths.packed || p->lengths.used_q.data || p->lengths.used_k.data; }

static int is_uneven(const fa_problem *p) { return has_masking(p) || has_varlen(p) || p->visibility.block_mask.data; }

/* As laid out at the head of bwd_keys_sm90.cu. */
static int keys_smem(const fa_problem *p, int stages) {
  int box = ROWS * 128 * (chunks(p->dim_qk) + chunks(p->dim_v));
  return (1 + stages) * box + 2 * 8192 + stages * 528 + 2 * 48 + (4 * stages + 4 + 8) * 8;
}

/* As laid out at the head of bwd_rows_sm90.cu. */
static int rows_smem(const fa_problem *p, int k_stages, int v_stages) {
  int k = ROWS * 128 * chunks(p->dim_qk), v = ROWS * 128 * chunks(p->dim_v);
  return (2 + k_stages) * k + (2 + v_stages) * v + 2 * 48 + (k_stages + 1) / 2 * 8 + (2 * k_stages + 2 * v_stages + 8) * 8;
}

static int can_read(const fa_view *view, int batch, int heads, int positions, int dim, fa_dtype dtype) {
  const int64_t limit = (int64_t)1 << 39, strides[] = {view->b, view->h, view->s};
  const int extents[] = {batch, heads, positions};
  for (int i = 0; i < 3; i++)
    if (extents[i] > 1 && (strides[i] <= 0 || strides[i] >= limit)) return 0;
  return fa_rows_are_aligned(view, dim, dtype);
}

static int can_write(const fa_view *view, int dim, fa_dtype dtype) { return !view->data || fa_rows_are_aligned(view, dim, dtype); }

static int rows_are_fit(const fa_problem *p) {
  int b = p->lengths.packed ? 1 : p->batch;
  return can_read(&p->q, b, p->heads_q, p->seqlen_q, p->dim_qk, p->dtype) &&
         can_read(&p->k, b, p->heads_k, p->seqlen_k, p->dim_qk, p->dtype) &&
         can_read(&p->v, b, p->heads_k, p->seqlen_k, p->dim_v, p->dtype) &&
         can_read(&p->grad.dout, b, p->heads_q, p->seqlen_q, p->dim_v, p->dtype) && fa_rows_are_aligned(&p->out, p->dim_v, p->dtype) &&
         can_write(&p->grad.dq, p->dim_qk, p->dtype) && can_write(&p->grad.dk, p->dim_qk, p->dtype) &&
         can_write(&p->grad.dv, p->dim_v, p->dtype);
}

static const char *why_not(const fa_problem *p, const fa_device_limits *limits) {
  if (limits->cc_major != 9 || limits->cc_minor != 0) return "bwd_keys_sm90: the device is not of compute capability 9.0";
  if (p->dtype != FA_F16 && p->dtype != FA_BF16) return "bwd_keys_sm90: q is neither float16 nor bfloat16";
  if (fa_max(p->dim_qk, p->dim_v) < LEAST_DIM) return "bwd_keys_sm90: the head dims are not above 128";
  if (p->seqlen_q == 0 || p->seqlen_k == 0 || p->batch == 0) return "bwd_keys_sm90: there is nothing to multiply";
  if (p->seqlen_k < ROWS) return "bwd_keys_sm90: fewer keys than one of its tiles has"; /* and weights of few keys want more than 16 bits */
  if (p->score.softcap > 0 || p->score.bias.data || p->score.alibi.data || p->visibility.mask.data)
    return "bwd_keys_sm90: has no softcap, bias, mask or alibi_slopes";
  if (p->dropout.p > 0) return "bwd_keys_sm90: has no dropout";
  if (p->total_q > INT32_MAX || p->total_k > INT32_MAX) return "bwd_keys_sm90: more than 2^31 positions";
  if (p->visibility.block_size % QUERY_ROWS) return "bwd_keys_sm90: no tile divides the blocks of block_mask";
  if (!rows_are_fit(p))
    return "bwd_keys_sm90: q, k, v, out or a gradient has rows that are not contiguous, 16-byte aligned and a multiple of 16 bytes, or is "
           "expanded";
  if (keys_smem(p, 2) > limits->smem_per_block_optin) return "bwd_keys_sm90: no tile for these head dims within the device's shared memory";
  return NULL;
}

static fa_planned_kernel *add_launch(const fa_problem *p, const fa_device_limits *limits, fa_backward_plan *plan, int which,
                                     const char *name, int64_t tiles, int smem_bytes) {
  fa_planned_kernel *k = &plan->launches[which];
  *k = (fa_planned_kernel){
      .kernel = name, .grid = tiles < limits->sm_count ? tiles : limits->sm_count, .threads = THREADS, .smem_bytes = smem_bytes};
  fa_add_constant(k, "DTYPE", (int)p->dtype);
  fa_add_constant(k, "HEAD_DIM", padded(p->dim_qk));
  fa_add_constant(k, "DIM_V", padded(p->dim_v));
  plan->uses_queue |= tiles > k->grid && is_uneven(p);
  return k;
}

const char *fa_plan_backward_wide(const fa_problem *p, const fa_device_limits *limits, fa_backward_plan *plan) {
  const char *reason = why_not(p, limits);
  if (reason) return reason;
  int64_t sequences = p->lengths.packed ? 1 : p->batch, key_tiles = fa_sequence_tiles(p, p->total_k, p->seqlen_k, ROWS),
          row_tiles = fa_sequence_tiles(p, p->total_q, p->seqlen_q, QUERY_ROWS);
  if (key_tiles * sequences * p->heads_k > INT32_MAX / 2 || row_tiles * sequences * p->heads_q > INT32_MAX / 2)
    return "bwd_keys_sm90: more than 2^30 tiles";
  int stages = keys_smem(p, 3) <= limits->smem_per_block_optin ? 3 : 2, v_stages = 2;
  while (v_stages > 1 && rows_smem(p, 2, v_stages) > limits->smem_per_block_optin) v_stages--;
  plan->block_m = plan->block_n = ROWS;
  plan->stages = stages;
  plan->key_tiles = (int)key_tiles;
  plan->row_tile = QUERY_ROWS;
  plan->row_tiles = (int)row_tiles;
  if (p->grad.dk.data || p->grad.dv.data) {
    fa_planned_kernel *k =
        add_launch(p, limits, plan, FA_BWD_KEYS, "bwd_keys_sm90", key_tiles * sequences * p->heads_k, keys_smem(p, stages));
    fa_add_constant(k, "STAGES", stages);
    fa_add_constant(k, "MASKING", has_masking(p));
  }
  if (p->grad.dq.data) {
    fa_planned_kernel *k =
        add_launch(p, limits, plan, FA_BWD_ROWS, "bwd_rows_sm90", row_tiles * sequences * p->heads_q, rows_smem(p, 2, v_stages));
    fa_add_constant(k, "K_STAGES", 2);
    fa_add_constant(k, "V_STAGES", v_stages);
    fa_add_constant(k, "MASKING", has_masking(p));
    fa_add_constant(k, "VARLEN", has_varlen(p));
    fa_add_constant(k, "BLOCK_MASK", p->visibility.block_mask.data != NULL);
  }
  return NULL;
}

int fa_launch_is_wide(const fa_backward_plan *plan, int which) {
  const char *name = plan->launches[which].kernel;
  return name && (strcmp(name, "bwd_keys_sm90") == 0 || strcmp(name, "bwd_rows_sm90") == 0);
}

fa_schedule fa_schedule_backward_wide(const fa_problem *p, const fa_backward_plan *plan, int which) {
  int of_keys = which == FA_BWD_KEYS, heads = (of_keys ? p->heads_k : p->heads_q) * (p->lengths.packed ? 1 : p->batch);
  int64_t section = 1, passing = of_keys ? (int64_t)p->seqlen_q * p->group : p->seqlen_k;
  if (is_uneven(p)) { /* tiles of unequal length: heads side by side, so that each starts with its longest */
    int64_t fitting = ((int64_t)SECTION_KIB << 10) / (passing * (p->dim_qk + p->dim_v) * 2);
    section = (of_keys ? 1 : p->group) * (fitting < 1 ? 1 : fitting);
  }
  int tiles = of_keys ? plan->key_tiles : plan->row_tiles;
  return (fa_schedule){
      .heads = heads,
      .tiles = tiles,
      .section = section < heads ? (int)section : heads,
      .splits = 1,
      .total = heads * tiles,
      .scale_log2 = (float)(p->score.scale * 1.4426950408889634),
  };
}
