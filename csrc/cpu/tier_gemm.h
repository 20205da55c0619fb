/* tier_gemm.h: products of tiles. Part of tier_types.h, which says for which element type and vector. */

/* A rows x vectors block of c stays in registers while k runs: GEMM_ROWS * GEMM_VECTORS accumulators, GEMM_VECTORS of b, one of a. */
ALWAYS_INLINE void FN(gemm_block)(const int rows, const int vectors, int k, const REAL *a, ptrdiff_t a_row, ptrdiff_t a_col, const REAL *b,
                                  ptrdiff_t b_row, REAL *c, ptrdiff_t c_row, int accumulate) {
  VEC sum[GEMM_ROWS][GEMM_VECTORS];
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < vectors; v++) sum[r][v] = accumulate ? LOAD(c + r * c_row + v * LANES) : (VEC){0};
  for (int i = 0; i < k; i++) {
    VEC b_vec[GEMM_VECTORS];
    for (int v = 0; v < vectors; v++) b_vec[v] = LOAD(b + i * b_row + v * LANES);
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
    FN(gemm_block)(GEMM_ROWS, vectors, k, a + i * a_row, a_row, a_col, b, b_row, c + i * c_row, c_row, accumulate);
  for (; i + 4 <= m; i += 4) FN(gemm_block)(4, vectors, k, a + i * a_row, a_row, a_col, b, b_row, c + i * c_row, c_row, accumulate);
  for (; i + 2 <= m; i += 2) FN(gemm_block)(2, vectors, k, a + i * a_row, a_row, a_col, b, b_row, c + i * c_row, c_row, accumulate);
  if (i < m) FN(gemm_block)(1, vectors, k, a + i * a_row, a_row, a_col, b, b_row, c + i * c_row, c_row, accumulate);
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

enum { FN(DOT_ROWS) = 4, FN(DOT_COLUMNS) = 2 }; /* accumulators: enough to hide an addition, and registers left for their operands */

ALWAYS_INLINE void FN(dot_block)(const int rows, const int columns, int k, const REAL *a, ptrdiff_t a_row, const REAL *b, ptrdiff_t b_row,
                                 REAL *c, ptrdiff_t c_row) {
  VEC sum[FN(DOT_ROWS)][FN(DOT_COLUMNS)];
  for (int r = 0; r < rows; r++)
    for (int j = 0; j < columns; j++) sum[r][j] = (VEC){0};
  for (int i = 0; i < k; i += LANES) {
    VEC b_vec[FN(DOT_COLUMNS)];
    for (int j = 0; j < columns; j++) b_vec[j] = LOAD(b + j * b_row + i);
    for (int r = 0; r < rows; r++) {
      VEC a_vec = LOAD(a + r * a_row + i);
      for (int j = 0; j < columns; j++) sum[r][j] += a_vec * b_vec[j];
    }
  }
  for (int r = 0; r < rows; r++)
    for (int j = 0; j < columns; j++) c[r * c_row + j] = FN(SUM_LANES)(sum[r][j]);
}

ALWAYS_INLINE void FN(dot_columns)(const int columns, int m, int k, const REAL *a, ptrdiff_t a_row, const REAL *b, ptrdiff_t b_row, REAL *c,
                                   ptrdiff_t c_row) {
  int r = 0;
  for (; r + FN(DOT_ROWS) <= m; r += FN(DOT_ROWS))
    FN(dot_block)(FN(DOT_ROWS), columns, k, a + r * a_row, a_row, b, b_row, c + r * c_row, c_row);
  for (; r < m; r++) FN(dot_block)(1, columns, k, a + r * a_row, a_row, b, b_row, c + r * c_row, c_row);
}

static void FN(dots)(int m, int n, int k, const void *a, ptrdiff_t a_row, const void *b, ptrdiff_t b_row, void *c, ptrdiff_t c_row) {
  int j = 0;
  for (; j + FN(DOT_COLUMNS) <= n; j += FN(DOT_COLUMNS))
    FN(dot_columns)(FN(DOT_COLUMNS), m, k, a, a_row, (const REAL *)b + j * b_row, b_row, (REAL *)c + j, c_row);
  for (; j < n; j++) FN(dot_columns)(1, m, k, a, a_row, (const REAL *)b + j * b_row, b_row, (REAL *)c + j, c_row);
}
