/* simd_plain.h: what a tier does with its own instructions, in plain C: for tiers with none. Each simd_*.h defines the same names:
 *
 *     MAX_t(a, b)             lanewise maximum, b where a is NaN            MIN_t(a, b)
 *     MAX_LANES_t(v)          over the lanes of one vector                  SUM_LANES_t(v)
 *     sum_four_t(v, out)      out[i] = the sum over the lanes of v[i], for i < 4
 *     WIDEN_BF16, WIDEN_F16   a vector of floats from 16-bit elements
 *     EDGE_t, TRANSPOSE_t     dst[c][r] = src[r][c] for a square of EDGE
 *     HALVES, LOAD_HALVES, STORE_HALVES     that many float16 <-> float in one go; 0: none
 *
 * with t = f32 and f64. */
#define MAX_f32(a, b) select_f32((ivec_f32)((a) > (b)), a, b)
#define MAX_f64(a, b) select_f64((ivec_f64)((a) > (b)), a, b)
#define MIN_f32(a, b) select_f32((ivec_f32)((a) < (b)), a, b)
#define MIN_f64(a, b) select_f64((ivec_f64)((a) < (b)), a, b)

#define PLAIN_LANES(suffix, real, lanes)                                                                    \
  static inline real max_lanes_##suffix(vec_##suffix v) {                                                   \
    real best = v[0];                                                                                       \
    for (int i = 1; i < (lanes); i++) best = v[i] > best ? v[i] : best;                                     \
    return best;                                                                                            \
  }                                                                                                         \
  static inline real sum_lanes_##suffix(vec_##suffix v) {                                                   \
    real sum = 0;                                                                                           \
    for (int i = 0; i < (lanes); i++) sum += v[i];                                                          \
    return sum;                                                                                             \
  }                                                                                                         \
  static inline void sum_four_##suffix(const vec_##suffix *v, real *out) {                                  \
    for (int i = 0; i < 4; i++) out[i] = sum_lanes_##suffix(v[i]);                                          \
  }                                                                                                         \
  static inline void transpose_##suffix(const real *src, ptrdiff_t src_row, real *dst, ptrdiff_t dst_row) { \
    for (int c = 0; c < 4; c++)                                                                             \
      for (int r = 0; r < 4; r++) dst[c * dst_row + r] = src[r * src_row + c];                              \
  }
PLAIN_LANES(f32, float, VECTOR_BYTES / 4)
PLAIN_LANES(f64, double, VECTOR_BYTES / 8)

#define MAX_LANES_f32 max_lanes_f32
#define MAX_LANES_f64 max_lanes_f64
#define SUM_LANES_f32 sum_lanes_f32
#define SUM_LANES_f64 sum_lanes_f64

#define EDGE_f32 4
#define EDGE_f64 4
#define TRANSPOSE_f32 transpose_f32
#define TRANSPOSE_f64 transpose_f64

static inline vec_f32 widen_bf16(const uint16_t *src) {
  vec_f32 wide = {0};
  for (int i = 0; i < VECTOR_BYTES / 4; i++) wide[i] = fa_from_bf16(src[i]);
  return wide;
}

static inline vec_f32 widen_f16(const uint16_t *src) {
  vec_f32 wide = {0};
  for (int i = 0; i < VECTOR_BYTES / 4; i++) wide[i] = fa_from_f16(src[i]);
  return wide;
}

#define WIDEN_BF16 widen_bf16
#define WIDEN_F16 widen_f16

#define HALVES 0
#define LOAD_HALVES(dst, src) ((void)0)
#define STORE_HALVES(dst, src) ((void)(src))
