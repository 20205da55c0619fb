/* driver.c: libcuda by dlopen, devices, loading, launching. */
#define _GNU_SOURCE
#include "driver.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

#include "../core/error.h"
#include "cuda_abi.h"

enum { OLDEST_DRIVER = 12000 };

#define AS_POINTER(field, symbol, version, arguments) cu_result(*field) arguments;
static struct { FA_DRIVER_ENTRY_POINTS(AS_POINTER) } cu;
#undef AS_POINTER

typedef struct {
  atomic_int ready;
  cu_device handle;
  cu_handle context; /* the primary one */
  fa_device_limits limits;
} device_row;

/* `opened` and each row's `ready` are stored last, with release, under the lock; whoever has seen them set reads the rest without it. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static atomic_int opened, forked;
static int version, device_count;
static device_row devices[FA_MAX_DEVICES];

/* "what: CUDA_ERROR_NAME (its text)", then what to do where that is known. */
static fa_code __attribute__((format(printf, 3, 4))) driver_fail(fa_error *error, cu_result result, const char *format, ...) {
  char what[FA_MESSAGE_BYTES];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(what, sizeof what, format, arguments);
  va_end(arguments);

  const char *name = "unknown error", *text = "", *advice = "";
  cu.error_name(result, &name);
  cu.error_string(result, &text);
  if (result == CU_ILLEGAL_ADDRESS || result == CU_LAUNCH_FAILED)
    advice = "; a kernel that ran earlier on this device failed, run with CUDA_LAUNCH_BLOCKING=1 to find which";
  if (result == CU_UNSUPPORTED_PTX || result == CU_NO_BINARY || result == CU_INVALID_IMAGE)
    advice = "; the driver cannot load code of this compiler, update the driver";
  return fa_fail(error, result == CU_OUT_OF_MEMORY ? FA_ERR_MEMORY : FA_ERR_RUNTIME, "%.300s: %s (%d, %s)%s", what, name, result, text,
                 advice);
}

static void after_fork_in_child(void) { atomic_store(&forked, 1); }

static fa_code refuse_forked_child(fa_error *error) {
  return fa_fail(error, FA_ERR_RUNTIME,
                 "CUDA was in use before this process was forked, and a forked child cannot use it: "
                 "start worker processes with the 'spawn' method, or use CUDA only after the fork");
}

static fa_code resolve_entry_points(void *library, fa_error *error) {
  cu_get_proc_address get = NULL;
  *(void **)&get = dlsym(library, "cuGetProcAddress_v2");
  if (!get)
    return fa_fail(error, FA_ERR_RUNTIME,
                   "the NVIDIA driver is too old: CUDA 12.0 or later is needed (driver 525 or later), please update it");
  int status = 0;
#define RESOLVE(field, symbol, least, arguments)                                    \
  if (get(symbol, (void **)&cu.field, least, 0, &status) != CU_OK) cu.field = NULL; \
  if (!cu.field && least <= OLDEST_DRIVER)                                          \
    return fa_fail(error, FA_ERR_RUNTIME,                                           \
                   "the NVIDIA driver is too old: it has no %s; CUDA 12.0 or later is needed (driver 525 or later)", symbol);
  FA_DRIVER_ENTRY_POINTS(RESOLVE)
#undef RESOLVE
  return FA_OK;
}

/* Called with the lock held. A failure is not remembered: the next call tries again. */
static fa_code open_driver(fa_error *error) {
  if (atomic_load_explicit(&opened, memory_order_acquire)) return FA_OK;
  /* Not "libcuda.so": that name may be a toolkit's stub. */
  void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!library) return fa_fail(error, FA_ERR_RUNTIME, "no NVIDIA driver on this machine: %.300s", dlerror());
  fa_code code = resolve_entry_points(library, error);
  if (code) return code;

  cu_result result = cu.init(0);
  if (result == CU_NO_DEVICE) return driver_fail(error, result, "the NVIDIA driver finds no GPU (CUDA_VISIBLE_DEVICES hides them?)");
  if (result) return driver_fail(error, result, "cuInit");
  if ((result = cu.driver_version(&version))) return driver_fail(error, result, "cuDriverGetVersion");
  if (version < OLDEST_DRIVER)
    return fa_fail(error, FA_ERR_RUNTIME,
                   "the NVIDIA driver is too old: it serves CUDA %d.%d, 12.0 or later is needed (driver 525 or later)", version / 1000,
                   version % 1000 / 10);
  if ((result = cu.device_count(&device_count))) return driver_fail(error, result, "cuDeviceGetCount");
  static int registered;
  if (!registered) registered = pthread_atfork(NULL, NULL, after_fork_in_child) == 0;
  atomic_store_explicit(&opened, 1, memory_order_release);
  return FA_OK;
}

static fa_code read_limits(cu_device handle, int ordinal, fa_device_limits *limits, fa_error *error) {
  const struct {
    int attribute, *value;
  } wanted[] = {
      {CU_ATTR_CC_MAJOR, &limits->cc_major},
      {CU_ATTR_CC_MINOR, &limits->cc_minor},
      {CU_ATTR_SM_COUNT, &limits->sm_count},
      {CU_ATTR_SMEM_PER_BLOCK_OPTIN, &limits->smem_per_block_optin},
      {CU_ATTR_SMEM_PER_SM, &limits->smem_per_sm},
      {CU_ATTR_REGISTERS_PER_SM, &limits->registers_per_sm},
      {CU_ATTR_THREADS_PER_SM, &limits->threads_per_sm},
      {CU_ATTR_L2_BYTES, &limits->l2_bytes},
  };
  limits->ordinal = ordinal;
  cu_result result = cu.device_name(limits->name, sizeof limits->name, handle);
  if (result) return driver_fail(error, result, "cuDeviceGetName of device %d", ordinal);
  for (size_t i = 0; i < sizeof wanted / sizeof wanted[0]; i++)
    if ((result = cu.device_attribute(wanted[i].value, wanted[i].attribute, handle)))
      return driver_fail(error, result, "cuDeviceGetAttribute(%d) of device %d", wanted[i].attribute, ordinal);
  return FA_OK;
}

/* Called with the lock held. */
static fa_code open_device(int ordinal, fa_error *error) {
  device_row *row = &devices[ordinal];
  if (ordinal >= device_count) return fa_fail(error, FA_ERR_RUNTIME, "CUDA device %d: the driver sees %d devices", ordinal, device_count);
  cu_result result = cu.device_get(&row->handle, ordinal);
  if (result) return driver_fail(error, result, "cuDeviceGet(%d)", ordinal);
  fa_code code = read_limits(row->handle, ordinal, &row->limits, error);
  if (code) return code;
  if (!row->context && (result = cu.primary_retain(&row->context, row->handle))) {
    row->context = NULL;
    return driver_fail(error, result, "the primary context of device %d (%s)", ordinal, row->limits.name);
  }
  atomic_store_explicit(&row->ready, 1, memory_order_release);
  return FA_OK;
}

fa_code fa_driver_device(int device, const fa_device_limits **limits, fa_error *error) {
  if (atomic_load_explicit(&forked, memory_order_relaxed)) return refuse_forked_child(error);
  if (device < 0 || device >= FA_MAX_DEVICES)
    return fa_fail(error, FA_ERR_RUNTIME, "CUDA device %d: at most %d devices are served", device, FA_MAX_DEVICES);
  if (!atomic_load_explicit(&devices[device].ready, memory_order_acquire)) {
    pthread_mutex_lock(&lock);
    fa_code code = open_driver(error);
    if (!code && !atomic_load_explicit(&devices[device].ready, memory_order_acquire)) code = open_device(device, error);
    pthread_mutex_unlock(&lock);
    if (code) return code;
  }
  *limits = &devices[device].limits;
  return FA_OK;
}

fa_code fa_driver_count(int *count, fa_error *error) {
  if (atomic_load(&forked)) return refuse_forked_child(error);
  pthread_mutex_lock(&lock);
  fa_code code = open_driver(error);
  pthread_mutex_unlock(&lock);
  *count = code ? 0 : device_count;
  return code;
}

fa_code fa_driver_limits(int device, fa_device_limits *limits, fa_error *error) {
  int count;
  cu_device handle;
  fa_code code = fa_driver_count(&count, error);
  if (code) return code;
  cu_result result = cu.device_get(&handle, device);
  if (result) return driver_fail(error, result, "cuDeviceGet(%d)", device);
  return read_limits(handle, device, limits, error);
}

int fa_driver_version(void) { return atomic_load_explicit(&opened, memory_order_acquire) ? version : 0; }

/* Makes the device's context current for the calls that follow; leave_context undoes it. Threads that torch started have it already. */
static cu_result enter_context(int device, int *pushed) {
  cu_handle current = NULL;
  *pushed = 0;
  cu_result result = cu.context_current(&current);
  if (result || current == devices[device].context) return result;
  result = cu.context_push(devices[device].context);
  *pushed = result == CU_OK;
  return result;
}

static void leave_context(int pushed) {
  cu_handle ours;
  if (pushed) cu.context_pop(&ours);
}

static fa_code check_shared_memory(const fa_kernel *kernel, int dynamic_bytes, const fa_device_limits *limits, fa_error *error) {
  const int needed = kernel->static_smem_bytes + dynamic_bytes;
  if (needed <= limits->smem_per_block_optin) return FA_OK;
  return fa_fail(error, FA_ERR_RUNTIME, "kernel %.300s needs %d bytes of shared memory a block, %s (device %d) has %d", kernel->name,
                 needed, limits->name, limits->ordinal, limits->smem_per_block_optin);
}

/* Called with the device's context current. cuFuncLoad brings the code to the device now: left to the first launch, the driver would do it
 * then, which waits for the device and is refused during capture. */
static fa_code prepare_function(cu_handle library, const char *entry, int dynamic_bytes, fa_kernel *kernel, fa_error *error) {
  cu_handle handle;
  cu_result result;
  const fa_device_limits *limits = &devices[kernel->device].limits;
  if ((result = cu.library_kernel(&handle, library, entry)))
    return driver_fail(error, result, "no function %s in %.300s", entry, kernel->name);
  if ((result = cu.kernel_function(&kernel->function, handle))) return driver_fail(error, result, "loading %.300s", kernel->name);
  if (cu.func_load && (result = cu.func_load(kernel->function))) return driver_fail(error, result, "loading %.300s", kernel->name);
  cu.function_attribute(&kernel->registers, CU_FUNC_REGISTERS, kernel->function);
  cu.function_attribute(&kernel->local_bytes, CU_FUNC_LOCAL_BYTES, kernel->function);
  cu.function_attribute(&kernel->static_smem_bytes, CU_FUNC_STATIC_SMEM, kernel->function);
  fa_code code = check_shared_memory(kernel, dynamic_bytes, limits, error);
  if (code) return code;
  if ((result = cu.function_set_attribute(kernel->function, CU_FUNC_MAX_DYNAMIC_SMEM, dynamic_bytes)))
    return driver_fail(error, result, "%d bytes of shared memory for %.300s", dynamic_bytes, kernel->name);
  return FA_OK;
}

fa_code fa_driver_load(int device, const void *cubin, const char *entry, int dynamic_smem_bytes, const char *name, fa_kernel *kernel,
                       fa_error *error) {
  const fa_device_limits *limits;
  fa_code code = fa_driver_device(device, &limits, error);
  if (code) return code;
  memset(kernel, 0, sizeof *kernel);
  kernel->device = device;
  snprintf(kernel->name, sizeof kernel->name, "%s", name);

  /* A load is among the calls that a capture in global mode, on any thread, forbids; relaxed mode allows them to this thread. */
  int mode = CU_CAPTURE_RELAXED, pushed = 0;
  cu.capture_mode(&mode);
  cu_handle library = NULL;
  cu_result result = enter_context(device, &pushed);
  if (result) code = driver_fail(error, result, "the context of device %d", device);
  if (!code && (result = cu.library_load(&library, cubin, NULL, NULL, 0, NULL, NULL, 0)))
    code = driver_fail(error, result, "loading %.300s", kernel->name);
  if (!code) code = prepare_function(library, entry, dynamic_smem_bytes, kernel, error);
  if (code && library) cu.library_unload(library);
  leave_context(pushed);
  cu.capture_mode(&mode);
  return code;
}

static fa_code launch_fail(const fa_kernel *kernel, const fa_launch_shape *shape, cu_result result, fa_error *error) {
  const unsigned *g = shape->grid, *b = shape->block, *c = shape->cluster;
  return driver_fail(error, result, "launch of %.200s on device %d, grid %u x %u x %u, block %u x %u x %u, cluster %u x %u x %u, %u bytes",
                     kernel->name, kernel->device, g[0], g[1], g[2], b[0], b[1], b[2], c[0], c[1], c[2], shape->smem_bytes);
}

fa_code fa_driver_launch(const fa_kernel *kernel, const fa_launch_shape *shape, void **arguments, fa_error *error) {
  cu_launch_attribute attributes[2];
  cu_launch_config config = {.smem_bytes = shape->smem_bytes, .stream = shape->stream, .attributes = attributes};
  memcpy(config.grid, shape->grid, sizeof config.grid);
  memcpy(config.block, shape->block, sizeof config.block);
  memset(attributes, 0, sizeof attributes);
  if (shape->cluster[0]) {
    cu_launch_attribute *attribute = &attributes[config.attribute_count++];
    attribute->id = CU_LAUNCH_CLUSTER;
    memcpy(attribute->value.cluster, shape->cluster, sizeof shape->cluster);
  }
  if (shape->programmatic) {
    cu_launch_attribute *attribute = &attributes[config.attribute_count++];
    attribute->id = CU_LAUNCH_PROGRAMMATIC;
    attribute->value.programmatic = 1;
  }
  int pushed;
  cu_result result = enter_context(kernel->device, &pushed);
  if (!result) result = cu.launch(&config, kernel->function, arguments, NULL);
  leave_context(pushed);
  return result ? launch_fail(kernel, shape, result, error) : FA_OK;
}

fa_code fa_driver_memset(int device, void *pointer, unsigned char value, size_t bytes, void *stream, fa_error *error) {
  const uint64_t address = (uint64_t)(uintptr_t)pointer;
  const fa_device_limits *limits;
  int pushed;
  if (!bytes) return FA_OK;
  fa_code code = fa_driver_device(device, &limits, error);
  if (code) return code;
  cu_result result = enter_context(device, &pushed);
  if (!result && address % 4 == 0 && bytes % 4 == 0)
    result = cu.memset32(address, value * 0x01010101u, bytes / 4, stream);
  else if (!result)
    result = cu.memset8(address, value, bytes, stream);
  leave_context(pushed);
  return result ? driver_fail(error, result, "filling %zu bytes on device %d", bytes, device) : FA_OK;
}

static int tensor_map_type(fa_dtype dtype) {
  switch (dtype) {
    case FA_F16: return CU_MAP_FLOAT16;
    case FA_BF16: return CU_MAP_BFLOAT16;
    case FA_F32: return CU_MAP_FLOAT32;
    case FA_F64: return CU_MAP_FLOAT64;
    default: return CU_MAP_UINT8;
  }
}

/* A pure host function in the driver: no context, no GPU work. */
/* Some drivers want a context for it, which a thread of autograd may not have. */
fa_code fa_driver_tensor_map(int device, const fa_tensor_map_shape *shape, fa_tensor_map *map, fa_error *error) {
  static const uint32_t element_strides[5] = {1, 1, 1, 1, 1};
  const fa_device_limits *limits;
  int pushed;
  fa_code code = fa_driver_device(device, &limits, error);
  if (code) return code;
  cu_result result = enter_context(device, &pushed);
  if (!result)
    result = cu.tensor_map(map, tensor_map_type(shape->dtype), (uint32_t)shape->rank, shape->base, shape->dims, shape->stride_bytes,
                           shape->box, element_strides, 0, (int)shape->swizzle, (int)shape->l2_promotion, 0);
  leave_context(pushed);
  if (!result) return FA_OK;
  return driver_fail(error, result, "tensor map of rank %d at %p, box %u x %u x %u x %u x %u", shape->rank, shape->base, shape->box[0],
                     shape->box[1], shape->box[2], shape->box[3], shape->box[4]);
}
