/* args_bwd.h: what the backward kernels are told, and how their workspace is laid out. Read by the host and by NVRTC, like args.h.
 *
 * Workspace rows: every sequence of every head starts on a multiple of FA_ROW_PAD rows and is padded to one, so that a kernel reads and
 * adds whole tiles without a test. A sequence that starts at token q of a packed batch and is its b-th gets row (q / FA_ROW_PAD + b) *
 * FA_ROW_PAD: this leaves room for the padding of those before it and needs no sum over them.
 */
#ifndef FA_ARGS_BWD_H
#define FA_ARGS_BWD_H

#include "args.h"

#define FA_ROW_PAD 128 /* every number of query rows in a tile divides it */

/* A gradient of the bias: its full sizes, 1 where bias is broadcast and the gradient is a sum. */
typedef struct {
  fa_arg_grid grid;
  int batch, heads, rows, columns;
} fa_arg_bias_gradient;

typedef struct {
  fa_arg_problem problem;
  fa_arg_view q, k, v, out, lse;
  fa_arg_view dout, dlse; /* dlse may be absent */
  fa_arg_view dq, dk, dv; /* each may be absent */
  fa_arg_bias_gradient dbias;
  fa_arg_heads dalibi, dsinks;

  int pad_tiles, key_tiles,
      row_tiles;  /* tiles of FA_ROW_PAD rows, of keys, of rows: of one sequence (dense), or at most of one head (packed) */
  int row_tile;   /* rows of a tile of the kernel that fills dalibi_tiles */
  int dq_columns; /* width of dq_sum: dim_qk padded */

  /* Workspace. "real" is f32, or f64 with DTYPE f64. */
  int64_t workspace_rows; /* of one sequence and head (dense), or of one head (packed) */
  void *lse_rows;         /* real (rows): lse, base 2 for 16-bit elements; +inf for a row that sees nothing or is padding */
  void *delta_rows;       /* real (rows): rowsum(dout * out) - dlse; 0 for padding */
  void *dq_sum;           /* f32 (rows, dq_columns) in fragment order, see fa_dq_fragment; or absent */
  void *dalibi_tiles;     /* f64 (rows / rows of a tile): a tile's share of the gradient of the slope, or absent */
} fa_gradient_args;

FA_INLINE int64_t fa_workspace_row(const fa_gradient_args *args, int b, int h, int64_t q_start) {
  if (args->problem.packed) return h * args->workspace_rows + (q_start / FA_ROW_PAD + b) * FA_ROW_PAD;
  return ((int64_t)b * args->problem.heads_q + h) * args->workspace_rows;
}

#endif
