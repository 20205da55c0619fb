/* outputs.c: see outputs.h. */
#include "outputs.h"

void fa_maker_set(fa_maker *maker, PyObject *const parts[FA_MAKER_PARTS]) {
  PyObject **const slots[FA_MAKER_PARTS] = {&maker->empty_like, &maker->empty_like_with_dim, &maker->new_empty, &maker->as_float32};
  for (int i = 0; i < FA_MAKER_PARTS; i++) {
    PyObject *before = *slots[i];
    Py_XINCREF(parts[i]);
    *slots[i] = parts[i];
    Py_XDECREF(before);
  }
}

int fa_maker_visit(fa_maker *maker, visitproc visit, void *arg) {
  Py_VISIT(maker->empty_like);
  Py_VISIT(maker->empty_like_with_dim);
  Py_VISIT(maker->new_empty);
  Py_VISIT(maker->as_float32);
  return 0;
}

static PyObject *new_empty(const fa_maker *maker, PyObject *q, int ndim, const int64_t *shape, PyObject *keywords) {
  PyObject *arguments = PyTuple_New(ndim + 1), *made = NULL;
  int complete = arguments != NULL;
  if (complete) {
    Py_INCREF(q);
    PyTuple_SetItem(arguments, 0, q);
  }
  for (int i = 0; complete && i < ndim; i++) {
    PyObject *size = PyLong_FromLongLong(shape[i]);
    complete = size && PyTuple_SetItem(arguments, i + 1, size) == 0;
  }
  if (complete) made = PyObject_Call(maker->new_empty, arguments, keywords);
  Py_XDECREF(arguments);
  return made;
}

static int is_compact(const fa_tensor *t) {
  int64_t compact = 1;
  for (int i = t->ndim - 1; i >= 0; i--) {
    if (t->stride[i] != compact) return 0;
    compact *= t->shape[i];
  }
  return 1;
}

static PyObject *make_out(const fa_maker *maker, PyObject *q, const fa_request *r) {
  int64_t dim = r->v.shape[r->v.ndim - 1];
  if (dim != r->q.shape[r->q.ndim - 1]) return PyObject_CallFunction(maker->empty_like_with_dim, "OL", q, (long long)dim);
  if (is_compact(&r->q)) return new_empty(maker, q, r->q.ndim, r->q.shape, NULL);
  return PyObject_CallFunctionObjArgs(maker->empty_like, q, NULL);
}

/* (batch, heads, seqlen), or (heads, total) when packed. */
static PyObject *make_lse(const fa_maker *maker, PyObject *q, const fa_request *r) {
  const int64_t *shape = r->q.shape;
  int heads_axis = r->layout == FA_BHSD ? 1 : 2, own_dtype = r->q.dtype == FA_F32 || r->q.dtype == FA_F64;
  const int64_t dense[3] = {shape[0], shape[heads_axis], shape[3 - heads_axis]}, packed[2] = {shape[1], shape[0]};
  PyObject *keywords = own_dtype ? NULL : maker->as_float32;
  return r->q.ndim == 3 ? new_empty(maker, q, 2, packed, keywords) : new_empty(maker, q, 3, dense, keywords);
}

int fa_outputs_make(fa_outputs *outputs, const fa_maker *maker, fa_intake *intake, PyObject *q, int with_lse, fa_request *r) {
  if (!maker->empty_like) {
    PyErr_SetString(PyExc_RuntimeError, "attention() needs constructors() first");
    return -1;
  }
  if ((r->q.ndim != 3 && r->q.ndim != 4) || r->v.ndim != r->q.ndim) return 0;
  outputs->out = make_out(maker, q, r);
  if (!outputs->out || fa_intake_tensor(intake, "out", outputs->out, &r->out) < 0) return -1;
  if (!with_lse && r->q.device == FA_CPU) return 0; /* the kernels always write it */
  outputs->lse = make_lse(maker, q, r);
  return outputs->lse ? fa_intake_tensor(intake, "lse", outputs->lse, &r->lse) : -1;
}

void fa_outputs_drop(fa_outputs *outputs) {
  Py_XDECREF(outputs->out);
  Py_XDECREF(outputs->lse);
}
