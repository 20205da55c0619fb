/* work_bwd.h: what a CTA that owns keys has to do: which query tiles see the keys, and how the tiles of both sides come and go.
 *
 * Expects HEAD_DIM and DIM_V (padded), BLOCK_M query rows and BLOCK_N keys of a tile, WARPS.
 */
#ifndef FA_WORK_BWD_H
#define FA_WORK_BWD_H

#include "dq_sum.h"
#include "gradient_mma.h"

#define THREADS (32 * WARPS)
#define K_ROW_BYTES (HEAD_DIM * ELEMENT_BYTES)
#define V_ROW_BYTES (DIM_V * ELEMENT_BYTES)
#define K_TILE_BYTES (BLOCK_N * (K_ROW_BYTES + SCALE_BYTES))
#define V_TILE_BYTES (BLOCK_N * (V_ROW_BYTES + SCALE_BYTES))
#define Q_TILE_BYTES (BLOCK_M * (K_ROW_BYTES + SCALE_BYTES))
#define DO_TILE_BYTES (BLOCK_M * (V_ROW_BYTES + SCALE_BYTES))
#define STATISTICS_BYTES (2 * BLOCK_M * 4) /* lse and delta of a query tile */

/* A query tile that meets this CTA's keys: heads of the group, then rows. */
typedef struct {
  int h, m0;
} fa_query_tile;

/* In shared memory: registers are short. */
typedef struct {
  fa_tile tile;
  fa_range rows;             /* first rows of the query tiles that see the keys, in steps of BLOCK_M */
  int first_head, heads_end; /* the query heads of the group */
} fa_key_work;

/* Thread 0 writes it, all threads may read it afterwards. */
FA_INLINE void fa_share_key_work(const fa_arg_problem *p, const fa_tile *tile, fa_key_work *work) {
  fa_range rows = fa_visiting_rows(p->rule, tile->len_q, tile->len_k, tile->m0, fa_min(tile->m0 + BLOCK_N, tile->len_k));
  if (threadIdx.x == 0) {
    work->tile = *tile;
    work->rows.lo = rows.lo / BLOCK_M * BLOCK_M;
    work->rows.hi = tile->m0 < tile->len_k ? rows.hi : 0;
    work->first_head = tile->h * p->group;
    work->heads_end = work->first_head + p->group;
  }
  __syncthreads();
}

FA_INLINE int fa_find_key_work(const fa_gradient_args *args, fa_key_work *work) {
  fa_tile tile;
  if (!fa_find_key_tile(&args->problem, args->key_tiles, BLOCK_N, &tile)) return 0;
  fa_share_key_work(&args->problem, &tile, work);
  return 1;
}

/* Before the first tile; fa_next_query_tile goes there. */
FA_INLINE fa_query_tile fa_start_query_tiles(const fa_key_work *work) {
  fa_query_tile walk = {work->first_head, work->rows.lo - BLOCK_M};
  return walk;
}

/* The next tile; h == heads_end when there is none. With a block mask a warp looks up 32 tiles at a time. All warps get the same answer. */
FA_INLINE void fa_next_query_tile(fa_query_tile *walk, const fa_arg_problem *p, const fa_key_work *work) {
  walk->m0 += BLOCK_M;
  for (; walk->h < work->heads_end; walk->h++, walk->m0 = work->rows.lo)
    for (; walk->m0 < work->rows.hi; walk->m0 += 32 * BLOCK_M) {
      if (!p->block_size) return;
      int m0 = walk->m0 + (int)(threadIdx.x % 32) * BLOCK_M;
      unsigned seen = __ballot_sync(0xFFFFFFFFu, m0 < work->rows.hi && fa_in_block_mask(p, work->tile.b, walk->h, m0, work->tile.m0));
      if (seen) {
        walk->m0 += (__ffs(seen) - 1) * BLOCK_M;
        return;
      }
    }
}

FA_INLINE void fa_load_key_tiles(const fa_gradient_args *args, const fa_tile *tile, uint32_t k_smem, uint32_t v_smem) {
  const char *k_gmem = fa_head_base(&args->k, ELEMENT_BYTES, tile->b, tile->h, tile->k_start + tile->m0);
  const char *v_gmem = fa_head_base(&args->v, ELEMENT_BYTES, tile->b, tile->h, tile->k_start + tile->m0);
  fa_load_tile(k_smem, k_gmem, &args->k, tile->len_k - tile->m0, args->problem.dim_qk, BLOCK_N, HEAD_DIM, THREADS);
  fa_load_tile(v_smem, v_gmem, &args->v, tile->len_k - tile->m0, args->problem.dim_v, BLOCK_N, DIM_V, THREADS);
}

FA_INLINE void fa_load_query_tiles(const fa_gradient_args *args, const fa_tile *tile, const fa_query_tile *at, uint32_t q_smem,
                                   uint32_t dout_smem) {
  const char *q_gmem = fa_head_base(&args->q, ELEMENT_BYTES, tile->b, at->h, tile->q_start + at->m0);
  const char *dout_gmem = fa_head_base(&args->dout, ELEMENT_BYTES, tile->b, at->h, tile->q_start + at->m0);
  int rows = tile->len_q - at->m0;
  fa_load_tile(q_smem, q_gmem, &args->q, rows, args->problem.dim_qk, BLOCK_M, HEAD_DIM, THREADS);
  fa_load_tile(dout_smem, dout_gmem, &args->dout, rows, args->problem.dim_v, BLOCK_M, DIM_V, THREADS);
}

/* fp32: what this thread has loaded of two tiles, once it has landed. */
FA_INLINE void fa_split_tiles(uint32_t qk_smem, uint32_t dv_smem, int rows) {
  fa_split_tile(qk_smem, rows, HEAD_DIM, THREADS);
  fa_split_tile(dv_smem, rows, DIM_V, THREADS);
}

/* lse, then delta, of the rows of a query tile. */
FA_INLINE void fa_load_statistics(const fa_gradient_args *args, const fa_tile *tile, const fa_query_tile *at, uint32_t statistics_smem) {
  if (threadIdx.x >= BLOCK_M / 2) return; /* 16 bytes a thread */
  int which = threadIdx.x / (BLOCK_M / 4), row = threadIdx.x % (BLOCK_M / 4) * 4;
  int64_t from = fa_workspace_row(args, tile->b, at->h, tile->q_start) + at->m0 + row;
  const float *src_gmem = (const float *)(which ? args->delta_rows : args->lse_rows) + from;
  cp_async_cg_16(statistics_smem + which * BLOCK_M * 4 + row * 4, src_gmem, 16);
}

/* Adds m_count by n_count fragments to dq_sum: rows from `workspace_row` on, columns from column0 on. */
FA_INLINE void fa_add_fragments(const fa_gradient_args *args, int64_t workspace_row, int column0, float dq[][4], int m_count, int n_count,
                                int lane) {
  float *sum_gmem = (float *)args->dq_sum + workspace_row * HEAD_DIM + column0 / 8 * FA_FRAGMENT;
#pragma unroll
  for (int m = 0; m < m_count; m++)
#pragma unroll
    for (int n = 0; n < n_count; n++) fa_add_fragment(sum_gmem + m * 16 * HEAD_DIM + n * FA_FRAGMENT, lane, dq[m * n_count + n]);
}

/* Rows g and g + 8 of `count` fragments of dK or dV, times factor: keys from key0 on, columns from column0 on. Keys past the used ones
 * that have a place in the tensor get 0. */
FA_INLINE void fa_store_gradient_rows(const fa_arg_view *view, const fa_tile *tile, float sum[][4], int count, int key0, int column0,
                                      int dims, float factor) {
  int lane = threadIdx.x % 32;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    int j = key0 + (lane >> 2) + 8 * r, used = j < tile->len_k, has_place = j < tile->slot_k;
    char *row_gmem = fa_head_base(view, ELEMENT_BYTES, tile->b, tile->h, tile->k_start + j);
    if (ALIGNED && DTYPE != FA_ARG_F32 && count % 4 == 0) {
#pragma unroll
      for (int n = 0; n < count; n += 4) { /* 64 bytes of each row */
        uint32_t word[4];
#pragma unroll
        for (int i = 0; i < 4; i++) word[i] = used ? fa_pack(sum[n + i][2 * r] * factor, sum[n + i][2 * r + 1] * factor) : 0;
        fa_transpose_quad(word);
        int column = column0 + 8 * (n + (lane & 3));
        if (has_place && column < dims) *(uint4 *)(row_gmem + column * 2) = make_uint4(word[0], word[1], word[2], word[3]);
      }
    } else if (has_place) {
#pragma unroll
      for (int n = 0; n < count; n++)
        fa_store_pair(row_gmem, view->d, dims, column0 + 8 * n + 2 * (lane & 3), used ? sum[n][2 * r] * factor : 0.0f,
                      used ? sum[n][2 * r + 1] * factor : 0.0f);
    }
  }
}

#endif
