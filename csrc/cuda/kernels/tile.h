/* tile.h: where a CTA's tile lies, and tiles in shared memory.
 *
 * Expects the constant DTYPE (args.h), and ALIGNED: 1 when rows of q, k and v (and dout) are contiguous and start on 16 bytes, with head dims
 * that fill whole 16-byte chunks.
 */
#ifndef FA_TILE_H
#define FA_TILE_H

#include "args.h"
#include "ptx.h"

#define ELEMENT_BYTES (DTYPE == FA_ARG_F64 ? 8 : DTYPE == FA_ARG_F32 ? 4 : 2)
#define CHUNK_ELEMENTS (16 / ELEMENT_BYTES)
/* fp32 is split for the tensor cores (split.h): eight elements take a chunk of high terms and one of low terms, and each row has a scale, f32, which
 * all lie behind the tile's rows. */
#define FA_PLANES (DTYPE == FA_ARG_F32 ? 2 : 1)
#define SCALE_BYTES (DTYPE == FA_ARG_F32 ? 4 : 0)

/* ---- which tile is mine ---- */

typedef struct {
  int b, h;                 /* batch entry, head */
  int m0;                   /* first row (or key) of the tile within its sequence */
  int split;                /* which part of the keys */
  int slot_q, slot_k;       /* rows and keys that the tensors hold for this sequence */
  int len_q, len_k;         /* how many of them are used */
  int64_t q_start, k_start; /* position of the sequence's first row and key in the tensors */
} fa_tile;

/* Fills the lengths of sequence tile->b. What the device says is cut down to the memory that is there, since no host can check it. */
FA_INLINE void fa_read_lengths(const fa_arg_problem *p, fa_tile *tile) {
  tile->q_start = tile->k_start = 0;
  tile->slot_q = p->seqlen_q;
  tile->slot_k = p->seqlen_k;
  if (p->packed) {
    int q0 = fa_max(0, p->cu_q.data[tile->b * p->cu_q.stride]), q1 = p->cu_q.data[(tile->b + 1) * p->cu_q.stride];
    int k0 = fa_max(0, p->cu_k.data[tile->b * p->cu_k.stride]), k1 = p->cu_k.data[(tile->b + 1) * p->cu_k.stride];
    tile->q_start = q0;
    tile->k_start = k0;
    tile->slot_q = fa_max(0, (int)(q1 < p->total_q ? q1 : p->total_q) - q0);
    tile->slot_k = fa_max(0, (int)(k1 < p->total_k ? k1 : p->total_k) - k0);
  }
  tile->len_q = tile->slot_q;
  tile->len_k = tile->slot_k;
  if (p->used_q.data) tile->len_q = fa_max(0, fa_min(tile->len_q, p->used_q.data[tile->b * p->used_q.stride]));
  if (p->used_k.data) tile->len_k = fa_max(0, fa_min(tile->len_k, p->used_k.data[tile->b * p->used_k.stride]));
}

/* Packed: the sequence that holds tile number `index` when each sequence is cut into tiles of `rows` positions of cu. Past the last tile: returns
 * 0, and *tile_in_sequence counts from there. All lanes of a warp take part and agree. */
FA_INLINE int fa_find_sequence(fa_arg_ints cu, int batch, int rows, int index, int *b, int *tile_in_sequence, int *tiles_of_sequence) {
  int lane = threadIdx.x % 32, left = index;
  for (int base = 0; base < batch; base += 32) {
    int mine = base + lane, tiles = 0;
    if (mine < batch) {
      int begin = fa_max(0, cu.data[mine * cu.stride]), end = cu.data[(mine + 1) * cu.stride];
      tiles = fa_ceil_div(fa_max(0, (int)(end < cu.most ? end : cu.most) - begin), rows);
    }
    int through = tiles; /* tiles of lanes 0..lane */
    for (int step = 1; step < 32; step *= 2) {
      int below = __shfl_up_sync(0xFFFFFFFFu, through, step);
      if (lane >= step) through += below;
    }
    unsigned here = __ballot_sync(0xFFFFFFFFu, through > left);
    if (here) {
      int owner = __ffs(here) - 1;
      *b = base + owner;
      *tiles_of_sequence = __shfl_sync(0xFFFFFFFFu, tiles, owner);
      *tile_in_sequence = left - (__shfl_sync(0xFFFFFFFFu, through, owner) - *tiles_of_sequence);
      return 1;
    }
    left -= __shfl_sync(0xFFFFFFFFu, through, 31);
  }
  *tile_in_sequence = left;
  return 0;
}

/* Packed: rows behind the last sequence belong to nobody and are written as padding: one more sequence of which nothing is used. */
FA_INLINE int fa_slack_tile(const fa_arg_problem *p, int index, int rows, fa_tile *tile) {
  int64_t start = fa_max(0, p->cu_q.data[p->batch * p->cu_q.stride]);
  if (start + (int64_t)index * rows >= p->total_q) return 0;
  tile->b = p->batch;
  tile->m0 = index * rows;
  tile->q_start = start;
  tile->k_start = 0;
  tile->slot_q = (int)(p->total_q - start);
  tile->slot_k = tile->len_q = tile->len_k = 0;
  return 1;
}

/* The tile of query rows of this CTA. The grid counts, from the fastest: tile, split, head, batch entry; when packed the tiles of all
 * sequences come in one row, of which `tiles` is an upper bound. The last tile of a sequence comes first: under a causal mask it is the
 * longest. Returns 0 when there is no such tile. */
FA_INLINE int fa_find_query_tile(const fa_arg_problem *p, int tiles, int splits, int rows, fa_tile *tile) {
  unsigned left = blockIdx.x / (unsigned)tiles;
  int index = (int)(blockIdx.x % (unsigned)tiles), count = tiles;
  tile->split = 0;
  if (splits > 1) {
    tile->split = (int)(left % (unsigned)splits);
    left /= (unsigned)splits;
  }
  tile->h = (int)(left % (unsigned)p->heads_q);
  tile->b = (int)(left / (unsigned)p->heads_q);
  if (p->packed && !fa_find_sequence(p->cu_q, p->batch, rows, index, &tile->b, &index, &count)) return fa_slack_tile(p, index, rows, tile);
  tile->m0 = (count - 1 - index) * rows;
  fa_read_lengths(p, tile);
  return tile->m0 < tile->slot_q;
}

/* Row of a sequence in the workspace's arrays of statistics: (batch, heads_q, seqlen_q), or (heads_q, total_q) when packed. */
FA_INLINE int64_t fa_statistics_row(const fa_arg_problem *p, const fa_tile *tile, int row) {
  if (p->packed) return (int64_t)tile->h * p->total_q + tile->q_start + row;
  return ((int64_t)tile->b * p->heads_q + tile->h) * p->seqlen_q + row;
}

FA_INLINE int64_t fa_statistics_rows(const fa_arg_problem *p) {
  return p->packed ? (int64_t)p->heads_q * p->total_q : (int64_t)p->batch * p->heads_q * p->seqlen_q;
}

/* The address of row 0 of a head of a sequence. `start` is its q_start or k_start. */
FA_INLINE char *fa_head_base(const fa_arg_view *view, int element_bytes, int b, int h, int64_t start) {
  return (char *)view->data + (b * view->b + h * view->h + start * view->s) * element_bytes;
}

/* ---- elements ---- */

FA_INLINE float fa_bf16_to_float(uint16_t x) { return __uint_as_float((uint32_t)x << 16); }

/* Element `index` of an array whose type is known at run time, as a double or float; type is f32, f64 or a 16-bit one. */
FA_INLINE double fa_load_f64(const void *data, int dtype, int64_t index) {
  if (dtype == FA_ARG_F64) return ((const double *)data)[index];
  if (dtype == FA_ARG_F32) return ((const float *)data)[index];
  uint16_t bits = ((const uint16_t *)data)[index];
  return dtype == FA_ARG_F16 ? cvt_f32_f16(bits) : fa_bf16_to_float(bits);
}

FA_INLINE float fa_load_f32(const void *data, int dtype, int64_t index) {
  if (dtype == FA_ARG_F32) return ((const float *)data)[index];
  if (dtype == FA_ARG_F64) return (float)((const double *)data)[index];
  uint16_t bits = ((const uint16_t *)data)[index];
  return dtype == FA_ARG_F16 ? cvt_f32_f16(bits) : fa_bf16_to_float(bits);
}

/* Two floats as two 16-bit elements, low first. */
FA_INLINE uint32_t fa_pack(float low, float high) { return DTYPE == FA_ARG_BF16 ? cvt_rn_bf16x2(high, low) : cvt_rn_f16x2(high, low); }

/* One element of type DTYPE. */
FA_INLINE void fa_store_element(void *address, float x) {
  if (DTYPE == FA_ARG_F32)
    *(float *)address = x;
  else
    *(uint16_t *)address = (uint16_t)fa_pack(x, 0.0f);
}

/* ---- tiles in shared memory ----
 *
 * A tile is rows of 16-byte chunks, row after row, without padding. Chunk c of row r lies in place c ^ swizzle(r), so that eight rows of one
 * column of chunks, which is what ldmatrix reads at once, lie in eight different groups of four banks. With a multiple of eight chunks a row
 * the swizzle is r % 8; otherwise (a multiple of four) two rows cover the banks, and it is (r / 2) % 4.
 */
#define SWIZZLE_MASK(row_bytes) ((row_bytes) % 128 == 0 ? 7 : 3)

FA_INLINE int fa_swizzle(int row, int row_bytes) { return row_bytes % 128 == 0 ? row & 7 : (row >> 1) & 3; }

FA_INLINE uint32_t fa_chunk_address(uint32_t tile_smem, int row, int chunk, int row_bytes) {
  return tile_smem + row * row_bytes + ((chunk ^ fa_swizzle(row, row_bytes)) << 4);
}

/* What a lane adds to a tile's address to name its row of an ldmatrix_x4. The second part is an exclusive-or with the chunk. */
typedef struct {
  uint32_t offset; /* of the lane's row, bytes */
  int chunk;       /* the lane's chunk (0 or 1), swizzled */
} fa_lane;

/* Matrices in the order (rows 0-7, chunk 0), (rows 8-15, chunk 0), (rows 0-7, chunk 1), (rows 8-15, chunk 1): operand a of the mma; transposed,
 * operand b of two neighbouring column groups. */
FA_INLINE fa_lane fa_lane_rows_first(int lane, int row_bytes) {
  int row = lane & 15;
  fa_lane l = {(uint32_t)(row * row_bytes), (lane >> 4) * FA_PLANES ^ fa_swizzle(row, row_bytes)};
  return l;
}

/* (rows 0-7, chunk 0), (rows 0-7, chunk 1), (rows 8-15, chunk 0), (rows 8-15, chunk 1): operand b of two column groups, columns in rows. */
FA_INLINE fa_lane fa_lane_chunks_first(int lane, int row_bytes) {
  int row = (lane & 7) + (lane >> 4) * 8;
  fa_lane l = {(uint32_t)(row * row_bytes), ((lane >> 3) & 1) * FA_PLANES ^ fa_swizzle(row, row_bytes)};
  return l;
}

/* Address for the 16 rows from `row` on (a multiple of 16) and the two chunks from `chunk` on (even). */
FA_INLINE uint32_t fa_lane_address(uint32_t tile_smem, fa_lane lane, int row, int chunk, int row_bytes) {
  int mask = SWIZZLE_MASK(row_bytes);
  return tile_smem + lane.offset + row * row_bytes + (((chunk & mask) ^ lane.chunk) << 4) + ((chunk & ~mask) << 4);
}

/* One chunk gathered element by element: any stride, any head dim. */
FA_INLINE void fa_gather_chunk(uint32_t dst_smem, const char *row_gmem, int64_t dim_stride, int first, int valid) {
  uint32_t r[4] = {0, 0, 0, 0};
  if (DTYPE == FA_ARG_F32) {
#pragma unroll
    for (int e = 0; e < 4; e++)
      if (first + e < valid) r[e] = *(const uint32_t *)(row_gmem + (first + e) * dim_stride * 4);
  } else {
#pragma unroll
    for (int e = 0; e < 8; e++)
      if (first + e < valid) r[e / 2] |= (uint32_t)(*(const uint16_t *)(row_gmem + (first + e) * dim_stride * 2)) << (16 * (e & 1));
  }
  st_shared_v4(dst_smem, r);
}

/* A [rows][padded_dim] tile from global memory; rows from valid_rows on and dims from valid_dims on become zero. All `threads` threads of
 * the CTA take part. The copy is complete after the group's wait and a barrier.
 *
 * A row is read by 8 neighbouring lanes (4 where its chunks are no multiple of 8), each pass covers threads / lanes rows, and that is a multiple
 * of 8: so a thread's swizzle and its offset in global memory are the same in every pass, and cost no registers a chunk. */
FA_INLINE void fa_load_tile(uint32_t tile_smem, const char *row0_gmem, const fa_arg_view *view, int valid_rows, int valid_dims, int rows,
                            int padded_dim, int threads) {
  int row_bytes = padded_dim * ELEMENT_BYTES, lanes = row_bytes % 128 == 0 ? 8 : 4, pass_rows = threads / lanes;
  int row = (int)threadIdx.x / lanes, chunk = (int)threadIdx.x % lanes;
  uint32_t dst_smem = fa_chunk_address(tile_smem, row, chunk, row_bytes);
  int64_t stride = view->s * ELEMENT_BYTES;
  const char *row_gmem = row0_gmem + row * stride + (ALIGNED ? chunk * 16 : 0);
#pragma unroll(ALIGNED ? 64 : 1)
  for (int first = 0; first < rows; first += pass_rows) {
    if (rows % pass_rows == 0 || row + first < rows) {
      int inside = row + first < valid_rows;
#pragma unroll(ALIGNED ? 64 : 1)
      for (int c = 0; c < row_bytes / 16; c += lanes) {
        uint32_t at_smem = dst_smem + first * row_bytes + c * 16;
        int dim = (chunk + c) * CHUNK_ELEMENTS;
        if (ALIGNED)
          cp_async_cg_16(at_smem, row_gmem + c * 16, inside && dim < valid_dims ? 16 : 0);
        else
          fa_gather_chunk(at_smem, row_gmem, view->d, dim, inside ? valid_dims : 0);
      }
    }
    row_gmem += pass_rows * stride;
  }
}

#endif
