/* arguments.c: what a Python argument may be. Whether its value makes sense is the validator's question, not ours. */
#include "arguments.h"

#include <stddef.h>
#include <string.h>

/* A tensor argument: its position, name, and place in fa_request. */
typedef struct {
  int position;
  const char *name;
  size_t offset;
} tensor_row;

#define PLACE(field) offsetof(fa_request, field)

static const tensor_row common_tensors[] = {
    {0, "q", PLACE(q)},
    {1, "k", PLACE(k)},
    {2, "v", PLACE(v)},
    {3, "out", PLACE(out)},
    {4, "lse", PLACE(lse)},
    {5, "bias", PLACE(score.bias)},
    {6, "mask", PLACE(visibility.mask)},
    {7, "alibi_slopes", PLACE(score.alibi_slopes)},
    {8, "sinks", PLACE(score.sinks)},
    {9, "block_mask", PLACE(visibility.block_mask)},
    {10, "cu_seqlens_q", PLACE(lengths.cu_seqlens_q)},
    {11, "cu_seqlens_k", PLACE(lengths.cu_seqlens_k)},
    {12, "seqused_q", PLACE(lengths.seqused_q)},
    {13, "seqused_k", PLACE(lengths.seqused_k)},
    {15, "probs", PLACE(probs)},
};

static const tensor_row gradient_tensors[] = {
    {FA_ARG_DOUT + 0, "dout", PLACE(grad.dout)},
    {FA_ARG_DOUT + 1, "dlse", PLACE(grad.dlse)},
    {FA_ARG_DOUT + 2, "dq", PLACE(grad.dq)},
    {FA_ARG_DOUT + 3, "dk", PLACE(grad.dk)},
    {FA_ARG_DOUT + 4, "dv", PLACE(grad.dv)},
    {FA_ARG_DOUT + 5, "dbias", PLACE(grad.dbias)},
    {FA_ARG_DOUT + 6, "dalibi_slopes", PLACE(grad.dalibi)},
    {FA_ARG_DOUT + 7, "dsinks", PLACE(grad.dsinks)},
};

static int parse_tensors(fa_intake *intake, const tensor_row *rows, size_t count, PyObject *const *args, fa_request *request) {
  for (size_t i = 0; i < count; i++)
    if (fa_intake_tensor(intake, rows[i].name, args[rows[i].position], (fa_tensor *)((char *)request + rows[i].offset)) < 0) return -1;
  return 0;
}

static int fail_kind(const char *name, const char *expected, PyObject *object) {
  PyErr_Clear();
  PyObject *type = fa_type_name(object);
  if (type) PyErr_Format(PyExc_TypeError, "%s: expected %s, got %U", name, expected, type);
  Py_XDECREF(type);
  return -1;
}

/* NumPy's own bool counts as one too. */
static int is_bool(PyObject *object) {
  if (PyBool_Check(object)) return 1;
  if (PyFloat_CheckExact(object) || PyLong_CheckExact(object) || PyUnicode_Check(object) || object == Py_None) return 0;
  PyObject *type = fa_type_name(object);
  int is = type && (PyUnicode_CompareWithASCIIString(type, "bool_") == 0 || PyUnicode_CompareWithASCIIString(type, "bool") == 0);
  Py_XDECREF(type);
  PyErr_Clear();
  return is;
}

int fa_parse_bool(const char *name, PyObject *object, int32_t *out) {
  if (object == Py_True || object == Py_False) {
    *out = object == Py_True;
    return 0;
  }
  if (!is_bool(object)) return fail_kind(name, "True or False", object);
  *out = PyObject_IsTrue(object);
  return *out < 0 ? -1 : 0;
}

/* Anything with __index__ but bool. */
static int parse_int(const char *name, const char *expected, PyObject *object, int64_t *out) {
  PyObject *number = is_bool(object) ? NULL : PyNumber_Index(object);
  if (!number) {
    if (PyErr_Occurred() && !PyErr_ExceptionMatches(PyExc_TypeError)) return -1;
    return fail_kind(name, expected, object);
  }
  int overflow = 0;
  int64_t value = PyLong_AsLongLongAndOverflow(number, &overflow);
  if (overflow || value == FA_UNBOUNDED) PyErr_Format(PyExc_ValueError, "%s: %S does not fit in 64 bits", name, number);
  Py_DECREF(number);
  *out = value;
  return PyErr_Occurred() ? -1 : 0;
}

static int parse_optional_int(const char *name, PyObject *object, int32_t *given, int64_t *out) {
  *given = object != Py_None;
  return *given ? parse_int(name, "an integer or None", object, out) : 0;
}

static int parse_float(const char *name, const char *expected, PyObject *object, double *out) {
  if (is_bool(object) || PyUnicode_Check(object)) return fail_kind(name, expected, object);
  *out = PyFloat_AsDouble(object);
  if (*out != -1.0 || !PyErr_Occurred()) return 0;
  if (PyErr_ExceptionMatches(PyExc_TypeError)) return fail_kind(name, expected, object);
  if (PyErr_ExceptionMatches(PyExc_OverflowError)) PyErr_Format(PyExc_ValueError, "%s: %S is too large for a float", name, object);
  return -1;
}

static int parse_causal(PyObject *object, fa_causal *causal) {
  int32_t on = 0;
  if (PyUnicode_Check(object)) {
    if (PyUnicode_CompareWithASCIIString(object, "bottom_right") == 0)
      *causal = FA_BOTTOM_RIGHT;
    else if (PyUnicode_CompareWithASCIIString(object, "top_left") == 0)
      *causal = FA_TOP_LEFT;
    else {
      PyErr_Format(PyExc_ValueError, "causal: %R must be True, False, 'bottom_right' or 'top_left'", object);
      return -1;
    }
    return 0;
  }
  if (!is_bool(object)) return fail_kind("causal", "True, False, 'bottom_right' or 'top_left'", object);
  if (fa_parse_bool("causal", object, &on) < 0) return -1;
  *causal = on ? FA_BOTTOM_RIGHT : FA_NOT_CAUSAL;
  return 0;
}

static int parse_window(PyObject *object, fa_visibility *visibility) {
  static const char expected[] = "None or a pair (left, right) of integers or None";
  int64_t *bounds[2] = {&visibility->window_left, &visibility->window_right};
  visibility->has_window = object != Py_None;
  if (!visibility->has_window) return 0;
  if (!PySequence_Check(object) || PyUnicode_Check(object) || PyBytes_Check(object)) return fail_kind("window", expected, object);
  Py_ssize_t length = PySequence_Size(object);
  if (length < 0) return fail_kind("window", expected, object);
  if (length != 2) {
    PyErr_Format(PyExc_ValueError, "window: has %zd entries, must be %s", length, expected);
    return -1;
  }
  for (int i = 0; i < 2; i++) {
    PyObject *entry = PySequence_GetItem(object, i);
    if (!entry) return -1;
    int result = 0;
    if (entry == Py_None)
      *bounds[i] = FA_UNBOUNDED;
    else
      result = parse_int("window", "integer or None as its bounds", entry, bounds[i]);
    Py_DECREF(entry);
    if (result < 0) return -1;
  }
  return 0;
}

static int parse_layout(PyObject *object, fa_layout *layout) {
  if (!PyUnicode_Check(object)) return fail_kind("layout", "'bshd' or 'bhsd'", object);
  if (PyUnicode_CompareWithASCIIString(object, "bshd") == 0)
    *layout = FA_BSHD;
  else if (PyUnicode_CompareWithASCIIString(object, "bhsd") == 0)
    *layout = FA_BHSD;
  else {
    PyErr_Format(PyExc_ValueError, "layout: %R must be 'bshd' or 'bhsd'", object);
    return -1;
  }
  return 0;
}

static int parse_seed(PyObject *pair, Py_ssize_t i, uint64_t *out) {
  PyObject *entry = PySequence_GetItem(pair, i);
  PyObject *number = entry ? PyNumber_Index(entry) : NULL;
  Py_XDECREF(entry);
  if (!number) return -1;
  *out = PyLong_AsUnsignedLongLongMask(number);
  Py_DECREF(number);
  return PyErr_Occurred() ? -1 : 0;
}

/* A tensor (seed, offset), or the two numbers themselves. */
static int parse_rng_state(fa_intake *intake, PyObject *object, fa_dropout *dropout) {
  if (!PyTuple_Check(object)) return fa_intake_tensor(intake, "rng_state", object, &dropout->state);
  if (PyTuple_Size(object) != 2) {
    PyErr_Format(PyExc_ValueError, "rng_state: has %zd entries, must be (seed, offset)", PyTuple_Size(object));
    return -1;
  }
  if (parse_seed(object, 0, &dropout->seed) == 0 && parse_seed(object, 1, &dropout->offset) == 0) return 0;
  return PyErr_ExceptionMatches(PyExc_TypeError) ? fail_kind("rng_state", "a tensor or two integers (seed, offset)", object) : -1;
}

static int parse_options(fa_intake *intake, PyObject *const *args, fa_request *r) {
  fa_lengths *lengths = &r->lengths;
  r->score.has_scale = args[FA_ARG_SCALE] != Py_None;
  if (r->score.has_scale && parse_float("scale", "a number or None", args[FA_ARG_SCALE], &r->score.scale) < 0) return -1;
  if (parse_rng_state(intake, args[FA_ARG_RNG_STATE], &r->dropout) < 0) return -1;
  if (parse_causal(args[FA_ARG_CAUSAL], &r->visibility.causal) < 0) return -1;
  if (parse_window(args[FA_ARG_WINDOW], &r->visibility) < 0) return -1;
  if (parse_float("softcap", "a number", args[FA_ARG_SOFTCAP], &r->score.softcap) < 0) return -1;
  if (parse_float("dropout_p", "a number", args[FA_ARG_DROPOUT_P], &r->dropout.p) < 0) return -1;
  if (parse_int("block_size", "an integer", args[FA_ARG_BLOCK_SIZE], &r->visibility.block_size) < 0) return -1;
  if (parse_optional_int("max_seqlen_q", args[FA_ARG_MAX_SEQLEN_Q], &lengths->has_max_q, &lengths->max_seqlen_q) < 0) return -1;
  if (parse_optional_int("max_seqlen_k", args[FA_ARG_MAX_SEQLEN_K], &lengths->has_max_k, &lengths->max_seqlen_k) < 0) return -1;
  if (parse_layout(args[FA_ARG_LAYOUT], &r->layout) < 0) return -1;
  return fa_parse_bool("deterministic", args[FA_ARG_DETERMINISTIC], &r->deterministic);
}

static int spread(const char *name, PyObject *tuple, PyObject **args, Py_ssize_t count) {
  if (!PyTuple_Check(tuple) || PyTuple_Size(tuple) != count) {
    PyErr_Format(PyExc_TypeError, "%s: must be a tuple of %zd", name, count);
    return -1;
  }
  for (Py_ssize_t i = 0; i < count; i++) args[i] = PyTuple_GetItem(tuple, i);
  return 0;
}

int fa_spread_tuples(PyObject *const qkv[3], PyObject *tensors, PyObject *options, PyObject *args[FA_ARG_COMMON]) {
  for (int i = 0; i < FA_ARG_CAUSAL; i++) args[i] = i < 3 ? qkv[i] : Py_None;
  if (tensors != Py_None && spread("tensors", tensors, args + FA_ARG_BIAS, FA_ARG_CAUSAL - FA_ARG_BIAS) < 0) return -1;
  return spread("options", options, args + FA_ARG_CAUSAL, FA_ARG_COMMON - FA_ARG_CAUSAL);
}

int fa_parse_common(fa_intake *intake, PyObject *const *args, fa_request *request) {
  memset(request, 0, sizeof *request);
  if (parse_tensors(intake, common_tensors, sizeof common_tensors / sizeof *common_tensors, args, request) < 0) return -1;
  return parse_options(intake, args, request);
}

int fa_parse_gradients(fa_intake *intake, PyObject *const *args, fa_request *request) {
  return parse_tensors(intake, gradient_tensors, sizeof gradient_tensors / sizeof *gradient_tensors, args, request);
}
