/* module.c: the Python module flash_attn_c._C: its functions, the GIL, and fa_code -> exception.
 *
 * Signatures: flash_attn_c/_C.pyi. Tensors are read by tensor_intake.c, the other arguments by arguments.c.
 */
#include <stdlib.h>
#include <string.h>

#include "arguments.h"
#include "kernel_tools.h"
#include "outputs.h"

typedef struct {
  fa_type_cache types;
  fa_maker maker;
} module_state;

static PyObject *raise_error(const fa_error *error) {
  static PyObject **const exception[] = {
      [FA_ERR_TYPE] = &PyExc_TypeError,       [FA_ERR_VALUE] = &PyExc_ValueError,   [FA_ERR_UNSUPPORTED] = &PyExc_NotImplementedError,
      [FA_ERR_RUNTIME] = &PyExc_RuntimeError, [FA_ERR_MEMORY] = &PyExc_MemoryError,
  };
  if (!PyErr_Occurred()) PyErr_SetString(*exception[error->code], error->message); /* a callback's own error says more */
  return NULL;
}

static int check_count(const char *function, Py_ssize_t given, Py_ssize_t needed) {
  if (given == needed) return 0;
  PyErr_Format(PyExc_TypeError, "%s() takes %zd positional arguments, got %zd", function, needed, given);
  return -1;
}

/* ---- Workspace: memory that Python's tensor library owns ---- */

typedef struct {
  PyObject *callable;
  fa_intake *intake;
  int device_index;
  PyObject *kept; /* a list of the tensors handed out, or NULL */
} workspace;

static void *workspace_alloc(void *context, size_t bytes) {
  workspace *w = context;
  fa_tensor tensor;
  if (w->callable == Py_None) {
    PyErr_SetString(PyExc_TypeError, "alloc: is required for CUDA tensors");
    return NULL;
  }
  if (!w->kept && !(w->kept = PyList_New(0))) return NULL;
  PyObject *owner = PyObject_CallFunction(w->callable, "ni", (Py_ssize_t)bytes, w->device_index);
  if (!owner) return NULL;
  int failed = PyList_Append(w->kept, owner) < 0 || fa_intake_tensor(w->intake, "alloc", owner, &tensor) < 0;
  Py_DECREF(owner);
  if (failed) return NULL;
  if (tensor.device == FA_CUDA && tensor.device_index == w->device_index && tensor.data) return tensor.data;
  PyErr_Format(PyExc_TypeError, "alloc: must return a tensor on CUDA device %d", w->device_index);
  return NULL;
}

/* ---- Functions ---- */

enum { FEW_ELEMENTS = 256 };

typedef fa_code (*engine_call)(const fa_request *request, const fa_context *context, fa_error *error);

static int has_few_elements(const fa_tensor *t) {
  int64_t count = 1;
  for (int i = 0; i < t->ndim && count <= FEW_ELEMENTS; i++) count *= t->shape[i] < FEW_ELEMENTS ? t->shape[i] : FEW_ELEMENTS + 1;
  return count <= FEW_ELEMENTS;
}

/* The CPU engine runs without the GIL, but for what is over sooner than the GIL could be had back: a tiny problem. So is a GPU launch,
 * which calls Python for workspace. */
static PyObject *run(engine_call call, const fa_request *request, fa_intake *intake, PyObject *alloc) {
  fa_error error;
  fa_code code;
  workspace w = {alloc, intake, request->q.device_index, NULL};
  fa_context context = {intake->stream, workspace_alloc, &w};
  if (request->q.device == FA_CUDA || (has_few_elements(&request->q) && has_few_elements(&request->k))) {
    code = call(request, &context, &error);
  } else {
    PyThreadState *released = PyEval_SaveThread();
    code = call(request, &context, &error);
    PyEval_RestoreThread(released);
  }
  Py_XDECREF(w.kept);
  if (code != FA_OK) return raise_error(&error);
  if (PyErr_Occurred() || (request->q.device == FA_CUDA && fa_py_warn_of_store() < 0)) return NULL;
  Py_INCREF(Py_None);
  return Py_None;
}

static PyObject *forward(PyObject *self, PyObject *const *args, Py_ssize_t count) {
  module_state *state = PyModule_GetState(self);
  fa_request request;
  fa_intake intake;
  if (check_count("forward", count, FA_ARG_COMMON + 1) < 0) return NULL;
  fa_intake_begin(&intake, &state->types);
  PyObject *result = NULL;
  if (fa_parse_common(&intake, args, &request) == 0) result = run(fa_forward, &request, &intake, args[FA_ARG_COMMON]);
  fa_intake_end(&intake);
  return result;
}

static PyObject *constructors(PyObject *self, PyObject *const *args, Py_ssize_t count) {
  module_state *state = PyModule_GetState(self);
  if (check_count("constructors", count, FA_MAKER_PARTS) < 0) return NULL;
  fa_maker_set(&state->maker, args);
  Py_RETURN_NONE;
}

/* The outputs are handed on, so they are dropped only where there is none to hand. */
static PyObject *take_outputs(fa_outputs *outputs, int with_lse) {
  PyObject *result = with_lse ? PyTuple_Pack(2, outputs->out, outputs->lse) : outputs->out;
  if (!with_lse) outputs->out = NULL;
  return result;
}

static PyObject *attention(PyObject *self, PyObject *const *args, Py_ssize_t count) {
  module_state *state = PyModule_GetState(self);
  PyObject *common[FA_ARG_COMMON], *done = NULL, *result = NULL;
  fa_outputs outputs = {NULL, NULL};
  fa_request request;
  fa_intake intake;
  if (check_count("attention", count, 7) < 0 || fa_spread_tuples(args, args[3], args[4], common) < 0) return NULL;
  int with_lse = PyObject_IsTrue(args[5]);
  if (with_lse < 0) return NULL;
  fa_intake_begin(&intake, &state->types);
  if (fa_parse_common(&intake, common, &request) == 0 &&
      fa_outputs_make(&outputs, &state->maker, &intake, args[0], with_lse, &request) == 0)
    done = run(fa_forward, &request, &intake, args[6]);
  if (done) result = take_outputs(&outputs, with_lse);
  Py_XDECREF(done);
  fa_outputs_drop(&outputs);
  fa_intake_end(&intake);
  return result;
}

static PyObject *backward(PyObject *self, PyObject *const *args, Py_ssize_t count) {
  module_state *state = PyModule_GetState(self);
  fa_request request;
  fa_intake intake;
  if (check_count("backward", count, FA_ARG_GRADIENTS_END + 1) < 0) return NULL;
  fa_intake_begin(&intake, &state->types);
  PyObject *result = NULL;
  if (fa_parse_common(&intake, args, &request) == 0 && fa_parse_gradients(&intake, args, &request) == 0)
    result = run(fa_backward, &request, &intake, args[FA_ARG_GRADIENTS_END]);
  fa_intake_end(&intake);
  return result;
}

enum { TEXT_BYTES = 1 << 16 }; /* a plan or a description is a few kilobytes */

static PyObject *text_result(fa_code code, const char *text, const fa_error *error) {
  return code == FA_OK ? PyUnicode_DecodeUTF8(text, (Py_ssize_t)strlen(text), "replace") : raise_error(error);
}

static PyObject *explain(PyObject *self, PyObject *const *args, Py_ssize_t count) {
  module_state *state = PyModule_GetState(self);
  fa_request request;
  fa_intake intake;
  int32_t is_backward = 0;
  fa_error error;
  if (check_count("explain", count, FA_ARG_COMMON + 1) < 0) return NULL;
  char *text = malloc(TEXT_BYTES);
  if (!text) return PyErr_NoMemory();
  fa_intake_begin(&intake, &state->types);
  PyObject *result = NULL;
  if (fa_parse_common(&intake, args, &request) == 0 && fa_parse_bool("backward", args[FA_ARG_COMMON], &is_backward) == 0)
    result = text_result(fa_explain(&request, is_backward, text, TEXT_BYTES, &error), text, &error);
  fa_intake_end(&intake);
  free(text);
  return result;
}

static PyObject *describe(PyObject *self, PyObject *unused) {
  (void)self, (void)unused;
  fa_error error;
  char *text = malloc(TEXT_BYTES);
  if (!text) return PyErr_NoMemory();
  PyThreadState *released = PyEval_SaveThread(); /* looks for libraries on the disk */
  fa_code code = fa_describe(text, TEXT_BYTES, &error);
  PyEval_RestoreThread(released);
  PyObject *result = text_result(code, text, &error);
  free(text);
  return result;
}

/* ---- The module ---- */

#define COMMON_SIGNATURE                                                                                                                 \
  "q, k, v, out, lse, bias, mask, alibi_slopes, sinks, block_mask, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, rng_state, probs, " \
  "causal, window, scale, softcap, dropout_p, block_size, max_seqlen_q, max_seqlen_k, layout, deterministic, "

static PyMethodDef methods[] = {
    {"forward", (PyCFunction)(void (*)(void))forward, METH_FASTCALL,
     "forward(" COMMON_SIGNATURE "alloc, /)\n--\n\nWrites out, lse and, when given, probs."},
    {"attention", (PyCFunction)(void (*)(void))attention, METH_FASTCALL,
     "attention(q, k, v, tensors, options, lse_too, alloc, /)\n--\n\nforward() that makes its outputs: out, or (out, lse)."},
    {"constructors", (PyCFunction)(void (*)(void))constructors, METH_FASTCALL,
     "constructors(empty_like, empty_like_with_dim, new_empty, as_float32, /)\n--\n\nHow attention() makes tensors."},
    {"backward", (PyCFunction)(void (*)(void))backward, METH_FASTCALL,
     "backward(" COMMON_SIGNATURE
     "dout, dlse, dq, dk, dv, dbias, dalibi_slopes, dsinks, alloc, /)\n--\n\nWrites the gradients that are given."},
    {"explain", (PyCFunction)(void (*)(void))explain, METH_FASTCALL,
     "explain(" COMMON_SIGNATURE "backward, /)\n--\n\nThe plan for such a call, as JSON text."},
    {"describe", describe, METH_NOARGS, "describe()\n--\n\nWhat was found on this machine, as JSON text."},
    {"compile_kernel", (PyCFunction)(void (*)(void))fa_py_compile_kernel, METH_FASTCALL,
     "compile_kernel(kernel, entry, constants, arch, /)\n--\n\nCompiles a kernel with no GPU: (cubin, log)."},
    {"ship_kernel", (PyCFunction)(void (*)(void))fa_py_ship_kernel, METH_FASTCALL,
     "ship_kernel(kernel, entry, constants, arch, directory, /)\n--\n\nCompiles a kernel into a folder of shipped ones: (file, log)."},
    {"kernel_source", (PyCFunction)(void (*)(void))fa_py_kernel_source, METH_FASTCALL,
     "kernel_source(name=None, /)\n--\n\nThe text of an embedded kernel file, or all names."},
    {"override_constants", (PyCFunction)(void (*)(void))fa_py_override_constants, METH_FASTCALL,
     "override_constants(constants, /)\n--\n\nConstants that kernels get from now on instead of the plan's; {} for none. For benchmarks."},
    {"shipped_folder", (PyCFunction)(void (*)(void))fa_py_shipped_folder, METH_FASTCALL,
     "shipped_folder(directory, /)\n--\n\nWhere shipped kernels lie."},
    {NULL, NULL, 0, NULL},
};

/* CPython 3.12 and later refuse a subinterpreter by the slot below; this covers those before. */
static int module_exec(PyObject *module) {
  (void)module;
  if (PyInterpreterState_GetID(PyInterpreterState_Get()) != 0) {
    PyErr_SetString(PyExc_ImportError, "flash_attn_c works in the main interpreter only, not in a subinterpreter");
    return -1;
  }
  fa_py_hint_packages();
  return 0;
}

static int module_traverse(PyObject *module, visitproc visit, void *arg) {
  module_state *state = PyModule_GetState(module);
  if (!state) return 0;
  int stopped = fa_type_cache_visit(&state->types, visit, arg);
  return stopped ? stopped : fa_maker_visit(&state->maker, visit, arg);
}

static int module_clear(PyObject *module) {
  module_state *state = PyModule_GetState(module);
  if (!state) return 0;
  static PyObject *const none[FA_MAKER_PARTS];
  fa_type_cache_clear(&state->types);
  fa_maker_set(&state->maker, none);
  return 0;
}

static void module_free(void *module) { module_clear(module); }

/* Slot numbers and values of CPython 3.12 and 3.13, which the headers of the limited API 3.10 do not show. An interpreter refuses numbers that
 * it does not know, so the table is chosen by its version. */
enum { SLOT_MULTIPLE_INTERPRETERS = 3, SLOT_GIL = 4 };
#define NOT_SUPPORTED ((void *)0)
#define GIL_NOT_USED ((void *)1)

static PyModuleDef_Slot slots_before_3_12[] = {{Py_mod_exec, (void *)module_exec}, {0, NULL}};
static PyModuleDef_Slot slots_since_3_12[] = {
    {Py_mod_exec, (void *)module_exec},
    {SLOT_MULTIPLE_INTERPRETERS, NOT_SUPPORTED},
#ifdef Py_GIL_DISABLED
    {SLOT_GIL, GIL_NOT_USED},
#endif
    {0, NULL},
};

static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,          .m_name = "flash_attn_c._C", .m_doc = "FlashAttention in C: the compiled core.",
    .m_size = sizeof(module_state), .m_methods = methods,        .m_traverse = module_traverse,
    .m_clear = module_clear,        .m_free = module_free,
};

PyMODINIT_FUNC PyInit__C(void) {
  PyObject *version = PySys_GetObject("hexversion"); /* borrowed */
  long hex = version ? PyLong_AsLong(version) : -1;
  if (hex < 0) return NULL;
  definition.m_slots = hex >= 0x030C0000 ? slots_since_3_12 : slots_before_3_12;
  return PyModuleDef_Init(&definition);
}
