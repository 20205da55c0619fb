/* flash_attn.h: the C API. Exact attention, forward and backward, without the n x n matrix.
 *
 * Fill an fa_request (zero it first: whatever is zero is absent or default), then call fa_forward or fa_backward. Every call checks
 * the whole request before any work, and either does all of it or returns a code with a message that names the argument, its
 * value and the limit. Nothing is printed, nothing exits, no input is ever written.
 *
 * Meaning of every field: docs/semantics.md. Thread-safe: calls share nothing but the thread pool and the kernel store.
 */
#ifndef FLASH_ATTN_H
#define FLASH_ATTN_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { FA_MAX_DIMS = 5, FA_MAX_HEAD_DIM = 256, FA_MESSAGE_BYTES = 512 };

/* Marks an absent bound or length: a window side without limit, an unknown max_seqlen. */
#define FA_UNBOUNDED INT64_MIN

/* FA_NONE marks an absent tensor, so a zeroed request has none. FA_OTHER is any element type this library does not compute with. */
typedef enum { FA_NONE = 0, FA_F32, FA_F64, FA_F16, FA_BF16, FA_I32, FA_I64, FA_BOOL, FA_F8_E4M3, FA_OTHER } fa_dtype;
typedef enum { FA_CPU = 0, FA_CUDA, FA_DEVICE_OTHER } fa_device;
typedef enum { FA_BSHD = 0, FA_BHSD } fa_layout;
typedef enum { FA_NOT_CAUSAL = 0, FA_BOTTOM_RIGHT, FA_TOP_LEFT } fa_causal;

typedef enum {
  FA_OK = 0,
  FA_ERR_TYPE,        /* an argument of the wrong kind: dtype, device, rank */
  FA_ERR_VALUE,       /* the right kind with a value that cannot be */
  FA_ERR_UNSUPPORTED, /* legal, but not built here */
  FA_ERR_RUNTIME,     /* the machine failed: driver, compiler, launch */
  FA_ERR_MEMORY       /* an allocation failed */
} fa_code;

typedef struct {
  fa_code code;
  char message[FA_MESSAGE_BYTES];
} fa_error;

/* A strided view of memory that the caller owns. Strides count elements, may be zero or negative. */
typedef struct {
  void *data; /* may be NULL when some shape entry is 0 */
  fa_dtype dtype;
  fa_device device;
  int32_t device_index;
  int32_t ndim;
  int32_t read_only;
  int64_t shape[FA_MAX_DIMS];
  int64_t stride[FA_MAX_DIMS];
} fa_tensor;

/* Which (query row i, key column j) pairs exist. All given rules must hold. */
typedef struct {
  fa_causal causal;
  int32_t has_window;   /* 0: the two bounds below are not read */
  int64_t window_left;  /* keep j >= i + off - left, or FA_UNBOUNDED */
  int64_t window_right; /* keep j <= i + off + right, or FA_UNBOUNDED; causal forces 0 */
  fa_tensor mask;       /* bool, broadcasts to (batch, heads_q, seqlen_q, seqlen_k), true = attend */
  fa_tensor block_mask; /* bool, (1|batch, 1|heads_q, ceil(seqlen_q / B), ceil(seqlen_k / B)) */
  int64_t block_size;   /* B, a multiple of 64; 0: found from the shapes */
} fa_visibility;

/* How a score comes about: bias + softcap(scale * q.k) - slope * |i + off - j|. */
typedef struct {
  int32_t has_scale; /* 0: dim_qk ** -0.5 */
  double scale;
  double softcap;         /* 0: none */
  fa_tensor bias;         /* q's dtype or f32, broadcasts to (batch, heads_q, seqlen_q, seqlen_k) */
  fa_tensor alibi_slopes; /* f32 (f64 with f64 inputs), (heads_q) or (batch, heads_q) */
  fa_tensor sinks;        /* q's dtype or f32, (heads_q): one logit a head, in the denominator only */
} fa_score;

/* Sequences of unequal length: packed (cu_seqlens) or padded (seqused), or both. All int32. */
typedef struct {
  fa_tensor cu_seqlens_q, cu_seqlens_k; /* (batch + 1), from 0, not decreasing; both or neither */
  fa_tensor seqused_q, seqused_k;       /* (batch): the used prefix of each slot */
  int32_t has_max_q, has_max_k;
  int64_t max_seqlen_q, max_seqlen_k; /* upper bounds */
} fa_lengths;

typedef struct {
  double p;        /* in [0, 1) */
  uint64_t seed;   /* used when state is absent */
  uint64_t offset; /* likewise */
  fa_tensor state; /* i64 (2): seed, offset, on the device of q */
} fa_dropout;

/* Backward only. A gradient that is absent is not computed. */
typedef struct {
  fa_tensor dout;           /* like out */
  fa_tensor dlse;           /* like lse; absent = zero */
  fa_tensor dq, dk, dv;     /* like q, k, v */
  fa_tensor dbias;          /* like bias */
  fa_tensor dalibi, dsinks; /* like alibi_slopes, sinks */
} fa_gradients;

typedef struct {
  fa_layout layout;  /* of q, k, v, out and their gradients when dense; packed ones are (total, heads, dim) */
  fa_tensor q, k, v; /* (batch, seqlen, heads, dim) or (batch, heads, seqlen, dim) or (total, heads, dim) */
  fa_tensor out;     /* like q with dim_v: written by forward, read by backward */
  fa_tensor lse;     /* natural log, f32 (f64 with f64): (batch, heads_q, seqlen_q) or (heads_q, total_q). A CPU forward may lack it */
  fa_tensor probs;   /* forward, optional: exp(score - row max), (batch, heads_q, up128(seqlen_q), up128(seqlen_k)) */
  fa_visibility visibility;
  fa_score score;
  fa_lengths lengths;
  fa_dropout dropout;
  int32_t deterministic;
  fa_gradients grad;
} fa_request;

/* What an engine needs from its caller. All zero for the CPU. */
typedef struct {
  void *stream;                                  /* CUstream of q's device */
  void *(*alloc)(void *alloc_ctx, size_t bytes); /* device workspace, 256-byte aligned, alive until the stream has passed this call */
  void *alloc_ctx;
} fa_context;

fa_code fa_forward(const fa_request *request, const fa_context *context, fa_error *error);
fa_code fa_backward(const fa_request *request, const fa_context *context, fa_error *error);

/* The plan for a request as JSON text: engine, kernel, tiles, splits, workspace bytes, and why each faster choice was not taken.
 * Outputs may be absent. Returns FA_ERR_VALUE when `bytes` is too small for the text. */
fa_code fa_explain(const fa_request *request, int backward, char *text, size_t bytes, fa_error *error);

/* What this library found on the machine, as JSON text: CPU tier, threads, driver, NVRTC, kernel cache. */
fa_code fa_describe(char *text, size_t bytes, fa_error *error);

#ifdef __cplusplus
}
#endif
#endif
