/* cpuid.c: cpuid tells what the processor can do, xgetbv which registers the system saves on a task switch. Both must agree. */
#define _GNU_SOURCE /* syscall */
#include "cpuid.h"

#include <stdatomic.h>

#if defined(__x86_64__)
#include <cpuid.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

typedef struct {
  uint32_t a, b, c, d;
} registers;

static registers leaf(uint32_t number, uint32_t part) {
  registers r = {0, 0, 0, 0};
  __get_cpuid_count(number, part, &r.a, &r.b, &r.c, &r.d);
  return r;
}

static int all_set(uint64_t value, uint64_t bits) { return (value & bits) == bits; }

#define BIT(n) (UINT64_C(1) << (n))

/* Register state that the system saves: 0 where it does not use xsave at all. */
static uint64_t saved_state(registers basic) {
  uint32_t low, high;
  if (!all_set(basic.c, BIT(27))) return 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t)high << 32 | low;
}

/* Tiles make a thread's saved state larger by 8 KB, so the kernel hands them out on request only: for the whole process, and children keep
 * them. It refuses when some thread's signal stack is too small for that state. */
static int may_use_tiles(void) {
  enum { ARCH_REQ_XCOMP_PERM = 0x1023, TILE_DATA = 18 };
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0;
}

static unsigned detect(void) {
  const uint64_t ymm = BIT(1) | BIT(2), zmm = ymm | BIT(5) | BIT(6) | BIT(7), tiles = BIT(17) | BIT(18);
  registers basic = leaf(1, 0), extended = leaf(7, 0), more = leaf(7, 1);
  uint64_t saved = saved_state(basic);
  unsigned found = 1u << FA_CPU_ANY;

  int avx2 = all_set(saved, ymm) && all_set(basic.c, BIT(12) | BIT(28) | BIT(29)) /* FMA, AVX, F16C */ && all_set(extended.b, BIT(5));
  int avx512 = avx2 && all_set(saved, zmm) && all_set(extended.b, BIT(16) | BIT(17) | BIT(30) | BIT(31)); /* F, DQ, BW, VL */
  int amx = avx512 && all_set(saved, tiles) && all_set(extended.d, BIT(22) | BIT(24)) /* bf16, tile */ &&
            all_set(more.a, BIT(5)) /* AVX512_BF16 */;
  if (avx2) found |= 1u << FA_CPU_AVX2;
  if (avx512) found |= 1u << FA_CPU_AVX512;
  if (amx && may_use_tiles()) found |= 1u << FA_CPU_AMX;
  return found;
}
#else
static unsigned detect(void) { return 1u << FA_CPU_ANY; }
#endif

int fa_cpu_has(fa_cpu_feature feature) {
  static atomic_uint known; /* 0: not asked yet. Two threads may both ask; they find the same. */
  unsigned found = atomic_load_explicit(&known, memory_order_relaxed);
  if (!found) {
    found = detect();
    atomic_store_explicit(&known, found, memory_order_relaxed);
  }
  return (int)(found >> feature & 1u);
}
