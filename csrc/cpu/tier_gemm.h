/* tier_gemm.h: products of tiles. Part of tier_types.h, which says for which element type and vector. */

#define MOST_VECTORS 4

/* A rows x vectors block of c stays in registers while k runs: GEMM_ROWS * GEMM_VECTORS accumulators, GEMM_VECTORS of b, one of a. */
ALWAYS_INLINE void FN(gemm_block)(const int rows, const int vectors, const fa_dtype b_dtype, int k, const REAL *a, ptrdiff_t a_row,
                                  ptrdiff_t a_col, const void *b, ptrdiff_t b_row, REAL *c, ptrdiff_t c_row, int accumulate) {
  VEC sum[GEMM_ROWS][MOST_VECTORS];
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < vectors; v++) sum[r][v] = accumulate ? LOAD(c + r * c_row + v * LANES) : (VEC){0};
  for (int i = 0; i < k; i++) {
    VEC b_vec[MOST_VECTORS];
    for (int v = 0; v < vectors; v++) b_vec[v] = FN(load_as)(b, b_dtype, i * b_row + v * LANES);
    for (int r = 0; r < rows; r++) {
      VEC a_vec = FN(splat)(a[r * a_row + i * a_col]);
      for (int v = 0; v < vectors; v++) sum[r][v] += a_vec * b_vec[v];
    }
  }
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < vectors; v++) STORE(c + r * c_row + v * LANES, sum[r][v]);
}

/* All row blocks against one panel of b, which is small enough to stay in L1. The last rows go in blocks of 4, which still hide the latency
 * of an addition where blocks of 2 would not. */
ALWAYS_INLINE void FN(gemm_panel)(const int vectors, int m, int k, const REAL *a, ptrdiff_t a_row, ptrdiff_t a_col, const REAL *b,
                                  ptrdiff_t b_row, REAL *c, ptrdiff_t c_row, int accumulate) {
  int i = 0;
  for (; m - i >= GEMM_ROWS + 4 || m - i == GEMM_ROWS; i += GEMM_ROWS)
    FN(gemm_block)(GEMM_ROWS, vectors, REAL_DTYPE, k, a + i * a_row, a_row, a_col, b, b_row, c + i * c_row, c_row, accumulate);
  for (; i + 4 <= m; i += 4)
    FN(gemm_block)(4, vectors, REAL_DTYPE, k, a + i * a_row, a_row, a_col, b, b_row, c + i * c_row, c_row, accumulate);
  for (; i + 2 <= m; i += 2)
    FN(gemm_block)(2, vectors, REAL_DTYPE, k, a + i * a_row, a_row, a_col, b, b_row, c + i * c_row, c_row, accumulate);
  if (i < m) FN(gemm_block)(1, vectors, REAL_DTYPE, k, a + i * a_row, a_row, a_col, b, b_row, c + i * c_row, c_row, accumulate);
}

static void FN(gemm)(int m, int n, int k, const void *a, ptrdiff_t a_row, ptrdiff_t a_col, const void *b, ptrdiff_t b_row, void *c,
                     ptrdiff_t c_row, int accumulate) {
  const REAL *b_real = b;
  REAL *c_real = c;
  int j = 0;
  for (; j + GEMM_VECTORS * LANES <= n; j += GEMM_VECTORS * LANES)
    FN(gemm_panel)(GEMM_VECTORS, m, k, a, a_row, a_col, b_real + j, b_row, c_real + j, c_row, accumulate);
  for (; GEMM_VECTORS > 2 && j + 2 * LANES <= n; j += 2 * LANES)
    FN(gemm_panel)(2, m, k, a, a_row, a_col, b_real + j, b_row, c_real + j, c_row, accumulate);
  for (; j < n; j += LANES) FN(gemm_panel)(1, m, k, a, a_row, a_col, b_real + j, b_row, c_real + j, c_row, accumulate);
}

static void FN(gemm_skipping_zeros)(int m, int n, int k, const void *a, ptrdiff_t a_row, ptrdiff_t a_col, const void *b, ptrdiff_t b_row,
                                    void *c, ptrdiff_t c_row) {
  for (int r = 0; r < m; r++)
    for (int i = 0; i < k; i++) {
      REAL coefficient = ((const REAL *)a)[r * a_row + i * a_col];
      if (coefficient == 0) continue;
      for (int j = 0; j < n; j++) ((REAL *)c)[r * c_row + j] += coefficient * ((const REAL *)b)[i * b_row + j];
    }
}

/* The same for few rows of a and a b of a narrower type, which is read once, as it lies. */
ALWAYS_INLINE void FN(few_rows)(const int rows, const int vectors, const fa_dtype b_dtype, int n, int k, const REAL *a, ptrdiff_t a_row,
                                const char *b, ptrdiff_t b_row, REAL *c, ptrdiff_t c_row) {
  int j = 0;
  for (; j + vectors * LANES <= n; j += vectors * LANES)
    FN(gemm_block)(rows, vectors, b_dtype, k, a, a_row, 1, b + j * fa_dtype_bytes(b_dtype), b_row, c + j, c_row, 1);
  for (; j < n; j += LANES) FN(gemm_block)(rows, 1, b_dtype, k, a, a_row, 1, b + j * fa_dtype_bytes(b_dtype), b_row, c + j, c_row, 1);
}

ALWAYS_INLINE void FN(few_of)(const fa_dtype b_dtype, int m, int n, int k, const REAL *a, ptrdiff_t a_row, const void *b, ptrdiff_t b_row,
                              REAL *c, ptrdiff_t c_row) {
  int i = 0;
  for (; i + 4 <= m; i += 4) FN(few_rows)(4, GEMM_VECTORS, b_dtype, n, k, a + i * a_row, a_row, b, b_row, c + i * c_row, c_row);
  for (; i < m; i++) FN(few_rows)(1, 4, b_dtype, n, k, a + i * a_row, a_row, b, b_row, c + i * c_row, c_row);
}

enum { FN(DOT_COLUMNS) = 4, FN(DOT_ROWS) = GEMM_VECTORS }; /* accumulators: enough to hide an addition, and registers left for operands */

ALWAYS_INLINE void FN(dot_block)(const int rows, const fa_dtype b_dtype, int k, const REAL *a, ptrdiff_t a_row, const void *const b[],
                                 REAL *c, ptrdiff_t c_row) {
  VEC sum[FN(DOT_ROWS)][FN(DOT_COLUMNS)];
  for (int r = 0; r < rows; r++)
    for (int j = 0; j < FN(DOT_COLUMNS); j++) sum[r][j] = (VEC){0};
  for (int i = 0; i < k; i += LANES) {
    VEC b_vec[FN(DOT_COLUMNS)];
    for (int j = 0; j < FN(DOT_COLUMNS); j++) b_vec[j] = FN(load_as)(b[j], b_dtype, i);
    for (int r = 0; r < rows; r++) {
      VEC a_vec = LOAD(a + r * a_row + i);
      for (int j = 0; j < FN(DOT_COLUMNS); j++) sum[r][j] += a_vec * b_vec[j];
    }
  }
  for (int r = 0; r < rows; r++) FN(sum_four)(sum[r], c + r * c_row);
}

/* A last row of b stands in for those that are not there; their columns of c are not part of any row. */
ALWAYS_INLINE void FN(dots_of)(const fa_dtype b_dtype, int m, int n, int k, const REAL *a, ptrdiff_t a_row, const void *b, ptrdiff_t b_row,
                               REAL *c, ptrdiff_t c_row) {
  for (int j = 0; j < n; j += FN(DOT_COLUMNS)) {
    const void *rows[FN(DOT_COLUMNS)];
    int r = 0;
    for (int i = 0; i < FN(DOT_COLUMNS); i++) rows[i] = (const char *)b + (j + i < n ? j + i : n - 1) * b_row * fa_dtype_bytes(b_dtype);
    for (; r + FN(DOT_ROWS) <= m; r += FN(DOT_ROWS))
      FN(dot_block)(FN(DOT_ROWS), b_dtype, k, a + r * a_row, a_row, rows, c + r * c_row + j, c_row);
    for (; r < m; r++) FN(dot_block)(1, b_dtype, k, a + r * a_row, a_row, rows, c + r * c_row + j, c_row);
  }
}

/* What is done to rows of b as they lie, once for each type that they may have. */
#define FOR_EACH_TYPE(name)                                                                                                            \
  static void FN(name)(int m, int n, int k, const void *a, ptrdiff_t a_row, const void *b, fa_dtype b_dtype, ptrdiff_t b_row, void *c, \
                       ptrdiff_t c_row) {                                                                                              \
    if (b_dtype == FA_BF16)                                                                                                            \
      FN(name##_of)(FA_BF16, m, n, k, a, a_row, b, b_row, c, c_row);                                                                   \
    else if (b_dtype == FA_F16)                                                                                                        \
      FN(name##_of)(FA_F16, m, n, k, a, a_row, b, b_row, c, c_row);                                                                    \
    else                                                                                                                               \
      FN(name##_of)(REAL_DTYPE, m, n, k, a, a_row, b, b_row, c, c_row);                                                                \
  }
FOR_EACH_TYPE(dots)
FOR_EACH_TYPE(few)
