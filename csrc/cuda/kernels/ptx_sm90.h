/* ptx_sm90.h: one function, one PTX instruction, named as PTX names it. What sm_90a adds: mbarriers, the tensor memory accelerator (TMA),
 * warpgroup matrix products, and register hand-over between warpgroups.
 *
 * Expects DTYPE (args.h). Shared-memory addresses are 32-bit, from smem_address().
 */
#ifndef FA_PTX_SM90_H
#define FA_PTX_SM90_H

#include "ptx.h"

/* ---- mbarriers: 8 bytes of shared memory; a phase ends when all arrivals and all announced bytes have come ---- */

FA_INLINE void mbarrier_init(uint32_t bar_smem, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar_smem), "r"(arrivals) : "memory");
}

/* Makes the inits above visible to the TMA, the asynchronous proxy. */
FA_INLINE void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

FA_INLINE void mbarrier_arrive(uint32_t bar_smem) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar_smem) : "memory"); }

FA_INLINE void mbarrier_arrive_expect_tx(uint32_t bar_smem, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar_smem), "r"(bytes) : "memory");
}

/* Returns once the phase of this parity is over. On a fresh barrier parity 1 counts as over. */
FA_INLINE void mbarrier_wait_parity(uint32_t bar_smem, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred over;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
      "@!over bra again;\n"
      "}" ::"r"(bar_smem),
      "r"(parity)
      : "memory");
}

/* Whether it is over, without waiting. */
FA_INLINE int mbarrier_test_wait_parity(uint32_t bar_smem, int parity) {
  int over;
  asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.b32 %0, 1, 0, p;\n}"
               : "=r"(over)
               : "r"(bar_smem), "r"(parity)
               : "memory");
  return over;
}

/* ---- named barriers: see also bar_sync in ptx.h ---- */

FA_INLINE void bar_arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

/* The same as bar_sync, and 1 in every thread when `value` is not 0 in some thread. */
FA_INLINE int bar_red_or(int id, int threads, int value) {
  int any;
  asm volatile(
      "{\n"
      ".reg .pred mine, all;\n"
      "setp.ne.b32 mine, %3, 0;\n"
      "bar.red.or.pred all, %1, %2, mine;\n"
      "selp.b32 %0, 1, 0, all;\n"
      "}"
      : "=r"(any)
      : "r"(id), "r"(threads), "r"(value)
      : "memory");
  return any;
}

/* ---- TMA: boxes of a tensor of rank 4 from global to shared memory ---- */

typedef struct {
  __align__(64) unsigned char opaque[128]; /* as cuTensorMapEncodeTiled wrote it */
} fa_tma_map;

FA_INLINE void prefetch_tensormap(const fa_tma_map *map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }

/* The barrier receives the bytes of the whole box, also where the box leaves the tensor: that part arrives as zeros. */
FA_INLINE void cp_async_bulk_tensor_load(uint32_t dst_smem, const fa_tma_map *map, uint32_t bar_smem, int c0, int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(dst_smem),
      "l"(map), "r"(bar_smem), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}

/* The same of a tensor of rank 5. */
FA_INLINE void cp_async_bulk_tensor_load_5d(uint32_t dst_smem, const fa_tma_map *map, uint32_t bar_smem, int c0, int c1, int c2, int c3,
                                            int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(dst_smem),
      "l"(map), "r"(bar_smem), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}

/* A run of global memory: both addresses and the size are multiples of 16 bytes. */
FA_INLINE void cp_async_bulk_load(uint32_t dst_smem, const void *src_gmem, int bytes, uint32_t bar_smem) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(dst_smem), "l"(src_gmem),
               "r"(bytes), "r"(bar_smem)
               : "memory");
}

/* A box from shared to global memory, on behalf of the thread that asks; what leaves the tensor is not written. */
FA_INLINE void cp_async_bulk_tensor_store(const fa_tma_map *map, uint32_t src_smem, int c0, int c1, int c2, int c3) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map), "r"(src_smem), "r"(c0),
               "r"(c1), "r"(c2), "r"(c3)
               : "memory");
}

/* The box that a load with the same coordinates would bring, into the L2 cache alone. */
FA_INLINE void cp_async_bulk_prefetch_tensor(const fa_tma_map *map, int c0, int c1, int c2, int c3) {
  asm volatile("cp.async.bulk.prefetch.tensor.4d.L2.global.tile [%0, {%1, %2, %3, %4}];" ::"l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
               : "memory");
}

FA_INLINE void cp_async_bulk_commit_group() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

/* Until every group that this thread has committed has read its shared memory; until it is written as well. */
FA_INLINE void cp_async_bulk_wait_group_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
FA_INLINE void cp_async_bulk_wait_group() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

/* Ordinary writes to shared memory come before what the TMA is asked for next. */
FA_INLINE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

/* Four 8 x 8 matrices of 16-bit elements to shared memory: lane l says where row l % 8 of matrix l / 8 goes, 16 bytes; registers i hold of matrix i
 * what accumulators do: row l / 4, columns 2 * (l % 4) and the next. */
FA_INLINE void stmatrix_x4(uint32_t row_smem, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row_smem), "r"(r0), "r"(r1), "r"(r2), "r"(r3)
               : "memory");
}

/* 16 bytes to global memory. */
FA_INLINE void st_global_v4(void *dst_gmem, const uint32_t r[4]) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(dst_gmem), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
}

/* 8 bytes to global memory. */
FA_INLINE void st_global_v2(void *dst_gmem, uint32_t r0, uint32_t r1) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(dst_gmem), "r"(r0), "r"(r1) : "memory");
}

/* Volatile: read anew where it is asked for, so that nothing computed from it is kept in registers through a long loop. */
FA_INLINE int laneid() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

/* Four bytes of the eight of a, b: nibble i of `selector` numbers byte i of the result; plus 8, it means that byte's highest bit in all eight. */
FA_INLINE uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t r;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(selector));
  return r;
}

/* Of both halves, as unsigned numbers. */
FA_INLINE uint32_t max_u16x2(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("max.u16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}

FA_INLINE void st_shared_if_negative(uint32_t dst_smem, float x) {
  asm volatile("{\n.reg .pred p;\nsetp.lt.f32 p, %1, 0f00000000;\n@p st.shared.f32 [%0], %1;\n}" ::"r"(dst_smem), "f"(x) : "memory");
}

/* No instruction: the compiler forgets where a pointer came from, and computes nothing from it ahead of this point. */
#define forget_origin(pointer) asm volatile("" : "+l"(pointer))

/* ---- from kernel to kernel, where the second was launched as programmatic ---- */

/* The next kernel's CTAs may start once all CTAs of this grid have said so, or have ended. */
FA_INLINE void griddepcontrol_launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

/* Until the kernel before has ended and what it wrote is visible. */
FA_INLINE void griddepcontrol_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

/* ---- registers between warpgroups; every warp of the warpgroup takes part ---- */

#define setmaxnreg_dec(registers) asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers))
#define setmaxnreg_inc(registers) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers))

/* ---- wgmma: d (64 x N, f32) = or += a (64 x 16) * b (16 x N), issued by a warpgroup, done in the background ----
 *
 * Thread t of the warpgroup, g = t % 32 / 4, q = t % 4, holds of d the rows 16 * (t / 32) + g and that plus 8: d[4i], d[4i+1] = the first row,
 * columns 8i + 2q and the next; d[4i+2], d[4i+3] = the second row. a in registers is laid out as for mma.m16n8k16 (ptx.h), so accumulators packed
 * in pairs are an operand a as they stand.
 */

/* Ordinary accesses to accumulators and operand registers come before the products that follow. */
FA_INLINE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
FA_INLINE void wgmma_commit_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

/* Waits until at most `pending` of the newest groups run. Accumulators and operands of older ones may be touched then. */
#define wgmma_wait_group(pending) asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory")

/* A matrix in shared memory made of 128-byte rows, swizzled over 1024-byte groups of 8 rows as TMA's 128-byte mode writes them. Along the
 * direction of the rows it goes on `leading_bytes` further; only operands that run along their M or N there (transposed) use that. */
FA_INLINE uint32_t wgmma_start(uint32_t address_smem, int leading_bytes) {
  return address_smem >> 4 | (uint32_t)(leading_bytes >> 4) << 16;
}

/* The matrix that starts `offset_bytes`, a multiple of 16, behind the one at `start`. */
FA_INLINE uint64_t wgmma_descriptor(uint32_t start, int offset_bytes) {
  return (uint64_t)(1u << 30 | 1024 >> 4) << 32 | (start + (uint32_t)(offset_bytes >> 4));
}

/* The compiler must not move reads or writes of these registers across this point. */
FA_INLINE void wgmma_hold(float *d, int count) {
#pragma unroll
  for (int i = 0; i < count; i++) asm volatile("" : "+f"(d[i])::"memory");
}

#if DTYPE == 4
#define WGMMA_TYPE "bf16.bf16"
#else
#define WGMMA_TYPE "f16.f16"
#endif

/* Defines a function that multiplies with both operands in shared memory, or with a in registers. transpose_a, transpose_b: 1 when rows of
 * shared memory run along M, N instead of along K. n: a row of wgmma_shapes.h. */
#define DEFINE_WGMMA_SS(name, n, transpose_a, transpose_b) WGMMA_SHAPE(n)(WGMMA_SS, name, transpose_a, transpose_b)
#define DEFINE_WGMMA_RS(name, n, transpose_b) WGMMA_SHAPE(n)(WGMMA_RS, name, transpose_b)

#define WGMMA_SS(n, names, registers, i0, i1, i2, i3, i4, i5, name, transpose_a, transpose_b)                                            \
  FA_INLINE void name(float *d, uint64_t a, uint64_t b, int accumulate) {                                                                \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #i2                                                                                \
                 ", 0;\n"                                                                                                                \
                 "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." WGMMA_TYPE " {" names "}, %" #i0 ", %" #i1 ", p, 1, 1, " #transpose_a \
                 ", " #transpose_b ";\n}"                                                                                                \
                 : registers(d)                                                                                                          \
                 : "l"(a), "l"(b), "r"(accumulate));                                                                                     \
  }

#define WGMMA_RS(n, names, registers, i0, i1, i2, i3, i4, i5, name, transpose_b)                                                   \
  FA_INLINE void name(float *d, const uint32_t *a, uint64_t b, int accumulate) {                                                   \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #i5                                                                          \
                 ", 0;\n"                                                                                                          \
                 "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." WGMMA_TYPE " {" names "}, {%" #i0 ", %" #i1 ", %" #i2 ", %" #i3 \
                 "}, %" #i4 ", p, 1, 1, " #transpose_b ";\n}"                                                                      \
                 : registers(d)                                                                                                    \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));                                           \
  }

#include "wgmma_shapes.h"

#endif
