/* amx_emulated.h: csrc/cpu/amx_target.h in plain C, so that the AMX passes run on any machine: build them with this file before each of
 * them (-include), which then leaves that header out. Slow, and exact where the instructions are. */
#ifndef FA_AMX_TARGET_H
#define FA_AMX_TARGET_H
#define FA_AMX_EMULATED

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "csrc/core/numeric.h"

#define AMX_BEGIN
#define AMX_END
#define AMX_INLINE static inline /* left to the compiler: it is done sooner */

typedef struct {
  _Alignas(64) float lane[16];
} f32x16;

typedef struct {
  _Alignas(64) uint32_t lane[16];
} i32x16;

static _Thread_local struct {
  int configured;
  char tile[8][1024];
} amx_unit;

static inline void amx_tile_load(int t, const char *base, int64_t stride) {
  if (!amx_unit.configured) __builtin_trap();
  for (int r = 0; r < 16; r++) memcpy(amx_unit.tile[t] + r * 64, base + r * stride, 64);
}

static inline void amx_tile_store(int t, char *base, int64_t stride) {
  for (int r = 0; r < 16; r++) memcpy(base + r * stride, amx_unit.tile[t] + r * 64, 64);
}

/* Denormal operands count as 0, like there. */
static inline float amx_operand(const uint16_t *x) { return (*x & 0x7F80u) == 0 ? 0.0f : fa_from_bf16(*x); }

static inline void amx_tile_product(int c, int a, int b) {
  float wide[2][16][16];
  for (int k = 0; k < 16; k++)
    for (int n = 0; n < 16; n++)
      for (int i = 0; i < 2; i++) wide[i][k][n] = amx_operand((uint16_t *)amx_unit.tile[b] + k * 32 + n * 2 + i);
  for (int m = 0; m < 16; m++)
    for (int k = 0; k < 16; k++)
      for (int i = 0; i < 2; i++) {
        float left = amx_operand((uint16_t *)amx_unit.tile[a] + m * 32 + k * 2 + i);
        for (int n = 0; n < 16; n++) ((float *)amx_unit.tile[c])[m * 16 + n] += left * wide[i][k][n];
      }
}

#define TILE_ZERO(t) memset(amx_unit.tile[t], 0, 1024)
#define TILE_LOAD(t, base, stride) amx_tile_load(t, (const char *)(base), stride)
#define TILE_STORE(t, base, stride) amx_tile_store(t, (char *)(base), stride)
#define TILE_PRODUCT(c, a, b) amx_tile_product(c, a, b)

static inline void tiles_begin(void) { amx_unit.configured = 1; }
static inline void tiles_end(void) { amx_unit.configured = 0; }

#define EACH_LANE(expression)                            \
  f32x16 y;                                              \
  for (int i = 0; i < 16; i++) y.lane[i] = (expression); \
  return y

static inline f32x16 f32_load(const float *p) { EACH_LANE(p[i]); }
static inline void f32_store(float *p, f32x16 x) { memcpy(p, x.lane, sizeof x); }
static inline f32x16 f32_splat(float x) { EACH_LANE(x); }
static inline f32x16 f32_add(f32x16 a, f32x16 b) { EACH_LANE(a.lane[i] + b.lane[i]); }
static inline f32x16 f32_sub(f32x16 a, f32x16 b) { EACH_LANE(a.lane[i] - b.lane[i]); }
static inline f32x16 f32_mul(f32x16 a, f32x16 b) { EACH_LANE(a.lane[i] * b.lane[i]); }
static inline f32x16 f32_fma(f32x16 a, f32x16 b, f32x16 c) { EACH_LANE((float)((double)a.lane[i] * b.lane[i] + c.lane[i])); }
static inline f32x16 f32_max(f32x16 x, f32x16 best) { EACH_LANE(x.lane[i] > best.lane[i] ? x.lane[i] : best.lane[i]); }
static inline f32x16 f32_where_nonzero(f32x16 p, f32x16 x) { EACH_LANE(p.lane[i] != 0 ? x.lane[i] : 0); }
static inline f32x16 f32_where_greater(f32x16 a, f32x16 b, f32x16 x, f32x16 otherwise) {
  EACH_LANE(a.lane[i] > b.lane[i] ? x.lane[i] : otherwise.lane[i]);
}
static inline f32x16 f32_finite_or_zero(f32x16 x) { EACH_LANE(isfinite(x.lane[i]) ? x.lane[i] : 0); }
static inline f32x16 f32_where_inside(f32x16 x, const int32_t *lo, const int32_t *hi, int at) {
  EACH_LANE(lo[i] <= at && at < hi[i] ? x.lane[i] : -INFINITY);
}
static inline f32x16 f32_exp2(f32x16 x) { EACH_LANE(exp2f(x.lane[i])); }

static inline int f32_any_greater(f32x16 a, f32x16 b) {
  int any = 0;
  for (int i = 0; i < 16; i++) any |= a.lane[i] > b.lane[i];
  return any;
}

static inline i32x16 i32_load(const void *p) {
  i32x16 x;
  memcpy(&x, p, sizeof x);
  return x;
}

static inline void i32_store(void *p, i32x16 x) { memcpy(p, &x, sizeof x); }

static inline i32x16 amx_join(const uint16_t *halves) { return i32_load(halves); }

static inline i32x16 bf16_rows(f32x16 low, f32x16 high) {
  uint16_t halves[32];
  for (int i = 0; i < 16; i++) {
    halves[i] = fa_to_bf16(low.lane[i]);
    halves[16 + i] = fa_to_bf16(high.lane[i]);
  }
  return amx_join(halves);
}

static inline i32x16 bf16_pairs(f32x16 even, f32x16 odd) {
  uint16_t halves[32];
  for (int i = 0; i < 16; i++) {
    halves[2 * i] = fa_to_bf16(even.lane[i]);
    halves[2 * i + 1] = fa_to_bf16(odd.lane[i]);
  }
  return amx_join(halves);
}

static inline f32x16 bf16_even(i32x16 pairs) { EACH_LANE(fa_float(pairs.lane[i] << 16)); }
static inline f32x16 bf16_odd(i32x16 pairs) { EACH_LANE(fa_float(pairs.lane[i] & 0xFFFF0000u)); }

static inline f32x16 bf16_dot(f32x16 sum, i32x16 a, i32x16 b) {
  for (int i = 0; i < 16; i++) sum.lane[i] += bf16_even(a).lane[i] * bf16_even(b).lane[i] + bf16_odd(a).lane[i] * bf16_odd(b).lane[i];
  return sum;
}

static inline i32x16 bf16_larger(i32x16 a, i32x16 largest) {
  for (int i = 0; i < 16; i++) {
    uint32_t low = a.lane[i] & 0x7FFFu, high = a.lane[i] & 0x7FFF0000u;
    uint32_t least = largest.lane[i] & 0xFFFFu, most = largest.lane[i] & 0xFFFF0000u;
    largest.lane[i] = (low > least ? low : least) | (high > most ? high : most);
  }
  return largest;
}

static inline i32x16 i16_interleave(const uint16_t *a, const uint16_t *b) {
  i32x16 x;
  for (int i = 0; i < 16; i++) x.lane[i] = a[i] | (uint32_t)b[i] << 16;
  return x;
}

static inline void i32_transpose(i32x16 r[16]) {
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < i; j++) {
      uint32_t kept = r[i].lane[j];
      r[i].lane[j] = r[j].lane[i];
      r[j].lane[i] = kept;
    }
}

#endif
