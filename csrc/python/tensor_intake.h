/* tensor_intake.h: Python objects -> fa_tensor, for the tensors of one call.
 *
 * torch and others that offer DLPack's C exchange table are read through it in some tens of nanoseconds, NumPy and the rest through
 * `__dlpack__` capsules. No data is copied. What a capsule holds stays alive until fa_intake_end.
 */
#ifndef FA_TENSOR_INTAKE_H
#define FA_TENSOR_INTAKE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdatomic.h>

#include "../flash_attn.h"
#include "dlpack_abi.h"

enum { FA_INTAKE_TYPES = 8, FA_INTAKE_TENSORS = 32 };

/* What is known of one Python type. Immutable once published; the type is kept alive, so that its address stays its own. */
typedef struct {
  PyObject *type;
  const DLPackExchangeAPI *api; /* NULL: the type has none */
} fa_known_type;

/* Lives in the module state. Slots fill up in order and are never replaced, so readers need no lock. */
typedef struct {
  _Atomic(fa_known_type *) slot[FA_INTAKE_TYPES];
} fa_type_cache;

int fa_type_cache_visit(fa_type_cache *cache, visitproc visit, void *arg);
void fa_type_cache_clear(fa_type_cache *cache);

typedef struct {
  fa_type_cache *types;
  void *stream;   /* of q's device, valid when has_stream */
  int has_stream; /* q is a CUDA tensor whose library told its current stream */
  int held_count;
  struct {
    DLManagedTensorVersioned *versioned; /* one of the two is NULL */
    DLManagedTensor *legacy;
  } held[FA_INTAKE_TENSORS];
} fa_intake;

void fa_intake_begin(fa_intake *intake, fa_type_cache *types);

/* Fills *tensor; None makes it absent. Returns 0, or -1 with a Python error set that names the argument. q comes first: it sets the stream. */
int fa_intake_tensor(fa_intake *intake, const char *name, PyObject *object, fa_tensor *tensor);

/* Gives back every capsule's content. Keeps a pending Python error. */
void fa_intake_end(fa_intake *intake);

/* "list" for [1, 2]; a new reference, or NULL with an error set. */
PyObject *fa_type_name(PyObject *object);

#endif
