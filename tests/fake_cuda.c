/* fake_cuda.c: a driver with no GPU behind it, compiled against NVIDIA's own cuda.h, so that the host code is tested against the real
 * declarations wherever that header is found. It counts calls and remembers the last launch; tests read and steer it by name. */
#include <cuda.h>
#include <stdint.h>
#include <string.h>

enum { MOST = 64 };

static struct {
  const char *name;
  long long value;
} values[MOST] = {{"driver_version", 13000}, {"cc_major", 9}, {"cc_minor", 0},      {"smem", 232448},
                  {"sm_count", 132},         {"devices", 2},  {"static_smem", 1024}};

static long long *slot(const char *name) {
  int i = 0;
  for (; i < MOST - 1 && values[i].name; i++)
    if (!strcmp(values[i].name, name)) return &values[i].value;
  values[i].name = name;
  return &values[i].value;
}

/* The name must stay alive: tests keep the strings they pass. */
long long fake_get(const char *name) { return *slot(name); }
void fake_set(const char *name, long long value) { *slot(name) = value; }

static CUcontext current;
static struct CUctx_st { int device; } contexts[8];

static CUresult step(const char *name) {
  ++*slot(name);
  return CUDA_SUCCESS;
}

CUresult cuInit(unsigned flags) {
  step("init");
  return flags || fake_get("devices") ? CUDA_SUCCESS : CUDA_ERROR_NO_DEVICE;
}
CUresult cuDriverGetVersion(int *version) {
  *version = (int)fake_get("driver_version");
  return CUDA_SUCCESS;
}
CUresult cuGetErrorName(CUresult error, const char **name) {
  *name = error == CUDA_ERROR_INVALID_IMAGE ? "CUDA_ERROR_INVALID_IMAGE" : "CUDA_ERROR_FAKE";
  return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult error, const char **text) {
  (void)error;
  *text = "a fake error";
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetCount(int *count) {
  *count = (int)fake_get("devices");
  return CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  *device = ordinal + 10; /* a handle, not an index */
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetName(char *name, int bytes, CUdevice device) {
  (void)device;
  strncpy(name, "Fake GPU", (size_t)bytes);
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  (void)device;
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = (int)fake_get("cc_major"); break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = (int)fake_get("cc_minor"); break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = (int)fake_get("sm_count"); break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = (int)fake_get("smem"); break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = (int)fake_get("smem") + 1024; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR: *value = 65536; break;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR: *value = 2048; break;
    case CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE: *value = 50 << 20; break;
    default: return CUDA_ERROR_INVALID_VALUE;
  }
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  step("retain");
  contexts[device - 10].device = device - 10;
  *context = &contexts[device - 10];
  return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = current;
  return CUDA_SUCCESS;
}
static CUcontext stack[8];
CUresult cuCtxPushCurrent(CUcontext context) {
  stack[(*slot("depth"))++] = current;
  current = context;
  return step("push");
}
CUresult cuCtxPopCurrent(CUcontext *context) {
  *context = current;
  current = stack[--*slot("depth")];
  return step("pop");
}
CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode *mode) {
  CUstreamCaptureMode before = (CUstreamCaptureMode)fake_get("capture_mode");
  fake_set("capture_mode", *mode);
  *mode = before;
  return step("exchange");
}
CUresult cuLibraryLoadData(CUlibrary *library, const void *code, CUjit_option *jit, void **jit_values, unsigned jit_count,
                           CUlibraryOption *options, void **values_, unsigned count) {
  if (jit || jit_values || jit_count || options || values_ || count) return CUDA_ERROR_INVALID_VALUE;
  if (fake_get("capture_mode") != CU_STREAM_CAPTURE_MODE_RELAXED) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  if (memcmp(code, "\177ELF", 4) || fake_get("refuse_code")) return CUDA_ERROR_INVALID_IMAGE;
  *library = (CUlibrary)code;
  return step("load");
}
CUresult cuLibraryUnload(CUlibrary library) {
  (void)library;
  return step("unload");
}
CUresult cuLibraryGetKernel(CUkernel *kernel, CUlibrary library, const char *name) {
  if (strstr(name, "missing")) return CUDA_ERROR_NOT_FOUND;
  *kernel = (CUkernel)library;
  return CUDA_SUCCESS;
}
CUresult cuKernelGetFunction(CUfunction *function, CUkernel kernel) {
  (void)kernel;
  if (!current) return CUDA_ERROR_INVALID_CONTEXT;
  *function = (CUfunction)(uintptr_t)(0x1000 + ((struct CUctx_st *)current)->device);
  return CUDA_SUCCESS;
}
CUresult cuFuncLoad(CUfunction function) {
  (void)function;
  return step("func_load");
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  (void)function;
  *value = attribute == CU_FUNC_ATTRIBUTE_NUM_REGS            ? 168
           : attribute == CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES  ? 8
           : attribute == CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES ? (int)fake_get("static_smem")
                                                              : -1;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  (void)function;
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_ERROR_INVALID_VALUE;
  fake_set("dynamic_smem", value);
  return CUDA_SUCCESS;
}
CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **arguments, void **extra) {
  if (!current || (uintptr_t)function != 0x1000u + (unsigned)((struct CUctx_st *)current)->device || extra)
    return CUDA_ERROR_INVALID_HANDLE;
  fake_set("grid_x", config->gridDimX);
  fake_set("grid_z", config->gridDimZ);
  fake_set("block_x", config->blockDimX);
  fake_set("block_z", config->blockDimZ);
  fake_set("launch_smem", config->sharedMemBytes);
  fake_set("stream", (long long)(uintptr_t)config->hStream);
  fake_set("argument", *(int *)arguments[0]);
  fake_set("cluster_x", 0);
  fake_set("cluster_z", 0);
  fake_set("programmatic", 0);
  for (unsigned i = 0; i < config->numAttrs; i++) {
    const CUlaunchAttribute *a = &config->attrs[i];
    if (a->id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION)
      fake_set("cluster_x", a->value.clusterDim.x), fake_set("cluster_z", a->value.clusterDim.z);
    if (a->id == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION)
      fake_set("programmatic", a->value.programmaticStreamSerializationAllowed);
  }
  step("launch");
  return (CUresult)fake_get("fail_launch");
}
CUresult cuMemsetD8Async(CUdeviceptr pointer, unsigned char value, size_t count, CUstream stream) {
  (void)pointer, (void)stream;
  fake_set("memset_value", value);
  fake_set("memset_count", (long long)count);
  return step("memset8");
}
CUresult cuMemsetD32Async(CUdeviceptr pointer, unsigned value, size_t count, CUstream stream) {
  (void)pointer, (void)stream;
  fake_set("memset_value", value);
  fake_set("memset_count", (long long)count);
  return step("memset32");
}
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *base, const cuuint64_t *dims,
                                const cuuint64_t *strides, const cuuint32_t *box, const cuuint32_t *element_strides,
                                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                CUtensorMapFloatOOBfill fill) {
  memset(map, 0x5a, sizeof *map);
  if (!current) return CUDA_ERROR_INVALID_CONTEXT;
  if ((uintptr_t)map % 64 || (uintptr_t)base % 16 || interleave != CU_TENSOR_MAP_INTERLEAVE_NONE ||
      fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE)
    return CUDA_ERROR_INVALID_VALUE;
  for (unsigned i = 0; i < rank; i++)
    if (element_strides[i] != 1 || box[i] == 0 || box[i] > 256 || dims[i] == 0) return CUDA_ERROR_INVALID_VALUE;
  for (unsigned i = 0; i + 1 < rank; i++)
    if (strides[i] % 16) return CUDA_ERROR_INVALID_VALUE;
  fake_set("map_type", type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16  ? 1
                       : type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16 ? 2
                       : type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ? 3
                       : type == CU_TENSOR_MAP_DATA_TYPE_FLOAT64 ? 4
                                                                 : 5);
  fake_set("map_swizzle_128", swizzle == CU_TENSOR_MAP_SWIZZLE_128B);
  fake_set("map_promote_256", promotion == CU_TENSOR_MAP_L2_PROMOTION_L2_256B);
  return step("map");
}

/* NVRTC asks for it when it finds a driver. */
CUresult cuGetExportTable(const void **table, const CUuuid *id) {
  (void)id;
  *table = NULL;
  return CUDA_ERROR_NOT_FOUND;
}

#define ENTRY(name) \
  { #name, (void *)(uintptr_t)name }
CUresult cuGetProcAddress_v2(const char *symbol, void **entry, int version, cuuint64_t flags, CUdriverProcAddressQueryResult *status) {
  static const struct {
    const char *symbol;
    void *entry;
  } entries[] = {
      {"cuCtxPushCurrent", (void *)(uintptr_t)cuCtxPushCurrent},
      {"cuCtxPopCurrent", (void *)(uintptr_t)cuCtxPopCurrent},
      {"cuMemsetD8Async", (void *)(uintptr_t)cuMemsetD8Async},
      {"cuMemsetD32Async", (void *)(uintptr_t)cuMemsetD32Async},
      ENTRY(cuInit),
      ENTRY(cuDriverGetVersion),
      ENTRY(cuGetErrorName),
      ENTRY(cuGetErrorString),
      ENTRY(cuDeviceGetCount),
      ENTRY(cuDeviceGet),
      ENTRY(cuDeviceGetName),
      ENTRY(cuDeviceGetAttribute),
      ENTRY(cuDevicePrimaryCtxRetain),
      ENTRY(cuCtxGetCurrent),
      ENTRY(cuThreadExchangeStreamCaptureMode),
      ENTRY(cuLibraryLoadData),
      ENTRY(cuLibraryUnload),
      ENTRY(cuLibraryGetKernel),
      ENTRY(cuKernelGetFunction),
      ENTRY(cuFuncLoad),
      ENTRY(cuFuncGetAttribute),
      ENTRY(cuFuncSetAttribute),
      ENTRY(cuLaunchKernelEx),
      ENTRY(cuTensorMapEncodeTiled),
  };
  (void)flags;
  *entry = NULL;
  *status = CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  const int old_driver = fake_get("driver_version") < 12000;
  for (size_t i = 0; i < sizeof entries / sizeof entries[0]; i++)
    if (!strcmp(entries[i].symbol, symbol) && version <= (old_driver ? 11080 : 12040)) {
      *entry = entries[i].entry;
      *status = CU_GET_PROC_ADDRESS_SUCCESS;
    }
  return CUDA_SUCCESS;
}
