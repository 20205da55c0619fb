/* outputs.h: the outputs of a forward pass, made by the tensor library's own constructors, so that they are its tensors like any other. */
#ifndef FA_OUTPUTS_H
#define FA_OUTPUTS_H

#include "tensor_intake.h"

/* The constructors. Absent (NULL) until Python hands them over. */
typedef struct {
  PyObject *empty_like;          /* (q) -> uninitialised, with q's shape, dtype, device and order in memory */
  PyObject *empty_like_with_dim; /* (q, dim) -> the same with another last dimension */
  PyObject *new_empty;           /* (q, size...) -> uninitialised and compact, with q's dtype and device */
  PyObject *as_float32;          /* the keyword arguments that make new_empty give float32 */
} fa_maker;

enum { FA_MAKER_PARTS = 4 };

/* Stores the parts in the order above; the previous ones are let go. */
void fa_maker_set(fa_maker *maker, PyObject *const parts[FA_MAKER_PARTS]);
int fa_maker_visit(fa_maker *maker, visitproc visit, void *arg);

typedef struct {
  PyObject *out, *lse; /* lse is NULL when nobody needs it */
} fa_outputs;

/* Makes them and enters them in the request; makes none where the shapes of q and v leave no answer, which the validator then refuses.
 * 0, or -1 with a Python error set; fa_outputs_drop is due either way. */
int fa_outputs_make(fa_outputs *outputs, const fa_maker *maker, fa_intake *intake, PyObject *q, int with_lse, fa_request *request);
void fa_outputs_drop(fa_outputs *outputs);

#endif
