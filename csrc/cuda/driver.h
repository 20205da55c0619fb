/* driver.h: everything this library asks of the CUDA driver, and the only file that does. libcuda is opened on the first call with a
 * CUDA tensor, never at import. The primary context is retained and kept, so it is the one that torch uses too.
 *
 * Every function is thread-safe, allocates no GPU memory and never waits for the GPU.
 */
#ifndef FA_CUDA_DRIVER_H
#define FA_CUDA_DRIVER_H

#include "../flash_attn.h"

enum { FA_MAX_DEVICES = 64, FA_KERNEL_NAME_BYTES = 400 };

/* What a plan may depend on. Read once for each device. */
typedef struct {
  int ordinal;
  int cc_major, cc_minor;
  int sm_count;
  int smem_per_block_optin, smem_per_sm; /* bytes */
  int registers_per_sm, threads_per_sm;
  int l2_bytes;
  char name[64];
} fa_device_limits;

/* A kernel loaded on one device, ready to launch, also inside graph capture. Never unloaded. */
typedef struct {
  void *function;
  int device;
  int registers, local_bytes, static_smem_bytes; /* as the driver reports them */
  char name[FA_KERNEL_NAME_BYTES];               /* its key, for messages and explain */
} fa_kernel;

typedef struct {
  unsigned grid[3], block[3];
  unsigned cluster[3]; /* all zero: no cluster */
  unsigned smem_bytes; /* dynamic */
  int programmatic;    /* may start before the kernel ahead of it in the stream has ended; it must griddepcontrol.wait first */
  void *stream;
} fa_launch_shape;

/* A TMA descriptor: passed to a kernel by value. */
typedef struct {
  _Alignas(64) unsigned char opaque[128];
} fa_tensor_map;

typedef enum { FA_SWIZZLE_NONE = 0, FA_SWIZZLE_32B, FA_SWIZZLE_64B, FA_SWIZZLE_128B } fa_swizzle;
typedef enum { FA_L2_NONE = 0, FA_L2_64B, FA_L2_128B, FA_L2_256B } fa_l2_promotion;

/* dim 0 is contiguous; elements out of bounds read as zero and are not written. */
typedef struct {
  fa_dtype dtype; /* F16, BF16, F32, F64, or a type of one byte */
  int rank;       /* 1 to 5 */
  void *base;     /* 16-byte aligned */
  uint64_t dims[5];
  uint64_t stride_bytes[4]; /* of dims 1, 2, ...: multiples of 16 */
  uint32_t box[5];
  fa_swizzle swizzle;
  fa_l2_promotion l2_promotion;
} fa_tensor_map_shape;

/* Opens the driver and the device when they are not open yet. *limits stays valid for ever. */
fa_code fa_driver_device(int device, const fa_device_limits **limits, fa_error *error);

/* Loads a cubin on a device, in any capture state of any stream. The name is copied. Fails before the driver would when the kernel needs
 * more shared memory than a block can have. */
fa_code fa_driver_load(int device, const void *cubin, const char *entry, int dynamic_smem_bytes, const char *name, fa_kernel *kernel,
                       fa_error *error);

/* THE launch. `arguments` points to the address of each kernel parameter. */
fa_code fa_driver_launch(const fa_kernel *kernel, const fa_launch_shape *shape, void **arguments, fa_error *error);

fa_code fa_driver_memset(int device, void *pointer, unsigned char value, size_t bytes, void *stream, fa_error *error);
fa_code fa_driver_tensor_map(int device, const fa_tensor_map_shape *shape, fa_tensor_map *map, fa_error *error);

/* CUDA version of the open driver as 1000 * major + 10 * minor, 0 when it is not open. */
int fa_driver_version(void);

/* For describe: these open the driver, but take no context and so no GPU memory. */
fa_code fa_driver_count(int *devices, fa_error *error);
fa_code fa_driver_limits(int device, fa_device_limits *limits, fa_error *error);

#endif
