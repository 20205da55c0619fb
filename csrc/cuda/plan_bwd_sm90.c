/* plan_bwd_sm90.c: can a Hopper kernel run the keys' part of this backward problem, and with which tile? */
#include "plan_bwd_sm90.h"

#include <string.h>

#include "plan_sm90.h"

static const fa_backward_tile_sm90 tiles[] = {
#define FA_BWD_SM90_TILE(kernel, qk, v, m, n, stages) {kernel, qk, v, m, n, stages},
#include "tiles_bwd_sm90.def"
#undef FA_BWD_SM90_TILE
};

enum {
  CHUNK = 64,       /* columns of a swizzled row of 128 bytes */
  WORK_BYTES = 256, /* what the kernel keeps beside its tiles: the work of a CTA, and the steps */
  KEY_WARPGROUPS = 2,
};

static int chunks(int dim) { return (dim + CHUNK - 1) / CHUNK; }

/* As laid out at the head of bwd_sm90.cu. */
static int smem_of(const fa_backward_tile_sm90 *t, int adds_dq) {
  int columns = chunks(t->dim_qk) + chunks(t->dim_v);
  int rows = (t->block_n + t->stages * t->block_m) * columns + ((adds_dq ? 2 : 0) + 1) * t->block_n * t->block_m / CHUNK;
  return rows * 128 + t->stages * 2 * t->block_m * 4 + t->block_n * 4 + WORK_BYTES + (6 + 3 * t->stages) * 8;
}

static int tma_can_read_all(const fa_problem *p) {
  int b = p->lengths.packed ? 1 : p->batch;
  return fa_tma_can_read(&p->q, b, p->heads_q, p->seqlen_q, p->dim_qk) && fa_tma_can_read(&p->k, b, p->heads_k, p->seqlen_k, p->dim_qk) &&
         fa_tma_can_read(&p->v, b, p->heads_k, p->seqlen_k, p->dim_v) &&
         fa_tma_can_read(&p->grad.dout, b, p->heads_q, p->seqlen_q, p->dim_v);
}

static const char *why_not(const fa_problem *p, const fa_device_limits *limits, int aligned) {
  if (limits->cc_major != 9 || limits->cc_minor != 0) return "bwd_sm90: the device is not of compute capability 9.0";
  if (p->dtype != FA_F16 && p->dtype != FA_BF16) return "bwd_sm90: q is neither float16 nor bfloat16";
  if (p->score.softcap > 0 || p->score.bias.data || p->score.alibi.data || p->visibility.mask.data)
    return "bwd_sm90: softcap, bias, mask and alibi_slopes are left to the portable kernel";
  if (p->dropout.p > 0) return "bwd_sm90: dropout is left to the portable kernel";
  if (p->seqlen_q == 0 || p->seqlen_k == 0 || p->batch == 0) return "bwd_sm90: there is nothing to multiply";
  if (p->total_q > INT32_MAX || p->total_k > INT32_MAX) return "bwd_sm90: more than 2^31 positions";
  if (!aligned || !tma_can_read_all(p))
    return "bwd_sm90: q, k, v, out or a gradient has rows that are not contiguous, 16-byte aligned and a multiple of 16 bytes, or is "
           "expanded";
  return NULL;
}

const fa_backward_tile_sm90 *fa_choose_backward_sm90(const fa_problem *p, const fa_device_limits *limits, int aligned,
                                                     const char **reason) {
  int block = p->visibility.block_size;
  *reason = why_not(p, limits, aligned);
  for (size_t i = 0; !*reason && i < sizeof tiles / sizeof *tiles; i++) {
    const fa_backward_tile_sm90 *t = &tiles[i];
    if (p->dim_qk > t->dim_qk || p->dim_v > t->dim_v || smem_of(t, 1) > limits->smem_per_block_optin) continue;
    if (!block || (block % t->block_m == 0 && block % t->block_n == 0)) return t;
  }
  if (!*reason) *reason = "bwd_sm90: no tile for these head dims and this block_mask within the device's shared memory";
  return NULL;
}

void fa_plan_backward_sm90(const fa_problem *p, const fa_backward_tile_sm90 *t, fa_backward_plan *plan) {
  int64_t heads = (int64_t)p->heads_k * (p->lengths.packed ? 1 : p->batch),
          tiles_of_head = fa_sequence_tiles(p, p->total_k, p->seqlen_k, t->block_n);
  const fa_constant constants[] = {
      {"DTYPE", (int)p->dtype}, {"HEAD_DIM", t->dim_qk}, {"DIM_V", t->dim_v},       {"BLOCK_M", t->block_m},
      {"BLOCK_N", t->block_n},  {"STAGES", t->stages},   {"ADD_DQ", plan->adds_dq},
  };
  plan->block_m = t->block_m;
  plan->block_n = t->block_n;
  plan->stages = t->stages;
  plan->key_tiles = (int)tiles_of_head;
  plan->dq_columns = plan->adds_dq ? t->dim_qk : 0;
  fa_planned_kernel *k = &plan->launches[FA_BWD_KEYS];
  *k = (fa_planned_kernel){.kernel = t->kernel,
                           .grid = heads * tiles_of_head,
                           .threads = 128 * (1 + KEY_WARPGROUPS + plan->adds_dq),
                           .smem_bytes = smem_of(t, plan->adds_dq)};
  for (size_t i = 0; i < sizeof constants / sizeof *constants; i++) fa_add_constant(k, constants[i].name, constants[i].value);
}

int fa_plan_is_backward_sm90(const fa_backward_plan *plan) {
  const char *kernel = plan->launches[FA_BWD_KEYS].kernel;
  for (size_t i = 0; kernel && i < sizeof tiles / sizeof *tiles; i++)
    if (strcmp(kernel, tiles[i].kernel) == 0) return 1;
  return 0;
}
