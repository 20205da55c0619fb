/* cuda_abi.h: the part of the CUDA driver's binary interface that is used here, declared afresh so that no toolkit is needed to build.
 *
 * The driver keeps this ABI fixed. tests/test_driver_abi.py compares every size, offset and number with cuda.h where one is found.
 */
#ifndef FA_CUDA_ABI_H
#define FA_CUDA_ABI_H

#include <stddef.h>
#include <stdint.h>

typedef int cu_result;   /* CUresult */
typedef int cu_device;   /* CUdevice */
typedef void *cu_handle; /* CUcontext, CUlibrary, CUkernel, CUfunction, CUstream */

enum {
  CU_OK = 0,
  CU_OUT_OF_MEMORY = 2,
  CU_NO_DEVICE = 100,
  CU_INVALID_IMAGE = 200,
  CU_NO_BINARY = 209,
  CU_UNSUPPORTED_PTX = 222,
  CU_ILLEGAL_ADDRESS = 700,
  CU_LAUNCH_FAILED = 719
};

/* CUdevice_attribute */
enum {
  CU_ATTR_MAX_THREADS_PER_BLOCK = 1,
  CU_ATTR_SM_COUNT = 16,
  CU_ATTR_L2_BYTES = 38,
  CU_ATTR_THREADS_PER_SM = 39,
  CU_ATTR_CC_MAJOR = 75,
  CU_ATTR_CC_MINOR = 76,
  CU_ATTR_SMEM_PER_SM = 81,
  CU_ATTR_REGISTERS_PER_SM = 82,
  CU_ATTR_SMEM_PER_BLOCK_OPTIN = 97,
};

/* CUfunction_attribute */
enum { CU_FUNC_STATIC_SMEM = 1, CU_FUNC_LOCAL_BYTES = 3, CU_FUNC_REGISTERS = 4, CU_FUNC_MAX_DYNAMIC_SMEM = 8 };

/* CUlaunchAttributeID, CUstreamCaptureMode */
enum { CU_LAUNCH_CLUSTER = 4, CU_LAUNCH_PROGRAMMATIC = 6, CU_CAPTURE_RELAXED = 2 };

/* CUtensorMapDataType, interleave, fill */
enum { CU_MAP_UINT8 = 0, CU_MAP_FLOAT16 = 6, CU_MAP_FLOAT32 = 7, CU_MAP_FLOAT64 = 8, CU_MAP_BFLOAT16 = 9 };

typedef struct { /* CUlaunchAttribute */
  int id;
  int pad;
  union {
    char bytes[64];
    unsigned cluster[3];
    int programmatic;
  } value;
} cu_launch_attribute;

typedef struct { /* CUlaunchConfig */
  unsigned grid[3], block[3];
  unsigned smem_bytes;
  cu_handle stream;
  cu_launch_attribute *attributes;
  unsigned attribute_count;
} cu_launch_config;

/* Entry points: X(field, symbol, CUDA version of the wanted ABI, result and arguments). All but the last row's are in every driver from
 * CUDA 12.0 on; func_load came with 12.4 and may be NULL. */
#define FA_DRIVER_ENTRY_POINTS(X)                                                                                                 \
  X(init, "cuInit", 2000, (unsigned flags))                                                                                       \
  X(driver_version, "cuDriverGetVersion", 2020, (int *version))                                                                   \
  X(error_name, "cuGetErrorName", 6000, (cu_result result, const char **name))                                                    \
  X(error_string, "cuGetErrorString", 6000, (cu_result result, const char **text))                                                \
  X(device_count, "cuDeviceGetCount", 2000, (int *count))                                                                         \
  X(device_get, "cuDeviceGet", 2000, (cu_device * device, int ordinal))                                                           \
  X(device_name, "cuDeviceGetName", 2000, (char *name, int bytes, cu_device device))                                              \
  X(device_attribute, "cuDeviceGetAttribute", 2000, (int *value, int attribute, cu_device device))                                \
  X(primary_retain, "cuDevicePrimaryCtxRetain", 7000, (cu_handle * context, cu_device device))                                    \
  X(context_current, "cuCtxGetCurrent", 4000, (cu_handle * context))                                                              \
  X(context_push, "cuCtxPushCurrent", 4000, (cu_handle context))                                                                  \
  X(context_pop, "cuCtxPopCurrent", 4000, (cu_handle * context))                                                                  \
  X(capture_mode, "cuThreadExchangeStreamCaptureMode", 10010, (int *mode))                                                        \
  X(library_load, "cuLibraryLoadData", 12000,                                                                                     \
    (cu_handle * library, const void *code, int *jit_options, void **jit_values, unsigned jit_count, int *options, void **values, \
     unsigned count))                                                                                                             \
  X(library_unload, "cuLibraryUnload", 12000, (cu_handle library))                                                                \
  X(library_kernel, "cuLibraryGetKernel", 12000, (cu_handle * kernel, cu_handle library, const char *name))                       \
  X(kernel_function, "cuKernelGetFunction", 12000, (cu_handle * function, cu_handle kernel))                                      \
  X(function_attribute, "cuFuncGetAttribute", 2020, (int *value, int attribute, cu_handle function))                              \
  X(function_set_attribute, "cuFuncSetAttribute", 9000, (cu_handle function, int attribute, int value))                           \
  X(launch, "cuLaunchKernelEx", 11060, (const cu_launch_config *config, cu_handle function, void **arguments, void **extra))      \
  X(memset8, "cuMemsetD8Async", 3020, (uint64_t pointer, unsigned char value, size_t count, cu_handle stream))                    \
  X(memset32, "cuMemsetD32Async", 3020, (uint64_t pointer, unsigned value, size_t count, cu_handle stream))                       \
  X(tensor_map, "cuTensorMapEncodeTiled", 12000,                                                                                  \
    (void *map, int type, uint32_t rank, void *base, const uint64_t *dims, const uint64_t *strides, const uint32_t *box,          \
     const uint32_t *element_strides, int interleave, int swizzle, int l2_promotion, int fill))                                   \
  X(func_load, "cuFuncLoad", 12040, (cu_handle function))

/* cuGetProcAddress_v2 */
typedef cu_result (*cu_get_proc_address)(const char *symbol, void **entry, int version, uint64_t flags, int *status);

#endif
