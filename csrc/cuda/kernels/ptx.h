/* ptx.h: one function, one PTX instruction, named as PTX names it. What sm_80 and later have.
 *
 * Shared-memory addresses are 32-bit, from smem_address(). Only instructions that touch memory or order it are volatile: the others may
 * be moved and shared by the compiler.
 */
#ifndef FA_PTX_H
#define FA_PTX_H

#include "../../core/portable.h"

FA_INLINE uint32_t smem_address(const void *pointer) { return (uint32_t)__cvta_generic_to_shared(pointer); }

/* ---- copies ---- */

/* 16 bytes from global to shared memory, past L1; the last 16 - bytes of them as zeros. bytes == 0 reads nothing. */
FA_INLINE void cp_async_cg_16(uint32_t dst_smem, const void *src_gmem, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(dst_smem), "l"(src_gmem), "r"(bytes) : "memory");
}

FA_INLINE void cp_async_commit_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/* Waits until at most `pending` of this thread's newest groups are in flight; other threads' copies need a barrier on top. */
#define cp_async_wait_group(pending) asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory")

FA_INLINE void st_shared_v4(uint32_t dst_smem, const uint32_t r[4]) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(dst_smem), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
}

FA_INLINE void st_shared_v2(uint32_t dst_smem, const uint32_t r[2]) {
  asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(dst_smem), "r"(r[0]), "r"(r[1]) : "memory");
}

FA_INLINE void st_shared_b32(uint32_t dst_smem, uint32_t r) { asm volatile("st.shared.b32 [%0], %1;" ::"r"(dst_smem), "r"(r) : "memory"); }

FA_INLINE uint32_t ld_shared_b32(uint32_t src_smem) {
  uint32_t r;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(r) : "r"(src_smem) : "memory");
  return r;
}

FA_INLINE void ld_shared_v2_f32(float x[2], uint32_t src_smem) {
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x[0]), "=f"(x[1]) : "r"(src_smem) : "memory");
}

FA_INLINE void ld_shared_v4(uint32_t r[4], uint32_t src_smem) {
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(src_smem) : "memory");
}

/* Four 8x8 matrices of 16-bit elements; lane l names row l % 8 of matrix l / 8. r[i] holds, of matrix i, row lane / 4, elements 2 * (lane % 4)
 * and the next. */
FA_INLINE void ldmatrix_x4(uint32_t r[4], uint32_t row_smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row_smem)
               : "memory");
}

/* The same with each matrix transposed. */
FA_INLINE void ldmatrix_x4_trans(uint32_t r[4], uint32_t row_smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row_smem)
               : "memory");
}

/* ---- named barriers, 0 is __syncthreads ---- */

FA_INLINE void bar_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

/* ---- matrix products: d += a * b, with g = lane / 4 and q = lane % 4 ----
 *
 *   d   m16n8, f32:     d0 d1 = row g,     columns 2q 2q+1          d2 d3 = row g + 8, the same columns
 *   a   m16k16, 16-bit: a0 = row g, k 2q 2q+1     a1 = row g + 8, the same k     a2 a3 = the same rows, k + 8
 *   b   k16n8, 16-bit:  b0 = k 2q 2q+1, column g                                 b1 = k + 8
 */

FA_INLINE void mma_m16n8k16_f16(float d[4], const uint32_t a[4], const uint32_t b[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

FA_INLINE void mma_m16n8k16_bf16(float d[4], const uint32_t a[4], const uint32_t b[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/* ---- arithmetic and conversion ---- */

/* 2^x to 2 units in the last place; 2^-inf = 0. */
FA_INLINE float ex2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

FA_INLINE uint32_t cvt_rn_f16x2(float high, float low) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

FA_INLINE uint32_t cvt_rn_bf16x2(float high, float low) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

FA_INLINE float cvt_f32_f16(uint16_t x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
  return y;
}

/* x, about which the compiler knows nothing any more: it then computes addresses anew for each product instead of carrying them, one
 * register each, around the loop over tiles. */
FA_INLINE uint32_t fa_opaque(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

#endif
