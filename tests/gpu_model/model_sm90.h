/* model_sm90.h: takes the place of kernels/ptx_sm90.h. Everything asynchronous is done at once, so races are not found here, but a wait for what nobody
 * brings never ends. */
#ifndef GPU_MODEL_SM90_H
#define GPU_MODEL_SM90_H

#define FA_PTX_SM90_H
#define __CUDACC__ /* for schedule_sm90.h */
extern "C" model_dim model_grid;
#define gridDim model_grid
#include <stdio.h>
#include <stdlib.h>

extern "C" void model_yield(void);

/* A wait that goes on for ever is a deadlock of the kernel: stops the program. */
static void model_wait_a_little(const char *what) {
  static long waits;
  if (++waits > 400000000) {
    fprintf(stderr, "stuck at %s\n", what);
    abort();
  }
  model_yield();
}

struct model_barrier {
  int count, arrived, phase;
  long bytes;
};
struct model_named {
  int arrived, round, any, result;
};
static model_barrier model_barriers[64];
static model_named model_named_barriers[16];

/* Barriers are told apart by their address; those of a kernel lie side by side. */
static inline model_barrier *model_barrier_at(uint32_t bar) { return &model_barriers[bar / 8 % 64]; }
static inline void model_barrier_check(model_barrier *b) {
  if (b->arrived == b->count && b->bytes == 0) b->arrived = 0, b->phase++;
  if (b->arrived > b->count) {
    fprintf(stderr, "too many arrivals\n");
    abort();
  }
}
static inline void mbarrier_init(uint32_t bar, int count) { *model_barrier_at(bar) = model_barrier{count, 0, 0, 0}; }
static inline void fence_mbarrier_init() { memset(model_named_barriers, 0, sizeof model_named_barriers); }
static inline void mbarrier_arrive(uint32_t bar) {
  model_barrier *b = model_barrier_at(bar);
  b->arrived++;
  model_barrier_check(b);
}
static inline void mbarrier_arrive_expect_tx(uint32_t bar, int bytes) {
  model_barrier *b = model_barrier_at(bar);
  b->arrived++;
  b->bytes += bytes;
  model_barrier_check(b);
}
static inline void mbarrier_wait_parity(uint32_t bar, int parity) {
  while ((model_barrier_at(bar)->phase & 1) == parity) model_wait_a_little("mbarrier");
}

static inline int mbarrier_test_wait_parity(uint32_t bar, int parity) { return (model_barrier_at(bar)->phase & 1) != parity; }

static inline void model_named_arrive(int id, int threads) {
  model_named *b = &model_named_barriers[id];
  if (++b->arrived == threads) b->result = b->any, b->arrived = b->any = 0, b->round++;
}
static inline void bar_sync(int id, int threads) {
  int round = model_named_barriers[id].round;
  model_named_arrive(id, threads);
  while (model_named_barriers[id].round == round) model_wait_a_little("bar_sync");
}
static inline int bar_red_or(int id, int threads, int value) {
  model_named_barriers[id].any |= value != 0;
  bar_sync(id, threads);
  return model_named_barriers[id].result;
}
static inline void bar_arrive(int id, int threads) { model_named_arrive(id, threads); }

struct model_map { /* fa_tensor_map_shape */
  int dtype, rank;
  char *base;
  uint64_t dims[5], stride_bytes[4];
  uint32_t box[5];
  int swizzle, l2;
};
typedef struct {
  unsigned char opaque[128];
} fa_tma_map;

static inline uint32_t model_swizzle(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }
static inline char *model_element(const model_map *m, const int c[5], int column, int row) {
  long at[5] = {c[0] + column, c[1], c[2], c[3], c[4]}, left = row;
  for (int i = 1; i < m->rank; left /= (long)m->box[i++]) at[i] += left % (long)m->box[i];
  char *element = m->base + at[0] * 2;
  for (int i = 0; i < m->rank; i++) {
    if (at[i] < 0 || (uint64_t)at[i] >= m->dims[i]) return 0;
    if (i > 0) element += at[i] * (long)m->stride_bytes[i - 1];
  }
  return element;
}
static inline void model_load(uint32_t dst, const fa_tma_map *map, uint32_t bar, int rank, int c0, int c1, int c2, int c3, int c4) {
  const model_map *m = (const model_map *)map;
  int c[5] = {c0, c1, c2, c3, c4};
  uint32_t rows = 1;
  if (dst % 1024 || m->rank != rank) {
    fprintf(stderr, "box of rank %d at %u\n", rank, dst);
    abort();
  }
  for (int i = 1; i < rank; i++) rows *= m->box[i];
  for (uint32_t row = 0; row < rows; row++)
    for (uint32_t column = 0; column < m->box[0]; column++) {
      char *from = model_element(m, c, (int)column, (int)row);
      uint16_t x = 0;
      if (from) memcpy(&x, from, 2);
      memcpy(shared + model_swizzle(dst + row * 128 + column * 2), &x, 2);
    }
  model_barrier *b = model_barrier_at(bar);
  b->bytes -= m->box[0] * rows * 2;
  model_barrier_check(b);
}
static inline void cp_async_bulk_tensor_load(uint32_t dst, const fa_tma_map *map, uint32_t bar, int c0, int c1, int c2, int c3) {
  model_load(dst, map, bar, 4, c0, c1, c2, c3, 0);
}
static inline void cp_async_bulk_tensor_load_5d(uint32_t dst, const fa_tma_map *map, uint32_t bar, int c0, int c1, int c2, int c3, int c4) {
  model_load(dst, map, bar, 5, c0, c1, c2, c3, c4);
}
static inline void cp_async_bulk_load(uint32_t dst, const void *src, int bytes, uint32_t bar) {
  if (dst % 16 || (uintptr_t)src % 16 || bytes % 16) abort();
  memcpy(shared + dst, src, (size_t)bytes);
  model_barrier *b = model_barrier_at(bar);
  b->bytes -= bytes;
  model_barrier_check(b);
}
static inline void prefetch_tensormap(const fa_tma_map *) {}
static inline void cp_async_bulk_prefetch_tensor(const fa_tma_map *, int, int, int, int) {}
static inline void cp_async_bulk_tensor_store(const fa_tma_map *map, uint32_t src, int c0, int c1, int c2, int c3) {
  const model_map *m = (const model_map *)map;
  int c[5] = {c0, c1, c2, c3, 0};
  for (uint32_t row = 0; row < m->box[1]; row++)
    for (uint32_t column = 0; column < m->box[0]; column++) {
      char *to = model_element(m, c, (int)column, (int)row);
      if (to) memcpy(to, shared + model_swizzle(src + row * 128 + column * 2), 2);
    }
}
static inline void cp_async_bulk_commit_group() {}
static inline void cp_async_bulk_wait_group_read() {}
static inline void cp_async_bulk_wait_group() {}
static inline void fence_proxy_async() {}
static inline void stmatrix_x4(uint32_t row_smem, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  const uint32_t r[4] = {r0, r1, r2, r3};
  int lane = model_lane();
  for (int i = 0; i < 4; i++) memcpy(shared + __shfl_sync(0xFFFFFFFFu, row_smem, 8 * i + lane / 4) + 4 * (lane % 4), &r[i], 4);
}
static inline void st_global_v4(void *dst, const uint32_t r[4]) {
  if ((uintptr_t)dst % 16) abort();
  memcpy(dst, r, 16);
}
static inline void st_global_v2(void *dst, uint32_t r0, uint32_t r1) {
  if ((uintptr_t)dst % 8) abort();
  memcpy(dst, &r0, 4), memcpy((char *)dst + 4, &r1, 4);
}
static inline int __float_as_int(float x) { return (int)__float_as_uint(x); }
static inline int laneid() { return model_lane(); }
static inline uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  uint64_t both = (uint64_t)b << 32 | a;
  uint32_t r = 0;
  for (int i = 0; i < 4; i++) {
    uint32_t wanted = selector >> (4 * i), byte = both >> (8 * (wanted & 7)) & 0xFF;
    r |= (wanted & 8 ? byte >> 7 ? 0xFFu : 0 : byte) << (8 * i);
  }
  return r;
}
static inline uint32_t max_u16x2(uint32_t a, uint32_t b) {
  uint32_t low = (a & 0xFFFF) > (b & 0xFFFF) ? a & 0xFFFF : b & 0xFFFF, high = a >> 16 > b >> 16 ? a >> 16 : b >> 16;
  return high << 16 | low;
}
static inline void st_shared_if_negative(uint32_t, float x) {
  if (x < 0) abort();
}
static inline void griddepcontrol_launch_dependents() {}
static inline void griddepcontrol_wait() {}
#define forget_origin(pointer) ((void)0)
#define setmaxnreg_dec(registers) ((void)0)
#define setmaxnreg_inc(registers) ((void)0)

static inline void wgmma_fence() {}
static inline void wgmma_commit_group() {}
#define wgmma_wait_group(pending) ((void)0)
static inline void wgmma_hold(float *, int) {}
static inline uint32_t wgmma_start(uint32_t address, int leading) { return address >> 4 | (uint32_t)(leading >> 4) << 16; }
static inline uint64_t wgmma_descriptor(uint32_t start, int offset) {
  return (uint64_t)(1u << 30 | 1024 >> 4) << 32 | (start + (uint32_t)(offset >> 4));
}

static inline float model_half(uint16_t x) { return DTYPE == 4 ? fa_from_bf16(x) : fa_from_f16(x); }
static inline float model_operand(uint64_t d, int transposed, int row, int k) {
  uint32_t start = (uint32_t)(d & 0x3FFF) << 4, lead = (uint32_t)(d >> 16 & 0x3FFF) << 4, stride = (uint32_t)(d >> 32 & 0x3FFF) << 4;
  uint32_t at =
      transposed ? start + row / 64 * lead + k / 8 * stride + k % 8 * 128 + row % 64 * 2 : start + row / 8 * stride + row % 8 * 128 + k * 2;
  uint16_t x;
  memcpy(&x, shared + model_swizzle(at), 2);
  return model_half(x);
}

struct model_group {
  int arrived, round;
  float *d[128];
  uint32_t a[128][4];
  uint64_t da, db;
  int accumulate;
};
static model_group model_groups[5];

static inline void model_wgmma(float *d, int n, const uint32_t *a, uint64_t da, uint64_t db, int accumulate, int ta, int tb) {
  int t = model_thread_index() % 128;
  model_group *g = &model_groups[model_thread_index() / 128];
  int round = g->round;
  if (g->arrived && (g->db != db || (!a && g->da != da) || g->accumulate != !!accumulate)) {
    fprintf(stderr, "wgmma operands differ\n");
    abort();
  }
  g->da = da, g->db = db, g->accumulate = !!accumulate, g->d[t] = d;
  if (a) memcpy(g->a[t], a, 16);
  if (++g->arrived < 128) {
    while (g->round == round) model_wait_a_little("wgmma");
    return;
  }
  static float A[64][16], B[256][16];
  for (int row = 0; row < 64; row++)
    for (int k = 0; k < 16; k++) {
      if (a) {
        int lane = row % 8 * 4 + k % 8 / 2, i = (row % 16 >= 8) + 2 * (k >= 8);
        uint32_t w = g->a[row / 16 * 32 + lane][i];
        A[row][k] = model_half((uint16_t)(k % 2 ? w >> 16 : w));
      } else
        A[row][k] = model_operand(da, ta, row, k);
    }
  for (int c = 0; c < n; c++)
    for (int k = 0; k < 16; k++) B[c][k] = model_operand(db, tb, c, k);
  for (int u = 0; u < 128; u++)
    for (int i = 0; i < n / 2; i++) {
      int row = u / 32 * 16 + u % 32 / 4 + 8 * (i >> 1 & 1), c = i / 4 * 8 + u % 4 * 2 + (i & 1);
      float x = accumulate ? g->d[u][i] : 0.0f;
      for (int k = 0; k < 16; k++) x += A[row][k] * B[c][k];
      g->d[u][i] = x;
    }
  g->arrived = 0;
  g->round++;
}
#define DEFINE_WGMMA_SS(name, n, ta, tb) \
  static inline void name(float *d, uint64_t a, uint64_t b, int accumulate) { model_wgmma(d, n, 0, a, b, accumulate, ta, tb); }
#define DEFINE_WGMMA_RS(name, n, tb) \
  static inline void name(float *d, const uint32_t *a, uint64_t b, int accumulate) { model_wgmma(d, n, a, 0, b, accumulate, 0, tb); }

#endif
