/* problem.h: a checked request in the engines' own terms. Filled in one place (problem.c), const from then on.
 *
 * Every tensor is a base pointer with strides in elements for (batch, head, sequence position, dim); packed tensors have batch
 * stride 0 and a position counted over all tokens. Broadcast dimensions have stride 0. A field whose data pointer is NULL is absent.
 */
#ifndef FA_PROBLEM_H
#define FA_PROBLEM_H

#include "../flash_attn.h"
#include "mask.h"

typedef enum { FA_FORWARD = 0, FA_BACKWARD } fa_direction;

typedef struct {
  void *data;
  int64_t b, h, s, d; /* strides in elements */
} fa_view;

typedef struct {
  void *data;
  fa_dtype dtype;
  int64_t b, h, m, n;              /* strides in elements, 0 where broadcast */
  int batch, heads, rows, columns; /* 1 where broadcast, else the full size: the shape of the gradient */
} fa_grid;                         /* something indexed by (batch, head, query row or block, key column or block) */

typedef struct {
  void *data;
  fa_dtype dtype;
  int64_t b, h; /* strides in elements; b is 0 for (heads_q) */
} fa_per_head;

typedef struct {
  const int32_t *data;
  int64_t stride;
} fa_ints;

typedef struct {
  fa_device device;
  int device_index;
  fa_dtype dtype; /* of q, k, v, out and their gradients */

  int batch, heads_q, heads_k, group; /* group = heads_q / heads_k */
  int seqlen_q, seqlen_k;             /* dense: the length; packed: max_seqlen (an upper bound, see lengths_known) */
  int dim_qk, dim_v;
  int64_t total_q, total_k; /* packed: tokens in all; dense: batch * seqlen */

  fa_view q, k, v, out; /* backward reads out */
  fa_view lse;          /* d unused; packed: b = 0. dtype f32, or f64 with f64 inputs */
  fa_view probs;        /* s strides rows, d strides columns; [up128(seqlen_q)][up128(seqlen_k)] */

  struct {
    fa_rule rule;
    fa_grid mask;
    fa_grid block_mask; /* m and n stride blocks */
    int block_size;     /* 0 without a block mask */
  } visibility;

  struct {
    double scale, softcap;
    fa_grid bias;
    fa_per_head alibi, sinks;
  } score;

  struct {
    int packed;       /* 1: cu_q and cu_k are there and views count tokens */
    int bounds_given; /* packed: both max_seqlen were given; else seqlen_* is the longest possible, total_* */
    fa_ints cu_q, cu_k, used_q, used_k;
  } lengths;

  struct {
    double p; /* 0: no dropout */
    uint64_t seed, offset;
    const int64_t *state; /* when given, (seed, offset) are read from here instead, on the device */
    int64_t state_stride;
  } dropout;

  int deterministic;

  struct {
    fa_view dout, dq, dk, dv;
    fa_view dlse;
    fa_grid dbias;
    fa_per_head dalibi, dsinks;
  } grad;
} fa_problem;

/* The only validator. Checks everything that can be known without reading device memory; for CPU tensors also the length arrays
 * themselves. need_outputs = 0 (explain) accepts absent out and lse. */
fa_code fa_problem_init(fa_problem *problem, const fa_request *request, fa_direction direction, int need_outputs, fa_error *error);

/* One sequence: where its rows start, how many its slot holds and how many are used: rows in [len, slot) are padding. Read on the
 * CPU; kernels do the same from device memory. */
typedef struct {
  int64_t q_start, k_start;
  int slot_q, slot_k;
  int len_q, len_k;
} fa_sequence;

static inline fa_sequence fa_sequence_of(const fa_problem *problem, int b) {
  fa_sequence s = {0, 0, problem->seqlen_q, problem->seqlen_k, 0, 0};
  if (problem->lengths.packed) {
    const fa_ints cu_q = problem->lengths.cu_q, cu_k = problem->lengths.cu_k;
    s.q_start = cu_q.data[b * cu_q.stride];
    s.k_start = cu_k.data[b * cu_k.stride];
    s.slot_q = cu_q.data[(b + 1) * cu_q.stride] - (int)s.q_start;
    s.slot_k = cu_k.data[(b + 1) * cu_k.stride] - (int)s.k_start;
  }
  const fa_ints used_q = problem->lengths.used_q, used_k = problem->lengths.used_k;
  s.len_q = used_q.data ? fa_min(s.slot_q, used_q.data[b * used_q.stride]) : s.slot_q;
  s.len_k = used_k.data ? fa_min(s.slot_k, used_k.data[b * used_k.stride]) : s.slot_k;
  return s;
}

static inline int fa_dtype_bytes(fa_dtype dtype) {
  static const int bytes[] = {0, 4, 8, 2, 2, 4, 8, 1, 1, 0};
  return bytes[dtype];
}

const char *fa_dtype_name(fa_dtype dtype);

#endif
