/* tensor_intake.c: one Python object -> one fa_tensor.
 *
 *     type known? -- exchange table --> DLTensor on the stack  --.
 *         |                                                      |--> checks --> fa_tensor
 *         '------- __dlpack__ capsule --> held until the end   --'
 */
#include "tensor_intake.h"

#include <stdint.h>
#include <stdlib.h>

/* ---- What is known of a type ---- */

/* The newest table of our major version in the chain, or NULL. */
static const DLPackExchangeAPI *matching_api(const DLPackExchangeAPI *api) {
  while (api && api->version.major != DLPACK_MAJOR) api = api->prev_api;
  return api && (api->dltensor_from_py_object_no_sync || api->managed_tensor_from_py_object_no_sync) ? api : NULL;
}

static const DLPackExchangeAPI *find_api(PyObject *type) {
  PyObject *attribute = PyObject_GetAttrString(type, "__dlpack_c_exchange_api__");
  void *table = NULL;
  if (attribute && PyCapsule_IsValid(attribute, "dlpack_exchange_api"))
    table = PyCapsule_GetPointer(attribute, "dlpack_exchange_api");
  else if (attribute && PyLong_Check(attribute)) /* the form before DLPack 1.3 */
    table = PyLong_AsVoidPtr(attribute);
  Py_XDECREF(attribute);
  PyErr_Clear();
  return matching_api(table);
}

static const DLPackExchangeAPI *api_of(fa_type_cache *cache, PyObject *object) {
  PyObject *type = (PyObject *)Py_TYPE(object);
  int slot = 0;
  for (; slot < FA_INTAKE_TYPES; slot++) {
    const fa_known_type *known = atomic_load_explicit(&cache->slot[slot], memory_order_acquire);
    if (!known) break;
    if (known->type == type) return known->api;
  }
  const DLPackExchangeAPI *api = find_api(type);
  fa_known_type *fresh = slot < FA_INTAKE_TYPES ? malloc(sizeof *fresh) : NULL;
  if (!fresh) return api; /* a full cache: this type is asked again each time */
  *fresh = (fa_known_type){type, api};
  Py_INCREF(type);
  for (; slot < FA_INTAKE_TYPES; slot++) {
    fa_known_type *empty = NULL;
    if (atomic_compare_exchange_strong_explicit(&cache->slot[slot], &empty, fresh, memory_order_release, memory_order_relaxed)) return api;
  }
  Py_DECREF(type);
  free(fresh);
  return api;
}

int fa_type_cache_visit(fa_type_cache *cache, visitproc visit, void *arg) {
  for (int i = 0; i < FA_INTAKE_TYPES; i++) {
    fa_known_type *known = atomic_load_explicit(&cache->slot[i], memory_order_acquire);
    if (known) Py_VISIT(known->type);
  }
  return 0;
}

void fa_type_cache_clear(fa_type_cache *cache) {
  for (int i = 0; i < FA_INTAKE_TYPES; i++) {
    fa_known_type *known = atomic_exchange(&cache->slot[i], NULL);
    if (!known) continue;
    Py_DECREF(known->type);
    free(known);
  }
}

/* ---- Errors ---- */

PyObject *fa_type_name(PyObject *object) { return PyObject_GetAttrString((PyObject *)Py_TYPE(object), "__name__"); }

static int fail_not_a_tensor(const char *name, PyObject *object) {
  PyObject *type = fa_type_name(object);
  if (type) PyErr_Format(PyExc_TypeError, "%s: expected a torch tensor or a NumPy array, got %U", name, type);
  Py_XDECREF(type);
  return -1;
}

/* The class for an error about a tensor, or NULL for one that is not about the tensor (KeyboardInterrupt, MemoryError, ...). */
static PyObject *class_of_producer_error(void) {
  static PyObject **const about_the_tensor[] = {&PyExc_BufferError, &PyExc_RuntimeError, &PyExc_TypeError, &PyExc_ValueError,
                                                &PyExc_AttributeError};
  if (PyErr_ExceptionMatches(PyExc_NotImplementedError)) return PyExc_NotImplementedError;
  for (size_t i = 0; i < sizeof about_the_tensor / sizeof *about_the_tensor; i++)
    if (PyErr_ExceptionMatches(*about_the_tensor[i])) return PyExc_TypeError;
  return NULL;
}

/* What an error says, without the lines of a backtrace that some libraries put behind it. NULL with an error set. */
static PyObject *first_line(PyObject *error) {
  PyObject *text = PyObject_Str(error);
  Py_ssize_t end = text ? PyUnicode_FindChar(text, '\n', 0, PyUnicode_GetLength(text), 1) : -1;
  if (end < 0) return text;
  PyObject *line = PyUnicode_Substring(text, 0, end);
  Py_DECREF(text);
  return line;
}

/* Replaces the producer's pending error by one that names the argument and quotes it; the original becomes the cause. */
static int fail_as_producer(const char *name) {
  PyObject *type, *value, *trace, *cause;
  if (!PyErr_Occurred()) {
    PyErr_Format(PyExc_TypeError, "%s: the library it comes from gave no tensor and no reason", name);
    return -1;
  }
  PyObject *kind = class_of_producer_error();
  if (!kind) return -1;

  PyErr_Fetch(&type, &cause, &trace);
  PyErr_NormalizeException(&type, &cause, &trace);
  if (trace) PyException_SetTraceback(cause, trace);
  Py_XDECREF(type);
  Py_XDECREF(trace);

  PyObject *words = first_line(cause);
  if (words) PyErr_Format(kind, "%s: cannot be read as a strided tensor: %U", name, words);
  Py_XDECREF(words);
  PyErr_Fetch(&type, &value, &trace);
  PyErr_NormalizeException(&type, &value, &trace);
  PyException_SetCause(value, cause); /* takes our reference */
  PyErr_Restore(type, value, trace);
  return -1;
}

/* ---- DLTensor -> fa_tensor ---- */

static fa_dtype dtype_of(DLDataType type) {
  static const struct {
    uint8_t code, bits;
    fa_dtype dtype;
  } rows[] = {{DL_FLOAT, 32, FA_F32}, {DL_FLOAT, 64, FA_F64}, {DL_FLOAT, 16, FA_F16}, {DL_BFLOAT, 16, FA_BF16},
              {DL_INT, 32, FA_I32},   {DL_INT, 64, FA_I64},   {DL_BOOL, 8, FA_BOOL},  {DL_FLOAT8_E4M3FN, 8, FA_F8_E4M3}};
  for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
    if (type.code == rows[i].code && type.bits == rows[i].bits && type.lanes == 1) return rows[i].dtype;
  return FA_OTHER;
}

static fa_device device_of(int32_t type) {
  if (type == DL_CPU || type == DL_CUDA_HOST) return FA_CPU;
  if (type == DL_CUDA || type == DL_CUDA_MANAGED) return FA_CUDA;
  return FA_DEVICE_OTHER;
}

static int check_memory(const char *name, const DLTensor *dl, const char *data) {
  int64_t element_bytes = (dl->dtype.bits * dl->dtype.lanes + 7) / 8;
  for (int i = 0; i < dl->ndim; i++)
    if (dl->shape[i] == 0) return 0;
  if (!dl->data) {
    PyErr_Format(PyExc_TypeError, "%s: has no memory behind it; a fake or meta tensor cannot be computed with", name);
    return -1;
  }
  if (element_bytes > 1 && (uintptr_t)data % (uintptr_t)element_bytes != 0) {
    PyErr_Format(PyExc_ValueError, "%s: starts at address %p, which is no multiple of its element size of %lld bytes", name, data,
                 (long long)element_bytes);
    return -1;
  }
  return 0;
}

static int convert(const char *name, const DLTensor *dl, int read_only, fa_tensor *out) {
  if (dl->ndim < 0 || dl->ndim > FA_MAX_DIMS) {
    PyErr_Format(PyExc_TypeError, "%s: has %d dimensions, at most %d are possible", name, (int)dl->ndim, (int)FA_MAX_DIMS);
    return -1;
  }
  char *data = dl->data ? (char *)dl->data + dl->byte_offset : NULL;
  if (check_memory(name, dl, data) < 0) return -1;
  out->data = data;
  out->dtype = dtype_of(dl->dtype);
  out->device = device_of(dl->device.device_type);
  out->device_index = out->device == FA_CPU ? 0 : dl->device.device_id;
  out->ndim = dl->ndim;
  out->read_only = read_only;
  int64_t compact = 1;
  for (int i = dl->ndim - 1; i >= 0; i--) {
    out->shape[i] = dl->shape[i];
    out->stride[i] = dl->strides ? dl->strides[i] : compact;
    compact *= dl->shape[i] > 0 ? dl->shape[i] : 1;
  }
  return 0;
}

/* ---- The three ways in ---- */

void fa_intake_begin(fa_intake *intake, fa_type_cache *types) {
  intake->types = types;
  intake->stream = NULL;
  intake->has_stream = 0;
  intake->held_count = 0;
}

static int hold(fa_intake *intake, DLManagedTensorVersioned *versioned, DLManagedTensor *legacy, const char *name) {
  if (intake->held_count < FA_INTAKE_TENSORS) {
    intake->held[intake->held_count].versioned = versioned;
    intake->held[intake->held_count++].legacy = legacy;
    return 0;
  }
  if (versioned && versioned->deleter) versioned->deleter(versioned);
  if (legacy && legacy->deleter) legacy->deleter(legacy);
  PyErr_Format(PyExc_RuntimeError, "%s: over %d tensors in one call", name, (int)FA_INTAKE_TENSORS);
  return -1;
}

static int take_versioned(fa_intake *intake, const char *name, DLManagedTensorVersioned *managed, fa_tensor *out) {
  if (hold(intake, managed, NULL, name) < 0) return -1;
  if (managed->version.major != DLPACK_MAJOR) {
    PyErr_Format(PyExc_TypeError, "%s: speaks DLPack %u, only version %d is understood", name, (unsigned)managed->version.major,
                 (int)DLPACK_MAJOR);
    return -1;
  }
  return convert(name, &managed->dl_tensor, (managed->flags & DL_FLAG_READ_ONLY) != 0, out);
}

static int take_from_api(fa_intake *intake, const char *name, PyObject *object, const DLPackExchangeAPI *api, fa_tensor *out) {
  if (api->dltensor_from_py_object_no_sync) {
    DLTensor dl;
    if (api->dltensor_from_py_object_no_sync(object, &dl) != 0) return fail_as_producer(name);
    if (convert(name, &dl, 0, out) < 0) return -1;
  } else {
    DLManagedTensorVersioned *managed = NULL;
    if (api->managed_tensor_from_py_object_no_sync(object, &managed) != 0 || !managed) return fail_as_producer(name);
    if (take_versioned(intake, name, managed, out) < 0) return -1;
  }
  if (out->device != FA_CUDA || intake->has_stream || !api->current_work_stream) return 0;
  if (api->current_work_stream(DL_CUDA, out->device_index, &intake->stream) != 0) return fail_as_producer(name);
  intake->has_stream = 1;
  return 0;
}

/* CPU tensors take no stream. CUDA ones are told ours, so that their library makes it wait for pending work; 1 names the default stream. */
static PyObject *stream_argument(const fa_intake *intake, const char *name, PyObject *object) {
  PyObject *device = PyObject_CallMethod(object, "__dlpack_device__", NULL);
  PyObject *type = device ? PySequence_GetItem(device, 0) : NULL;
  long device_type = type ? PyLong_AsLong(type) : -1;
  Py_XDECREF(device);
  Py_XDECREF(type);
  if (PyErr_Occurred()) return NULL;
  if (device_of((int32_t)device_type) != FA_CUDA) Py_RETURN_NONE;
  if (!intake->has_stream) {
    PyErr_Format(PyExc_NotImplementedError, "%s: a CUDA tensor must come with the DLPack exchange table, which torch has since 2.10", name);
    return NULL;
  }
  return intake->stream ? PyLong_FromVoidPtr(intake->stream) : PyLong_FromLong(1);
}

static PyObject *call_dlpack(PyObject *method, PyObject *stream, int with_version) {
  PyObject *none = PyTuple_New(0);
  PyObject *keywords = with_version ? Py_BuildValue("{s:O,s:(ii)}", "stream", stream, "max_version", (int)DLPACK_MAJOR, (int)DLPACK_MINOR)
                                    : Py_BuildValue("{s:O}", "stream", stream);
  PyObject *capsule = none && keywords ? PyObject_Call(method, none, keywords) : NULL;
  Py_XDECREF(none);
  Py_XDECREF(keywords);
  return capsule;
}

/* A renamed capsule no longer frees its content, so from there on it is ours to free. */
static int take_capsule(fa_intake *intake, const char *name, PyObject *capsule, fa_tensor *out) {
  if (PyCapsule_IsValid(capsule, "dltensor_versioned")) {
    DLManagedTensorVersioned *managed = PyCapsule_GetPointer(capsule, "dltensor_versioned");
    if (PyCapsule_SetName(capsule, "used_dltensor_versioned") < 0) return -1;
    return take_versioned(intake, name, managed, out);
  }
  if (PyCapsule_IsValid(capsule, "dltensor")) {
    DLManagedTensor *managed = PyCapsule_GetPointer(capsule, "dltensor");
    if (PyCapsule_SetName(capsule, "used_dltensor") < 0 || hold(intake, NULL, managed, name) < 0) return -1;
    return convert(name, &managed->dl_tensor, 0, out);
  }
  PyErr_Format(PyExc_TypeError, "%s: its __dlpack__ returned no fresh DLPack capsule", name);
  return -1;
}

static int take_from_protocol(fa_intake *intake, const char *name, PyObject *object, fa_tensor *out) {
  PyObject *method = PyObject_GetAttrString(object, "__dlpack__");
  if (!method) {
    if (!PyErr_ExceptionMatches(PyExc_AttributeError)) return -1;
    PyErr_Clear();
    return fail_not_a_tensor(name, object);
  }
  PyObject *stream = stream_argument(intake, name, object);
  if (!stream) {
    Py_DECREF(method);
    return PyErr_ExceptionMatches(PyExc_NotImplementedError) ? -1 : fail_as_producer(name);
  }
  PyObject *capsule = call_dlpack(method, stream, 1);
  if (!capsule && PyErr_ExceptionMatches(PyExc_TypeError)) { /* a producer of before DLPack 1.0 */
    PyErr_Clear();
    capsule = call_dlpack(method, stream, 0);
  }
  Py_DECREF(method);
  Py_DECREF(stream);
  if (!capsule) return fail_as_producer(name);
  int result = take_capsule(intake, name, capsule, out);
  Py_DECREF(capsule);
  return result;
}

int fa_intake_tensor(fa_intake *intake, const char *name, PyObject *object, fa_tensor *tensor) {
  tensor->dtype = FA_NONE;
  if (object == Py_None) return 0;
  const DLPackExchangeAPI *api = api_of(intake->types, object);
  if (api) return take_from_api(intake, name, object, api, tensor);
  if (PyType_Check(object)) return fail_not_a_tensor(name, object);
  return take_from_protocol(intake, name, object, tensor);
}

void fa_intake_end(fa_intake *intake) {
  if (intake->held_count == 0) return;
  PyObject *type, *value, *trace;
  PyErr_Fetch(&type, &value, &trace);
  while (intake->held_count > 0) {
    intake->held_count--;
    DLManagedTensorVersioned *versioned = intake->held[intake->held_count].versioned;
    DLManagedTensor *legacy = intake->held[intake->held_count].legacy;
    if (versioned && versioned->deleter) versioned->deleter(versioned);
    if (legacy && legacy->deleter) legacy->deleter(legacy);
  }
  PyErr_Restore(type, value, trace);
}
