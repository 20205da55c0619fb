/* dlpack_abi.h: the binary layout of DLPack 1.x, as far as this library reads it. Names follow the standard's, so that its documents
 * apply; the layout is fixed for major version 1, and minor versions only add constants.
 */
#ifndef FA_DLPACK_ABI_H
#define FA_DLPACK_ABI_H

#include <stdint.h>

enum { DLPACK_MAJOR = 1, DLPACK_MINOR = 3 }; /* the newest whose constants are known here */

enum { DL_CPU = 1, DL_CUDA = 2, DL_CUDA_HOST = 3, DL_CUDA_MANAGED = 13 };

enum { DL_INT = 0, DL_UINT = 1, DL_FLOAT = 2, DL_BFLOAT = 4, DL_COMPLEX = 5, DL_BOOL = 6, DL_FLOAT8_E4M3FN = 10 };

enum { DL_FLAG_READ_ONLY = 1 };

typedef struct {
  int32_t device_type, device_id;
} DLDevice;

typedef struct {
  uint8_t code, bits;
  uint16_t lanes;
} DLDataType;

/* Strides count elements; a NULL stride array means compact and row-major. */
typedef struct {
  void *data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
} DLTensor;

typedef struct {
  uint32_t major, minor;
} DLPackVersion;

/* Inside a capsule named "dltensor". The consumer renames it and then calls the deleter, which may be NULL, exactly once. */
typedef struct DLManagedTensor {
  DLTensor dl_tensor;
  void *manager_ctx;
  void (*deleter)(struct DLManagedTensor *self);
} DLManagedTensor;

/* Inside a capsule named "dltensor_versioned". Under another major version nothing but the deleter may be touched. */
typedef struct DLManagedTensorVersioned {
  DLPackVersion version;
  void *manager_ctx;
  void (*deleter)(struct DLManagedTensorVersioned *self);
  uint64_t flags;
  DLTensor dl_tensor;
} DLManagedTensorVersioned;

/* The table that a tensor type offers as `__dlpack_c_exchange_api__`: a capsule named "dlpack_exchange_api", static for the life of the
 * process. Functions return 0, or -1 with a Python error set, and need the GIL. */
typedef struct DLPackExchangeAPI {
  DLPackVersion version;
  struct DLPackExchangeAPI *prev_api; /* the same for an older major version, or NULL */
  int (*managed_tensor_allocator)(DLTensor *prototype, DLManagedTensorVersioned **out, void *error_ctx,
                                  void (*set_error)(void *error_ctx, const char *kind, const char *message));
  int (*managed_tensor_from_py_object_no_sync)(void *object, DLManagedTensorVersioned **out);
  int (*managed_tensor_to_py_object_no_sync)(DLManagedTensorVersioned *tensor, void **out);
  int (*dltensor_from_py_object_no_sync)(void *object, DLTensor *out); /* may be NULL; shape and strides live as long as the object */
  int (*current_work_stream)(int device_type, int32_t device_id, void **out);
} DLPackExchangeAPI;

#endif
