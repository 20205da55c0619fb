/* check.h: inside the validator: the questions it asks of one tensor, each answered by FA_OK or an error that names the argument, and its
 * parts. */
#ifndef FA_CHECK_H
#define FA_CHECK_H

#include "error.h"
#include "problem.h"

/* Leave the enclosing function with the first error. */
#define TRY(call)                           \
  do {                                      \
    fa_code try_code = (call);              \
    if (try_code != FA_OK) return try_code; \
  } while (0)

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

fa_code fa_check_at_most(const char *name, const char *what, int64_t value, int64_t limit, fa_error *error);

/* An element-indexed tensor needs to know how large its last two axes are. */
fa_code fa_check_bounds_given(const char *name, const fa_problem *p, fa_error *error);

/* alibi_slopes, sinks and their gradients. */
fa_code fa_check_alibi(const char *name, const fa_tensor *t, const fa_problem *p, const fa_request *r, fa_per_head *out, fa_error *error);
fa_code fa_check_sinks(const char *name, const fa_tensor *t, const fa_problem *p, const fa_request *r, fa_per_head *out, fa_error *error);

/* options.c: parts of fa_problem_init, after tensors and lengths. */
fa_code fa_init_visibility(fa_problem *p, const fa_request *r, fa_error *error);
fa_code fa_init_score(fa_problem *p, const fa_request *r, fa_error *error);
fa_code fa_init_dropout(fa_problem *p, const fa_request *r, fa_error *error);

static inline fa_dtype fa_statistics_dtype(fa_dtype dtype) { return dtype == FA_F64 ? FA_F64 : FA_F32; }

#endif
