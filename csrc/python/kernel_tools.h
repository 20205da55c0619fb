/* kernel_tools.h: rows of the module's method table that are about kernels rather than attention (METH_FASTCALL each). */
#ifndef FA_KERNEL_TOOLS_H
#define FA_KERNEL_TOOLS_H

#include <Python.h>

PyObject *fa_py_compile_kernel(PyObject *module, PyObject *const *args, Py_ssize_t count);
PyObject *fa_py_ship_kernel(PyObject *module, PyObject *const *args, Py_ssize_t count);
PyObject *fa_py_kernel_source(PyObject *module, PyObject *const *args, Py_ssize_t count);
PyObject *fa_py_override_constants(PyObject *module, PyObject *const *args, Py_ssize_t count);
PyObject *fa_py_shipped_folder(PyObject *module, PyObject *const *args, Py_ssize_t count);

/* Tells the search for NVRTC where packages are installed: the entries of sys.path. Opens no file, never fails. */
void fa_py_hint_packages(void);

/* Warns once of what the kernel store left to say (a cache that cannot be used). Call after a CUDA call; returns -1 when the warning is an
 * exception, as it is under `python -W error`. */
int fa_py_warn_of_store(void);

#endif
