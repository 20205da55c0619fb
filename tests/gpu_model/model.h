/* model.h: a GPU of one CTA at a time, on the CPU. Included before a kernel file, it takes the place of kernels/ptx.h and ptx_bwd.h and of what the CUDA compiler
 * knows by itself, so that the kernels' own source runs and can be checked with no GPU.
 *
 * Each thread of a CTA is a coroutine. What a warp does together (shuffles, votes, ldmatrix, mma) and barriers are meeting points: a thread that
 * arrives waits until all others have arrived at the same one; a warp whose lanes meet at different ones stops the program. Copies are done at
 * once, so races are not found here.
 */
#ifndef GPU_MODEL_H
#define GPU_MODEL_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#define FA_PTX_H
#define FA_PTX_BWD_H
#include "../../csrc/core/numeric.h"
#include "../../csrc/core/portable.h"

#define __global__
#define __device__
#define __shared__
#define __forceinline__ inline
#define __grid_constant__
#define __align__(bytes)
#define __launch_bounds__(...)

struct model_dim {
  unsigned x, y, z;
};

struct model_thread;
extern "C" {
extern model_thread *model_current;
extern model_dim model_block;
extern unsigned char shared[];
unsigned model_thread_index(void);
unsigned model_block_size(void);

enum model_meeting { MEET_SHUFFLE = 1, MEET_BALLOT, MEET_LDMATRIX, MEET_LDMATRIX_TRANS, MEET_MMA_F16, MEET_MMA_BF16, MEET_SYNC };

/* Meets the other lanes of the warp; `words` in and out, at most 12. */
void model_meet_warp(enum model_meeting meeting, uint32_t *words);
/* Meets all threads of the CTA; returns whether any passed a nonzero value. */
int model_meet_block(int value);
}

#define threadIdx (model_dim{model_thread_index(), 0, 0})
#define blockIdx model_block
#define blockDim (model_dim{model_block_size(), 1, 1})

/* ---- built into the CUDA compiler ---- */

static inline float __uint_as_float(uint32_t x) {
  float y;
  memcpy(&y, &x, 4);
  return y;
}
static inline float __int_as_float(int x) { return __uint_as_float((uint32_t)x); }
static inline uint32_t __float_as_uint(float x) {
  uint32_t y;
  memcpy(&y, &x, 4);
  return y;
}
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
#define __expf(x) expf(x) /* macros, since the C library has functions of these names inside */
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
static inline float __fdividef(float a, float b) { return a / b; }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }

struct uint4 {
  unsigned x, y, z, w;
};
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return uint4{x, y, z, w}; }

static inline void __syncthreads() { model_meet_block(0); }
static inline int __syncthreads_or(int value) { return model_meet_block(value != 0); }

static inline void __syncwarp() {
  uint32_t words[12] = {0};
  model_meet_warp(MEET_SYNC, words);
}

static inline unsigned __ballot_sync(unsigned, int value) {
  uint32_t words[12] = {(uint32_t)(value != 0)};
  model_meet_warp(MEET_BALLOT, words);
  return words[0];
}

static inline int __any_sync(unsigned, int value) { return __ballot_sync(0, value) != 0; }
static inline int __all_sync(unsigned, int value) { return __ballot_sync(0, value) == 0xFFFFFFFFu; }

/* The value of lane `from`; out of range: one's own. */
template <class T>
static inline T model_shuffle(T value, int from) {
  uint32_t words[12] = {0};
  memcpy(words, &value, sizeof value);
  words[2] = (uint32_t)from;
  model_meet_warp(MEET_SHUFFLE, words);
  memcpy(&value, words, sizeof value);
  return value;
}

static inline int model_lane() { return (int)(model_thread_index() % 32); }
template <class T>
static inline T __shfl_sync(unsigned, T value, int lane) {
  return model_shuffle(value, lane & 31);
}
template <class T>
static inline T __shfl_xor_sync(unsigned, T value, int mask) {
  return model_shuffle(value, model_lane() ^ mask);
}
template <class T>
static inline T __shfl_up_sync(unsigned, T value, int step) {
  return model_shuffle(value, model_lane() - step);
}
template <class T>
static inline T __shfl_down_sync(unsigned, T value, int step) {
  return model_shuffle(value, model_lane() + step);
}

static inline float atomicAdd(float *address, float value) {
  float old = *address;
  *address = old + value;
  return old;
}
static inline int atomicAdd(int *address, int value) {
  int old = *address;
  *address = old + value;
  return old;
}

/* ---- ptx.h ---- */

static inline uint32_t smem_address(const void *pointer) { return (uint32_t)((const unsigned char *)pointer - shared); }

static inline void cp_async_cg_16(uint32_t dst_smem, const void *src_gmem, int bytes) {
  memset(shared + dst_smem, 0, 16);
  if (bytes) memcpy(shared + dst_smem, src_gmem, (size_t)bytes);
}
static inline void cp_async_commit_group() {}
#define cp_async_wait_group(pending) ((void)0)

static inline void st_shared_v4(uint32_t dst_smem, const uint32_t r[4]) { memcpy(shared + dst_smem, r, 16); }
static inline void st_shared_b32(uint32_t dst_smem, uint32_t r) { memcpy(shared + dst_smem, &r, 4); }
static inline void ld_shared_v2_f32(float x[2], uint32_t src_smem) { memcpy(x, shared + src_smem, 8); }
static inline void st_shared_v2(uint32_t dst_smem, const uint32_t r[2]) { memcpy(shared + dst_smem, r, 8); }
static inline void ld_shared_v4(uint32_t r[4], uint32_t src_smem) { memcpy(r, shared + src_smem, 16); }
static inline uint32_t ld_shared_b32(uint32_t src_smem) {
  uint32_t r;
  memcpy(&r, shared + src_smem, 4);
  return r;
}

static inline void model_ldmatrix(enum model_meeting meeting, uint32_t r[4], uint32_t row_smem) {
  uint32_t words[12] = {row_smem};
  model_meet_warp(meeting, words);
  memcpy(r, words, 16);
}
static inline void ldmatrix_x4(uint32_t r[4], uint32_t row_smem) { model_ldmatrix(MEET_LDMATRIX, r, row_smem); }
static inline void ldmatrix_x4_trans(uint32_t r[4], uint32_t row_smem) { model_ldmatrix(MEET_LDMATRIX_TRANS, r, row_smem); }

static inline void model_mma(enum model_meeting meeting, float d[4], const uint32_t a[4], const uint32_t b[2]) {
  uint32_t words[12];
  memcpy(words, d, 16);
  memcpy(words + 4, a, 16);
  memcpy(words + 8, b, 8);
  model_meet_warp(meeting, words);
  memcpy(d, words, 16);
}
static inline void mma_m16n8k16_f16(float d[4], const uint32_t a[4], const uint32_t b[2]) { model_mma(MEET_MMA_F16, d, a, b); }
static inline void mma_m16n8k16_bf16(float d[4], const uint32_t a[4], const uint32_t b[2]) { model_mma(MEET_MMA_BF16, d, a, b); }

static inline float ex2_approx(float x) { return exp2f(x); }

static inline float cvt_f32_f16(uint16_t x) { return fa_from_f16(x); }
static inline uint32_t cvt_rn_f16x2(float high, float low) { return (uint32_t)fa_to_f16(high) << 16 | fa_to_f16(low); }
static inline uint32_t cvt_rn_bf16x2(float high, float low) { return (uint32_t)fa_to_bf16(high) << 16 | fa_to_bf16(low); }

/* ---- ptx_bwd.h, as before sm_90 ---- */

#define FA_VECTOR_RED 0

static inline void red_global_add_f32(float *address, float x) { *address += x; }
static inline void red_global_add_v4_f32(float *address, const float x[4]) {
  for (int i = 0; i < 4; i++) red_global_add_f32(address + i, x[i]);
}
static inline uint32_t fa_opaque(uint32_t x) { return x; }

#endif
