/* kernel_tools.c: compiling kernels with no GPU, from Python: for `python -m flash_attn_c prebuild` and the build tests. */
#include "kernel_tools.h"

#include <limits.h>
#include <stdlib.h>
#include <string.h>

#include "../cuda/store/key.h"
#include "../cuda/store/nvrtc.h"
#include "../cuda/store/override.h"
#include "../cuda/store/sources.h"
#include "../cuda/store/store.h"

/* A variant whose strings are borrowed from the call's arguments. */
typedef struct {
  fa_variant variant;
  fa_constant constants[FA_MAX_CONSTANTS];
  const char *target;
} tool_request;

static const char *text_of(PyObject *object, const char *name) {
  const char *text = PyUnicode_Check(object) ? PyUnicode_AsUTF8AndSize(object, NULL) : NULL;
  if (!text && !PyErr_Occurred()) PyErr_Format(PyExc_TypeError, "%s: expected a str, got %R", name, (PyObject *)Py_TYPE(object));
  return text;
}

static int parse_constants(PyObject *dict, tool_request *request) {
  PyObject *name, *value;
  Py_ssize_t position = 0;
  if (!PyDict_Check(dict)) {
    PyErr_SetString(PyExc_TypeError, "constants: expected a dict of str to int");
    return 0;
  }
  for (int i = 0; PyDict_Next(dict, &position, &name, &value); i++) {
    if (i == FA_MAX_CONSTANTS) {
      PyErr_Format(PyExc_ValueError, "constants: %zd given, at most %d fit", PyDict_Size(dict), (int)FA_MAX_CONSTANTS);
      return 0;
    }
    const long number = PyLong_AsLong(value);
    if (number == -1 && PyErr_Occurred()) return 0;
    if (number < INT_MIN || number > INT_MAX) {
      PyErr_Format(PyExc_ValueError, "constants: %R is %ld, which is no C int", name, number);
      return 0;
    }
    request->constants[i] = (fa_constant){text_of(name, "constants"), (int)number};
    if (!request->constants[i].name) return 0;
    request->variant.constant_count = i + 1;
  }
  return 1;
}

/* (kernel, entry, constants, arch) */
static int parse_request(PyObject *const *args, tool_request *request) {
  memset(request, 0, sizeof *request);
  request->variant.constants = request->constants;
  request->variant.kernel = text_of(args[0], "kernel");
  request->variant.entry = request->variant.kernel ? text_of(args[1], "entry") : NULL;
  request->target = request->variant.entry ? text_of(args[3], "arch") : NULL;
  return request->target && parse_constants(args[2], request);
}

static PyObject *raise_with_log(fa_code code, const fa_error *error, char *log) {
  PyObject *type = code == FA_ERR_VALUE ? PyExc_ValueError : code == FA_ERR_MEMORY ? PyExc_MemoryError : PyExc_RuntimeError;
  PyErr_Format(type, "%s%s%s", error->message, log && *log ? "\n" : "", log ? log : "");
  free(log);
  return NULL;
}

/* compile_kernel(kernel, entry, constants, arch) -> (cubin, log) */
PyObject *fa_py_compile_kernel(PyObject *module, PyObject *const *args, Py_ssize_t count) {
  (void)module;
  tool_request request;
  fa_error error = {0};
  void *cubin = NULL;
  char *log = NULL;
  size_t bytes = 0;
  if (count != 4)
    return PyErr_Format(PyExc_TypeError, "compile_kernel: 4 arguments needed (kernel, entry, constants, arch), %zd given", count);
  if (!parse_request(args, &request)) return NULL;
  PyThreadState *released = PyEval_SaveThread();
  const fa_code code = fa_store_compile(&request.variant, request.target, &cubin, &bytes, &log, &error);
  PyEval_RestoreThread(released);
  if (code) return raise_with_log(code, &error, log);
  PyObject *result = Py_BuildValue("(Ns)", PyBytes_FromStringAndSize(cubin, (Py_ssize_t)bytes), log ? log : "");
  free(cubin);
  free(log);
  return result;
}

/* ship_kernel(kernel, entry, constants, arch, directory) -> (file name, log) */
PyObject *fa_py_ship_kernel(PyObject *module, PyObject *const *args, Py_ssize_t count) {
  (void)module;
  tool_request request;
  fa_error error = {0};
  char file[256], *log = NULL;
  if (count != 5)
    return PyErr_Format(PyExc_TypeError, "ship_kernel: 5 arguments needed (kernel, entry, constants, arch, directory), %zd given", count);
  const char *directory = text_of(args[4], "directory");
  if (!directory || !parse_request(args, &request)) return NULL;
  PyThreadState *released = PyEval_SaveThread();
  const fa_code code = fa_store_ship(&request.variant, request.target, directory, file, sizeof file, &log, &error);
  PyEval_RestoreThread(released);
  if (code) return raise_with_log(code, &error, log);
  PyObject *result = Py_BuildValue("(ss)", file, log ? log : "");
  free(log);
  return result;
}

/* kernel_source(name) -> str, or None; kernel_source() -> all names */
PyObject *fa_py_kernel_source(PyObject *module, PyObject *const *args, Py_ssize_t count) {
  (void)module;
  if (count > 1) return PyErr_Format(PyExc_TypeError, "kernel_source: at most 1 argument (name), %zd given", count);
  PyObject *names = count ? NULL : PyList_New(0);
  const char *wanted = count ? text_of(args[0], "name") : NULL;
  if (!names && !wanted) return NULL;
  for (const fa_embedded_source *s = fa_embedded_sources; s->name; s++) {
    if (wanted && !strcmp(s->name, wanted)) return PyUnicode_FromString(s->text);
    if (wanted) continue;
    PyObject *name = PyUnicode_FromString(s->name);
    const int failed = !name || PyList_Append(names, name);
    Py_XDECREF(name);
    if (failed) {
      Py_DECREF(names);
      return NULL;
    }
  }
  if (names) return names;
  Py_INCREF(Py_None);
  return Py_None;
}

/* override_constants(constants): what the engine's kernels get from now on instead of what the plan says */
PyObject *fa_py_override_constants(PyObject *module, PyObject *const *args, Py_ssize_t count) {
  (void)module;
  tool_request request = {0};
  fa_error error = {0};
  if (count != 1) return PyErr_Format(PyExc_TypeError, "override_constants: 1 argument needed (constants), %zd given", count);
  if (!parse_constants(args[0], &request)) return NULL;
  const fa_code code = fa_store_override(request.constants, request.variant.constant_count, &error);
  if (code) return raise_with_log(code, &error, NULL);
  Py_INCREF(Py_None);
  return Py_None;
}

/* shipped_folder(directory) makes it the place of shipped kernels */
PyObject *fa_py_shipped_folder(PyObject *module, PyObject *const *args, Py_ssize_t count) {
  (void)module;
  if (count != 1) return PyErr_Format(PyExc_TypeError, "shipped_folder: 1 argument needed (directory), %zd given", count);
  const char *directory = text_of(args[0], "directory");
  if (!directory) return NULL;
  fa_store_set_shipped(directory);
  Py_INCREF(Py_None);
  return Py_None;
}

void fa_py_hint_packages(void) {
  PyObject *path = PySys_GetObject("path"); /* borrowed */
  if (!path || !PyList_Check(path)) return;
  for (Py_ssize_t i = 0; i < PyList_Size(path); i++) {
    PyObject *entry = PyList_GetItem(path, i); /* borrowed */
    const char *folder = entry && PyUnicode_Check(entry) ? PyUnicode_AsUTF8AndSize(entry, NULL) : NULL;
    PyErr_Clear(); /* a path that is no UTF-8 */
    const char *name = folder ? strrchr(folder, '/') : NULL;
    if (name && (!strcmp(name, "/site-packages") || !strcmp(name, "/dist-packages"))) fa_nvrtc_hint(folder);
  }
}

int fa_py_warn_of_store(void) {
  const char *note = fa_store_take_note();
  return note ? PyErr_WarnEx(PyExc_RuntimeWarning, note, 2) : 0;
}
