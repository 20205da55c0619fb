/* check.h: the questions problem.c asks of one tensor. Each answers with FA_OK or an error that names the argument. */
#ifndef FA_CHECK_H
#define FA_CHECK_H

#include "error.h"
#include "problem.h"

static inline int fa_given(const fa_tensor *t) { return t->dtype != FA_NONE; }

/* "(2, 3, 64)" */
typedef struct {
  char text[128];
} fa_shape_text;
fa_shape_text fa_shape_of(int ndim, const int64_t *shape);

fa_code fa_check_device(const char *name, const fa_tensor *t, const fa_tensor *q, fa_error *error);
fa_code fa_check_dtype(const char *name, const fa_tensor *t, fa_dtype first, fa_dtype second, fa_error *error);
fa_code fa_check_rank(const char *name, const fa_tensor *t, int rank, const char *meaning, fa_error *error);
fa_code fa_check_shape(const char *name, const fa_tensor *t, int ndim, const int64_t *shape, fa_error *error);

/* Writable, and no two indices of it share an element. */
fa_code fa_check_writable(const char *name, const fa_tensor *t, fa_error *error);

/* Right-aligned broadcast of t to full[4] = (batch, heads, rows, columns), as strides that are 0 where t has size 1. */
fa_code fa_broadcast(const char *name, const fa_tensor *t, const int64_t full[4], fa_grid *grid, fa_error *error);

#endif
