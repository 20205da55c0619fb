/* tier_rows.h: what is done to scores and gradients row by row, and the table of a tier. Part of tier_types.h. */

/* x - x is 0 for a finite x and NaN else, and NaN survives the sum. */
static int FN(all_finite)(const void *tile, int64_t count) {
  VEC sum = {0};
  for (int64_t i = 0; i < count; i += LANES) sum += LOAD((const REAL *)tile + i) - LOAD((const REAL *)tile + i);
  for (int i = 0; i < LANES; i++)
    if (sum[i] != 0) return 0;
  return 1;
}

/* tanh(x) = sign(x) (1 - e) / (1 + e) with e = exp(-2|x|); near 0 by its series, since 1 - e cancels there and a large cap multiplies what is
 * left. */
ALWAYS_INLINE VEC FN(tanh)(VEC x) {
  IVEC sign = (IVEC)x & (IVEC)FN(splat)((REAL)-0.0);
  VEC magnitude = (VEC)((IVEC)x ^ sign);
  VEC e = FN(exp2)(magnitude * FN(splat)((REAL)-2.8853900817779268));
  VEC one = FN(splat)(1), square = x * x;
  VEC series = FN(splat)((REAL)(62.0 / 2835)) + square * FN(splat)((REAL)(-1382.0 / 155925));
  series = FN(splat)((REAL)(2.0 / 15)) + square * (FN(splat)((REAL)(-17.0 / 315)) + square * series);
  series = x * (one + square * (FN(splat)((REAL)(-1.0 / 3)) + square * series));
  IVEC small = (IVEC)(magnitude < FN(splat)((REAL)0.05)), large = (IVEC)((one - e) / (one + e)) | sign;
  return (VEC)((small & (IVEC)series) | (~small & large));
}

static void FN(softcap)(REAL *s, int count, REAL scale, REAL cap, REAL *factor) {
  VEC inner = FN(splat)(scale / cap);
  for (int i = 0; i < count; i += LANES) {
    VEC t = FN(tanh)(LOAD(s + i) * inner);
    STORE(s + i, t * FN(splat)(cap));
    if (factor) STORE(factor + i, FN(splat)(1) - t * t);
  }
}

static void FN(score_row)(const fa_score_row *row, void *scores, int count, void *softcap_factor) {
  REAL *s = scores, *factor = softcap_factor;
  if (row->softcap > 0)
    FN(softcap)(s, count, (REAL)row->scale, (REAL)row->softcap, factor);
  else if (row->scale != 1)
    for (int i = 0; i < count; i++) s[i] *= (REAL)row->scale;
  if (row->slope != 0)
    for (int i = 0; i < count; i++) s[i] -= (REAL)row->slope * (REAL)abs(row->diagonal - i);
  if (row->bias && row->lo < row->hi) {
    REAL bias[FA_BLOCK_N];
    FN(load_row)(bias, row->bias, row->bias_dtype, row->lo * row->bias_stride, row->bias_stride, row->hi - row->lo);
    for (int i = row->lo; i < row->hi; i++) s[i] += bias[i - row->lo];
  }
  if (row->mask)
    for (int i = row->lo; i < row->hi; i++) s[i] = row->mask[i * row->mask_stride] ? s[i] : -(REAL)INFINITY;
  for (int i = 0; i < row->lo && i < count; i++) s[i] = -(REAL)INFINITY;
  for (int i = row->hi > 0 ? row->hi : 0; i < count; i++) s[i] = -(REAL)INFINITY;
  if (row->softcap > 0 && factor) /* an invisible product may be NaN */
    for (int i = 0; i < count; i++) factor[i] = s[i] == -(REAL)INFINITY ? 0 : factor[i];
}

static double FN(row_max)(const void *s, int count) { return (double)FN(largest)(s, count); }

/* Summed in double: delta's error enters every gradient of its row with one sign. */
static double FN(dot_row)(const void *a, const void *b, int count) {
  double sum[4] = {0, 0, 0, 0};
  for (int i = 0; i < count; i += 4)
    for (int c = 0; c < 4; c++) sum[c] += (double)((const REAL *)a)[i + c] * (double)((const REAL *)b)[i + c];
  return sum[0] + sum[1] + (sum[2] + sum[3]);
}

static void FN(multiply_row)(void *out, const void *a, const void *b, int count) {
  for (int i = 0; i < count; i += LANES) STORE((REAL *)out + i, LOAD((const REAL *)a + i) * LOAD((const REAL *)b + i));
}

/* Tiles start at multiples of 64 keys, so a block of four words never straddles two tiles. */
static void FN(dropout_row)(const fa_dropout_row *row, void *multiplier, int count) {
  for (int i = 0; i < count; i += 4) {
    fa_philox_block words = fa_dropout_words(row->key, row->b, row->h, row->i, (row->first_column + i) >> 2);
    for (int c = 0; c < 4; c++) ((REAL *)multiplier)[i + c] = words.word[c] < row->threshold ? 0 : (REAL)row->keep_scale;
  }
}

static void FN(signs_row)(void *s, const void *multiplier, int count) {
  for (int i = 0; i < count; i++) ((REAL *)s)[i] = ((const REAL *)multiplier)[i] == 0 ? -((REAL *)s)[i] : ((REAL *)s)[i];
}

static double FN(distance_sum)(const void *ds, int count, int diagonal) {
  double sum = 0;
  for (int i = 0; i < count; i++) sum += (double)((const REAL *)ds)[i] * abs(diagonal - i);
  return sum;
}

static void FN(add_row)(void *out, const void *in, int count) {
  for (int i = 0; i < count; i += LANES) STORE((REAL *)out + i, LOAD((REAL *)out + i) + LOAD((const REAL *)in + i));
}

static double FN(row_sum)(const void *s, int count) {
  double sum[4] = {0, 0, 0, 0};
  for (int i = 0; i < count; i += 4)
    for (int c = 0; c < 4; c++) sum[c] += (double)((const REAL *)s)[i + c];
  return sum[0] + sum[1] + (sum[2] + sum[3]);
}

static const fa_tile_ops FN(ops) = {
    .real_bytes = REAL_BITS / 8,
    .gemm = FN(gemm),
    .gemm_skipping_zeros = FN(gemm_skipping_zeros),
    .dots = FN(dots),
    .few = FN(few),
    .load = FN(load),
    .load_transposed = FN(load_transposed),
    .store = FN(store),
    .all_finite = FN(all_finite),
    .softmax_tile = FN(softmax_tile),
    .weights_tile = FN(weights_tile),
    .gradient_tile = FN(gradient_tile),
    .score_row = FN(score_row),
    .row_max = FN(row_max),
    .scale_row = FN(scale_row),
    .dot_row = FN(dot_row),
    .multiply_row = FN(multiply_row),
    .dropout_row = FN(dropout_row),
    .signs_row = FN(signs_row),
    .distance_sum = FN(distance_sum),
    .add_row = FN(add_row),
    .row_sum = FN(row_sum),
};
