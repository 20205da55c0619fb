/* tier_memory.h: between tiles and the tensors: any dtype and strides. Part of tier_types.h. */

ALWAYS_INLINE REAL FN(get)(const void *src, fa_dtype dtype, int64_t index) {
  if (dtype == FA_F32) return (REAL)((const float *)src)[index];
  if (dtype == FA_F64) return (REAL)((const double *)src)[index];
  if (dtype == FA_BF16) return fa_from_bf16(((const uint16_t *)src)[index]);
  return fa_from_f16(((const uint16_t *)src)[index]);
}

ALWAYS_INLINE void FN(put)(void *dst, fa_dtype dtype, int64_t index, REAL x) {
  if (dtype == FA_F32) ((float *)dst)[index] = (float)x;
  if (dtype == FA_F64) ((double *)dst)[index] = (double)x;
  if (dtype == FA_BF16) ((uint16_t *)dst)[index] = fa_to_bf16((float)x);
  if (dtype == FA_F16) ((uint16_t *)dst)[index] = fa_to_f16((float)x);
}

/* dtype and stride are constants after inlining, so the loop vectorises. */
ALWAYS_INLINE void FN(get_row)(REAL *restrict dst, const void *src, const fa_dtype dtype, int64_t start, const int64_t stride, int count) {
  for (int i = 0; i < count; i++) dst[i] = FN(get)(src, dtype, start + i * stride);
}

/* float16 goes through the tier's own conversion as far as that reaches. */
static void FN(load_row)(REAL *dst, const void *src, fa_dtype dtype, int64_t start, int64_t stride, int count) {
  if (stride != 1) {
    FN(get_row)(dst, src, dtype, start, stride, count);
    return;
  }
  switch (dtype) {
    case FA_F32: FN(get_row)(dst, src, FA_F32, start, 1, count); break;
    case FA_F64: FN(get_row)(dst, src, FA_F64, start, 1, count); break;
    case FA_BF16: FN(get_row)(dst, src, FA_BF16, start, 1, count); break;
    default: {
      int done = REAL_BITS == 32 ? load_halves(dst, (const uint16_t *)src + start, count) : 0;
      FN(get_row)(dst + done, src, FA_F16, start + done, 1, count - done);
    }
  }
}

static void FN(load)(void *dst, int ld, const void *src, fa_dtype dtype, int64_t row_stride, int64_t column_stride, int rows, int columns) {
  for (int r = 0; r < rows; r++) {
    REAL *row = (REAL *)dst + (ptrdiff_t)r * ld;
    FN(load_row)(row, src, dtype, r * row_stride, column_stride, columns);
    for (int c = columns; c < ld; c++) row[c] = 0;
  }
}

/* EDGE rows at a time: dense rows of the tile's own type as they lie, others converted along rows into a buffer first. */
static void FN(load_transposed)(void *dst, int ld, const void *src, fa_dtype dtype, int64_t row_stride, int64_t column_stride, int rows,
                                int columns) {
  enum { EDGE = FN(EDGE) };
  REAL buffer[EDGE * FA_MAX_HEAD_DIM];
  int dense = dtype == (REAL_BITS == 32 ? FA_F32 : FA_F64) && column_stride == 1;
  for (int r = 0; r < ld; r += EDGE) {
    const REAL *from = buffer;
    ptrdiff_t from_row = FA_MAX_HEAD_DIM;
    REAL *to = (REAL *)dst + r;
    int c = 0;
    if (dense && r + EDGE <= rows) {
      from = (const REAL *)src + r * row_stride;
      from_row = (ptrdiff_t)row_stride;
    } else {
      for (int i = 0; i < EDGE; i++) {
        REAL *row = buffer + i * FA_MAX_HEAD_DIM;
        if (r + i < rows)
          FN(load_row)(row, src, dtype, (r + i) * row_stride, column_stride, columns);
        else
          memset(row, 0, (size_t)columns * sizeof(REAL));
      }
    }
    for (; c + EDGE <= columns; c += EDGE) FN(TRANSPOSE)(from + c, from_row, to + (ptrdiff_t)c * ld, ld);
    for (; c < columns; c++)
      for (int i = 0; i < EDGE; i++) to[(ptrdiff_t)c * ld + i] = from[i * from_row + c];
  }
}

ALWAYS_INLINE void FN(put_row)(void *restrict dst, const fa_dtype dtype, int64_t start, const int64_t stride, const REAL *restrict src,
                               REAL scale, int count) {
  for (int i = 0; i < count; i++) FN(put)(dst, dtype, start + i * stride, src[i] * scale);
}

static void FN(store)(void *dst, fa_dtype dtype, int64_t row_stride, int64_t column_stride, const void *src, int ld, int rows, int columns,
                      const double *row_scale) {
  for (int r = 0; r < rows; r++) {
    const REAL *row = (const REAL *)src + (ptrdiff_t)r * ld;
    REAL scale = row_scale ? (REAL)row_scale[r] : 1;
    int64_t start = r * row_stride;
    if (column_stride != 1)
      FN(put_row)(dst, dtype, start, column_stride, row, scale, columns);
    else if (dtype == FA_F32)
      FN(put_row)(dst, FA_F32, start, 1, row, scale, columns);
    else if (dtype == FA_BF16)
      FN(put_row)(dst, FA_BF16, start, 1, row, scale, columns);
    else if (dtype == FA_F16) {
      int done = REAL_BITS == 32 ? store_halves((uint16_t *)dst + start, row, (float)scale, columns) : 0;
      FN(put_row)(dst, FA_F16, start + done, 1, row + done, scale, columns - done);
    } else
      FN(put_row)(dst, FA_F64, start, 1, row, scale, columns);
  }
}
