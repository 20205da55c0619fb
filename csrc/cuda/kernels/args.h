/* args.h: what a kernel is told: one plain struct for the forward kernels, passed by value (args_bwd.h: the backward ones). Read by the host and
 * by NVRTC, so both sides agree on every byte.
 *
 * Strides count elements. A tensor whose data pointer is 0 is absent. Nothing here depends on a length that only the device knows: those
 * are read from cu_* and used_*, so that a captured graph can be replayed with new lengths and new random state.
 */
#ifndef FA_ARGS_H
#define FA_ARGS_H

#include "../../core/mask.h"

/* Element types, with the numbers of fa_dtype; also the values of the constant DTYPE. */
enum { FA_ARG_F32 = 1, FA_ARG_F64 = 2, FA_ARG_F16 = 3, FA_ARG_BF16 = 4 };

/* (batch, head, position, dim). Packed tensors have batch stride 0 and positions that count tokens. */
typedef struct {
  void *data;
  int64_t b, h, s, d;
} fa_arg_view;

/* (batch, head, query row or block, key column or block); stride 0 where broadcast. */
typedef struct {
  void *data;
  int64_t b, h, m, n;
  int dtype, pad;
} fa_arg_grid;

/* (batch, head); batch stride 0 for a tensor of shape (heads_q). */
typedef struct {
  void *data;
  int64_t b, h;
  int dtype, pad;
} fa_arg_heads;

typedef struct {
  const int *data;
  int64_t stride;
  int64_t most; /* of cu_*: positions that the tensor holds; what the device says is cut down to them */
} fa_arg_ints;

/* The problem, the same for every kernel of a call. */
typedef struct {
  int batch, heads_q, heads_k, group; /* group = heads_q / heads_k */
  int seqlen_q, seqlen_k;             /* dense: the lengths; packed: upper bounds */
  int dim_qk, dim_v;
  int packed, zero;         /* zero: 0, which the compiler does not know; see after_weights */
  int64_t total_q, total_k; /* positions that the tensors hold: packed: tokens in all; dense: batch * seqlen */

  fa_arg_ints cu_q, cu_k;     /* packed: (batch + 1) */
  fa_arg_ints used_q, used_k; /* (batch) or absent */

  fa_rule rule;
  int block_size;
  fa_arg_grid mask;       /* bool (batch, heads_q, seqlen_q, seqlen_k) */
  fa_arg_grid block_mask; /* bool (batch, heads_q, seqlen_q / block_size, seqlen_k / block_size), rounded up */

  double scale, softcap; /* softcap 0: none */
  fa_arg_grid bias;      /* DTYPE or f32 (batch, heads_q, seqlen_q, seqlen_k) */
  fa_arg_heads alibi;    /* f32, or f64 with DTYPE f64 */
  fa_arg_heads sinks;    /* DTYPE or f32 */

  double keep_scale;          /* 1 / (1 - p) */
  uint32_t dropout_threshold; /* 0: no dropout */
  int pack_log2;              /* fwd_sm90 with FEW_ROWS: a tile's rows are positions times 1 << pack_log2 heads of a group */
  uint64_t seed, offset;
  const int64_t *rng_state; /* (seed, offset) when given, instead of the two above */
  int64_t rng_stride;
} fa_arg_problem;

typedef struct {
  fa_arg_problem problem;
  fa_arg_view q, k, v, out; /* out: (batch, heads_q, seqlen_q, dim_v) */
  fa_arg_view lse;          /* f32, or f64 with DTYPE f64 */
  fa_arg_view probs;        /* s strides rows, d strides columns: (batch, heads_q, up128(seqlen_q), up128(seqlen_k)) */

  int tiles;         /* query tiles of the kernel's size: dense: of one sequence; packed: upper bound over all sequences of one head */
  int splits;        /* parts into which the keys of each tile are split; 1: the kernel writes out and lse itself */
  void *partial_out; /* splits > 1: f32 (splits, statistics rows, dim_v), see fa_statistics_row */
  void *partial_lse; /* f32 (splits, statistics rows) */
} fa_forward_args;

/* Warps of a CTA of combine, the columns of out that each has room for in shared memory, and how many of them share a row. */
enum { FA_COMBINE_WARPS = 8, FA_COMBINE_DIM = 256 };
FA_INLINE int fa_combine_team(int splits) { return splits >= 32 ? 8 : splits >= 8 ? 2 : 1; }

#endif
