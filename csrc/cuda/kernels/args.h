/* args.h: what a kernel is told. One plain struct for the forward kernels and one for the backward kernels, passed by value. Read by the
 * host and by NVRTC, so both sides agree on every byte.
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
} fa_arg_ints;

/* The problem, the same for every kernel of a call. */
typedef struct {
  int batch, heads_q, heads_k, group; /* group = heads_q / heads_k */
  int seqlen_q, seqlen_k;             /* dense: the lengths; packed: upper bounds */
  int dim_qk, dim_v;
  int packed, pad;
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
  uint32_t pad2;
  uint64_t seed, offset;
  const int64_t *rng_state; /* (seed, offset) when given, instead of the two above */
  int64_t rng_stride;
} fa_arg_problem;

typedef struct {
  fa_arg_problem problem;
  fa_arg_view q, k, v, out; /* out: (batch, heads_q, seqlen_q, dim_v) */
  fa_arg_view lse;          /* f32, or f64 with DTYPE f64 */
  fa_arg_view probs;        /* s strides rows, d strides columns: (batch, heads_q, up128(seqlen_q), up128(seqlen_k)) */

  int tiles;  /* query tiles: dense: of one sequence; packed: upper bound over all sequences of one head */
  int splits; /* parts into which the keys of each tile are split; 1: the kernel writes out and lse itself */
  void *partial_out; /* splits > 1: f32 (splits, statistics rows, dim_v), see fa_statistics_row */
  void *partial_lse; /* f32 (splits, statistics rows) */
} fa_forward_args;

typedef struct {
  fa_arg_problem problem;
  fa_arg_view q, k, v, out, lse;
  fa_arg_view dout, dlse; /* dlse may be absent */
  fa_arg_view dq, dk, dv; /* each may be absent */
  fa_arg_grid dbias;      /* element type of bias */
  fa_arg_heads dalibi, dsinks;

  int tiles_q, tiles_k; /* tiles of rows and of keys: dense: of one sequence; packed: upper bound over all sequences of one head */
  int splits, deterministic;

  /* Workspace. "real" is f32, or f64 with DTYPE f64. */
  void *delta;        /* real (statistics rows): rowsum(dout * out) - dlse */
  void *dq_sum;       /* real (statistics rows, padded dim_qk) or absent */
  void *dk_sum;       /* real sums over the query heads of a group, or absent */
  void *dv_sum;
  void *dbias_sum;    /* real, contiguous in the shape of dbias, or absent */
  void *dalibi_sum;   /* real (batch, heads_q), or absent */
  void *dsinks_sum;   /* real (heads_q), or absent */
  void *order;        /* int32 counters that put the additions of a deterministic run in order, or absent */
} fa_backward_args;

#endif
