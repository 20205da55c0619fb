/* bwd_f64.cu: the plain backward pass: CUDA cores, no tensor cores, every feature, any dims. For fp64 (gradient checks), and for fp32
 * where a GPU's shared memory is too small for bwd_sm80.cu.
 *
 * A tile is 32 rows by 32 keys, a thread has four pairs of it: rows 4 w to 4 w + 3 of its warp w, key `lane`. Operands pass through
 * shared memory in slices of 32 dims. Three roles:
 *
 *     KEYS   a CTA owns 32 keys:        dV += P^T dO, dK += dS^T Q      for each query head of the group, each query tile
 *     ROWS   a CTA owns 32 query rows:  dQ += dS K, slope sums          for each key tile
 *     BIAS   a CTA owns a tile of dbias (bias_tile.h): dS
 *
 * No atomics: everything is bitwise reproducible. Speed is no aim: each role computes the two products again.
 *
 * Shared memory: two slices [32][33] and P, dS [32][33]: 33 KiB in fp64.
 * Registers: KEYS has 8 numbers a slice of dims for dK and dV. Constants: DTYPE, ROLE, SLICES (dims / 32 of the larger dim), DROPOUT.
 */
#if DTYPE == 2
#define REAL double
#else
#define REAL float
#endif
#define ALIGNED 0
#define SCORE 1

#include "bias_tile.h"

enum { TILE = 32, THREADS = 256, MINE = 4 };
enum { KEYS = 0, ROWS = 1, BIAS = 2 }; /* values of ROLE */

typedef struct {
  REAL a[TILE][TILE + 1], b[TILE][TILE + 1]; /* slices of operands */
  REAL p[TILE][TILE + 1], ds[TILE][TILE + 1];
} shared_tiles;

/* Rows of a head as an operand. */
typedef struct {
  const char *gmem;
  int64_t row_stride, dim_stride;
  int rows, dims;
} operand;

FA_INLINE operand rows_of(const fa_arg_view *view, int b, int h, int64_t start, int rows, int dims) {
  operand o = {fa_head_base(view, ELEMENT_BYTES, b, h, start), view->s, view->d, rows, dims};
  return o;
}

/* 32 rows by 32 dims from dim0; 0 outside. Complete after a barrier. */
FA_INLINE void load_slice(REAL slice[TILE][TILE + 1], const operand *o, int dim0) {
  int d = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < MINE; i++) {
    int row = threadIdx.x / 32 + 8 * i, inside = row < o->rows && dim0 + d < o->dims;
    slice[row][d] = inside ? ((const REAL *)o->gmem)[row * o->row_stride + (dim0 + d) * o->dim_stride] : 0;
  }
}

/* acc[i] = row 4 w + i of a times row `lane` of b. */
FA_INLINE void products(REAL acc[MINE], shared_tiles *t, const operand *a, const operand *b) {
  int row = threadIdx.x / 32 * MINE, column = threadIdx.x % 32;
  for (int i = 0; i < MINE; i++) acc[i] = 0;
  for (int dim0 = 0; dim0 < a->dims; dim0 += TILE) {
    __syncthreads(); /* all threads are done with the slices before */
    load_slice(t->a, a, dim0);
    load_slice(t->b, b, dim0);
    __syncthreads(); /* the slices have landed for all */
#pragma unroll 4
    for (int d = 0; d < TILE; d++)
#pragma unroll
      for (int i = 0; i < MINE; i++) acc[i] += t->a[row + i][d] * t->b[column][d];
  }
}

/* acc[i] += sum over k of w(k, 4 w + i) * slice(k, lane), w by columns (or rows), where w = 0 says "no such pair" and takes nothing. */
FA_INLINE void accumulate(REAL acc[MINE], REAL w[TILE][TILE + 1], int by_columns, REAL slice[TILE][TILE + 1]) {
  int mine = threadIdx.x / 32 * MINE, d = threadIdx.x % 32;
#pragma unroll 1
  for (int k = 0; k < TILE; k++)
#pragma unroll
    for (int i = 0; i < MINE; i++) {
      REAL weight = by_columns ? w[k][mine + i] : w[mine + i][k];
      if (weight != 0) acc[i] += weight * slice[k][d];
    }
}

/* P and dS of the tile at (m0, n0) into shared memory, complete for all. ds_bias[i] is dS before the cap. slope_sums, if not 0, are
 * this thread's for its MINE rows. */
FA_INLINE void gradient_tile(shared_tiles *t, const fa_gradient_args *args, const fa_tile *tile, int m0, int n0, REAL ds_bias[MINE],
                             fa_slope_sums *slope_sums) {
  const fa_arg_problem *p = &args->problem;
  int row = threadIdx.x / 32 * MINE, j = n0 + threadIdx.x % 32, h_k = tile->h / p->group;
  fa_gradient_head head = fa_gradient_of_head(p, tile, tile->h);
  operand q = rows_of(&args->q, tile->b, tile->h, tile->q_start + m0, tile->len_q - m0, p->dim_qk);
  operand dout = rows_of(&args->dout, tile->b, tile->h, tile->q_start + m0, tile->len_q - m0, p->dim_v);
  operand k = rows_of(&args->k, tile->b, h_k, tile->k_start + n0, tile->len_k - n0, p->dim_qk);
  operand v = rows_of(&args->v, tile->b, h_k, tile->k_start + n0, tile->len_k - n0, p->dim_v);
  REAL s[MINE];
  products(s, t, &q, &k);
  products(ds_bias, t, &dout, &v);
  int64_t workspace_row = fa_workspace_row(args, tile->b, tile->h, tile->q_start) + m0 + row;
#pragma unroll
  for (int i = 0; i < MINE; i++) {
    int r = m0 + row + i;
    fa_range keys = fa_keys_of_row(p, &head, r);
    REAL lse = ((const REAL *)args->lse_rows)[workspace_row + i], delta = ((const REAL *)args->delta_rows)[workspace_row + i];
    int dropped = DROPOUT && fa_is_dropped(p, head.dropout, tile->b, tile->h, r, j);
    REAL slope_of_cap = fa_gradient_of_pair(p, &head, &s[i], &ds_bias[i], j >= keys.lo && j < keys.hi, r, j, lse, delta, dropped,
                                            slope_sums ? &slope_sums[i] : 0);
    t->p[row + i][threadIdx.x % 32] = s[i];
    t->ds[row + i][threadIdx.x % 32] = ds_bias[i] * slope_of_cap;
  }
  __syncthreads(); /* P and dS are complete for all */
}

/* sums[slice] += w^T (or w) times the operand's rows. */
FA_INLINE void add_product(REAL sums[SLICES][MINE], shared_tiles *t, REAL w[TILE][TILE + 1], int by_columns, const operand *o) {
#pragma unroll
  for (int slice = 0; slice < SLICES; slice++) {
    if (slice * TILE >= o->dims) break;
    __syncthreads(); /* all threads are done with the slice before */
    load_slice(t->a, o, slice * TILE);
    __syncthreads(); /* the slice has landed for all */
    accumulate(sums[slice], w, by_columns, t->a);
  }
}

/* Rows from row0 on of a gradient, `used` of them; the `slot` - used after them are padding and get 0. */
FA_INLINE void store_rows(const fa_arg_view *view, REAL sums[SLICES][MINE], int b, int h, int64_t start, int used, int slot, int dims,
                          REAL factor) {
  int row = threadIdx.x / 32 * MINE, d = threadIdx.x % 32;
  if (!view->data) return;
#pragma unroll
  for (int slice = 0; slice < SLICES; slice++)
#pragma unroll
    for (int i = 0; i < MINE; i++)
      if (row + i < slot && slice * TILE + d < dims)
        ((REAL *)fa_head_base(view, ELEMENT_BYTES, b, h, start + row + i))[(slice * TILE + d) * view->d] =
            row + i < used ? sums[slice][i] * factor : 0;
}

FA_INLINE void keys_role(const fa_gradient_args *args, shared_tiles *t) {
  const fa_arg_problem *p = &args->problem;
  fa_tile tile;
  if (!fa_find_key_tile(p, args->key_tiles, TILE, &tile)) return;
  int n0 = tile.m0, h_k = tile.h;
  REAL dk[SLICES][MINE] = {{0}}, dv[SLICES][MINE] = {{0}};
  fa_range rows = fa_visiting_rows(p->rule, tile.len_q, tile.len_k, n0, fa_min(n0 + TILE, tile.len_k));
  if (n0 >= tile.len_k) rows.hi = 0;
  for (tile.h = h_k * p->group; tile.h < (h_k + 1) * p->group; tile.h++)
    for (int m0 = rows.lo / TILE * TILE; m0 < rows.hi; m0 += TILE) {
      if (!fa_in_block_mask(p, tile.b, tile.h, m0, n0)) continue;
      REAL ds_bias[MINE];
      gradient_tile(t, args, &tile, m0, n0, ds_bias, 0);
      operand q = rows_of(&args->q, tile.b, tile.h, tile.q_start + m0, tile.len_q - m0, p->dim_qk);
      operand dout = rows_of(&args->dout, tile.b, tile.h, tile.q_start + m0, tile.len_q - m0, p->dim_v);
      add_product(dv, t, t->p, 1, &dout);
      add_product(dk, t, t->ds, 1, &q);
      __syncthreads(); /* all threads are done with P and dS */
    }
  store_rows(&args->dk, dk, tile.b, h_k, tile.k_start + n0, tile.len_k - n0, tile.slot_k - n0, p->dim_qk, (REAL)p->scale);
  store_rows(&args->dv, dv, tile.b, h_k, tile.k_start + n0, tile.len_k - n0, tile.slot_k - n0, p->dim_v, 1);
}

/* The sum over a warp's keys, the same in all lanes. */
FA_INLINE double warp_sum(double x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, step);
  return x;
}

/* The tile's share of the gradient of the slope, in a fixed order. */
FA_INLINE void store_slope_sum(const fa_gradient_args *args, shared_tiles *t, const fa_tile *tile, const fa_slope_sums sums[MINE]) {
  int64_t row0 = fa_workspace_row(args, tile->b, tile->h, tile->q_start) + tile->m0;
  double *warp_sums = (double *)t, sum = 0;
  for (int i = 0; i < MINE; i++) {
    int row = threadIdx.x / 32 * MINE + i;
    fa_slope_sums all = {warp_sum(sums[i].p), warp_sum(sums[i].p_dp), warp_sum(sums[i].p_dist), warp_sum(sums[i].p_dp_dist)};
    sum += fa_slope_of_row(args, tile, tile->m0 + row, &all, ((const REAL *)args->lse_rows)[row0 + row]);
  }
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = sum;
  __syncthreads(); /* the sums of all warps are there */
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < THREADS / 32; warp++) sum += warp_sums[warp];
  ((double *)args->dalibi_tiles)[row0 / TILE] = sum;
}

FA_INLINE void rows_role(const fa_gradient_args *args, shared_tiles *t) {
  const fa_arg_problem *p = &args->problem;
  fa_tile tile;
  if (!fa_find_query_tile(p, args->row_tiles, 1, TILE, &tile)) return;
  int m0 = tile.m0, m1 = fa_min(m0 + TILE, tile.len_q), h_k = tile.h / p->group;
  REAL dq[SLICES][MINE] = {{0}};
  fa_slope_sums slope_sums[MINE] = {{0, 0, 0, 0}};
  fa_range keys = fa_visited_keys(p->rule, tile.len_q, tile.len_k, m0, m1);
  if (m0 >= m1) keys.hi = 0;
  for (int n0 = keys.lo / TILE * TILE; n0 < keys.hi; n0 += TILE) {
    if (!fa_in_block_mask(p, tile.b, tile.h, m0, n0)) continue;
    REAL ds_bias[MINE];
    gradient_tile(t, args, &tile, m0, n0, ds_bias, args->dalibi_tiles ? slope_sums : 0);
    operand k = rows_of(&args->k, tile.b, h_k, tile.k_start + n0, tile.len_k - n0, p->dim_qk);
    add_product(dq, t, t->ds, 0, &k);
    __syncthreads(); /* all threads are done with dS */
  }
  if (args->dalibi_tiles && m0 < m1) store_slope_sum(args, t, &tile, slope_sums);
  store_rows(&args->dq, dq, tile.b, tile.h, tile.q_start + m0, tile.len_q - m0, tile.slot_q - m0, p->dim_qk, (REAL)p->scale);
}

FA_INLINE void bias_role(const fa_gradient_args *args, shared_tiles *t) {
  fa_bias_work work = fa_find_bias_tile(args, TILE, TILE);
  REAL sum[MINE] = {0};
  fa_tile tile;
  for (tile.b = work.b.lo; tile.b < work.b.hi; tile.b++) {
    fa_read_lengths(&args->problem, &tile);
    for (tile.h = work.h.lo; tile.h < work.h.hi; tile.h++)
      for (int m0 = work.m.lo; m0 < work.m.hi; m0 += TILE)
        for (int n0 = work.n.lo; n0 < work.n.hi; n0 += TILE) {
          if (!fa_bias_tile_is_visible(&args->problem, &tile, m0, TILE, n0, TILE)) continue;
          REAL ds_bias[MINE];
          gradient_tile(t, args, &tile, m0, n0, ds_bias, 0);
          for (int i = 0; i < MINE; i++) sum[i] += ds_bias[i];
        }
  }
  __syncthreads(); /* all threads are done with the tiles, whose memory the sums take */
  REAL *sum_smem = &t->a[0][0];
  for (int i = 0; i < MINE; i++) sum_smem[(threadIdx.x / 32 * MINE + i) * TILE + threadIdx.x % 32] = sum[i];
  __syncthreads(); /* the sums are there */
  fa_write_bias_tile(args, &work, sum_smem, TILE, TILE, THREADS);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) bwd_f64(const __grid_constant__ fa_gradient_args args) {
  extern __shared__ __align__(128) unsigned char shared[];
  shared_tiles *tiles = (shared_tiles *)shared;
  if (ROLE == KEYS) keys_role(&args, tiles);
  if (ROLE == ROWS) rows_role(&args, tiles);
  if (ROLE == BIAS) bias_role(&args, tiles);
}
