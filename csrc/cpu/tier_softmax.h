/* tier_softmax.h: exponentials of whole tiles. Part of tier_types.h. A tile's rows are FA_BLOCK_LD elements apart. */

/* 2^x = 2^n * 2^r with n = round(x). Adding EXP2_MAGIC puts n plus the exponent's bias into the low bits of the sum, from where a shift
 * makes it a factor: 0 for n = EXP2_LOW, so what lies below vanishes exactly. x is at most EXP2_HIGH. NaN stays NaN. */
ALWAYS_INLINE VEC FN(exp2)(VEC x) {
  static const REAL coefficient[] = {EXP2_COEFFICIENTS};
  const int degree = sizeof coefficient / sizeof coefficient[0] - 1;
  x = FN(MAX)(FN(splat)(EXP2_LOW), x);
  VEC shifted = x + FN(splat)(EXP2_MAGIC);
  VEC r = x - (shifted - FN(splat)(EXP2_MAGIC));
  VEC sum = FN(splat)(coefficient[degree]);
  for (int i = degree - 1; i >= 0; i--) sum = sum * r + FN(splat)(coefficient[i]);
  return sum * (VEC)((IVEC)shifted << MANTISSA_BITS);
}

/* NaN is not a maximum; it comes through in the exponentials. */
ALWAYS_INLINE REAL FN(largest)(const REAL *s, int count) {
  VEC best = FN(splat)(-(REAL)INFINITY);
  for (int i = 0; i < count; i += LANES) best = FN(MAX)(LOAD(s + i), best);
  return FN(MAX_LANES)(best);
}

static void FN(scale_row)(void *s, int count, double factor) {
  for (int i = 0; i < count; i++) ((REAL *)s)[i] *= (REAL)factor;
}

/* Sums and outputs are kept relative to 2^shift. The shift follows a row's maximum only when that has grown by more than RESCALE_LOG2,
 * which after the first tiles is rare; until then exponentials grow to at most 2^RESCALE_LOG2. A row that has seen nothing yet has shift -inf. */
enum { FN(RESCALE_LOG2) = 8 };

ALWAYS_INLINE void FN(raise_shift)(double top, double *shift, double *sum, REAL *out, int out_count) {
  double shrink = exp2(*shift - top);
  *sum *= shrink;
  FN(scale_row)(out, out_count, shrink);
  *shift = top;
}

static void FN(softmax_tile)(int rows, int count, void *scores, double to_log2, double *shift, double *sum, void *out, int out_ld) {
  REAL *s = scores, factor = (REAL)to_log2;
  for (int r = 0; r < rows; r++) {
    double top = (double)(REAL)((double)FN(largest)(s + r * FA_BLOCK_LD, count) * (double)factor);
    if (top > shift[r] + FN(RESCALE_LOG2)) FN(raise_shift)(top, shift + r, sum + r, (REAL *)out + (ptrdiff_t)r * out_ld, out_ld);
  }
  for (int r = 0; r < rows; r++) {
    REAL *row = s + r * FA_BLOCK_LD;
    VEC total = {0}, origin = FN(splat)(shift[r] == -INFINITY ? 0 : (REAL)shift[r]);
    for (int i = 0; i < count; i += LANES) {
      VEC p = FN(exp2)(LOAD(row + i) * FN(splat)(factor) - origin);
      STORE(row + i, p);
      total += p;
    }
    sum[r] += (double)FN(SUM_LANES)(total);
  }
}

/* The shift in two parts: rounded to one, it would put one error on a whole row. */
ALWAYS_INLINE VEC FN(weights_row)(REAL *row, int count, REAL factor, double shift) {
  VEC high = FN(splat)((REAL)shift), low = FN(splat)((REAL)(shift - (double)(REAL)shift)), total = {0};
  for (int i = 0; i < count; i += LANES) {
    VEC x = (LOAD(row + i) * FN(splat)(factor) - high) - low;
    VEC p = FN(exp2)(FN(MIN)(FN(splat)(EXP2_HIGH), x));
    STORE(row + i, p);
    total += p;
  }
  return total;
}

static void FN(weights_tile)(int rows, int count, void *scores, double to_log2, const double *shift, double *sum) {
  for (int r = 0; r < rows; r++) {
    REAL *row = (REAL *)scores + r * FA_BLOCK_LD;
    VEC total = {0};
    if (shift[r] == INFINITY)
      memset(row, 0, (size_t)count * sizeof(REAL));
    else
      total = FN(weights_row)(row, count, (REAL)to_log2, shift[r]);
    if (sum) sum[r] = (double)FN(SUM_LANES)(total);
  }
}

/* delta in two parts, for the same reason. */
static void FN(gradient_tile)(int rows, int count, void *ds, const void *p, const double *delta) {
  for (int r = 0; r < rows; r++) {
    REAL *gradient = (REAL *)ds + r * FA_BLOCK_LD;
    const REAL *weight = (const REAL *)p + r * FA_BLOCK_LD;
    VEC high = FN(splat)((REAL)delta[r]), low = FN(splat)((REAL)(delta[r] - (double)(REAL)delta[r]));
    for (int i = 0; i < count; i += LANES) {
      VEC w = LOAD(weight + i), product = w * ((LOAD(gradient + i) - high) - low);
      STORE(gradient + i, (VEC)((IVEC)product & (IVEC)(w != (VEC){0})));
    }
  }
}
