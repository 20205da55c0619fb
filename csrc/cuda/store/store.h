/* store.h: from a kernel variant to a function loaded on a device. Looks, in this order, in memory, among the cubins shipped with the
 * package, in the disk cache, and at last asks NVRTC.
 */
#ifndef FA_STORE_H
#define FA_STORE_H

#include "../driver.h"

/* A variant: a kernel file with its named constants, -DNAME=VALUE each. Constants come in a fixed order for each kernel. Strings are
 * literals: the store keeps the pointers; the array of constants is copied. */
typedef struct {
  const char *name;
  int value;
} fa_constant;

typedef struct {
  const char *kernel; /* "fwd_sm80": kernels/fwd_sm80.cu */
  const char *entry;  /* its extern "C" __global__ function */
  int constant_count;
  const fa_constant *constants;
  int dynamic_smem_bytes; /* the most that a launch will ask for; follows from the constants, so no part of the key */
} fa_variant;

/* The kernel of a variant on a device; from the second call on about 0.1 us. Legal during graph capture. *kernel stays valid for ever.
 * Calls for other variants go on while one compiles. */
fa_code fa_store_get(int device, const fa_variant *variant, const fa_kernel **kernel, fa_error *error);

/* Compiles with no GPU. `target` is a row's name in the table of architectures ("sm_90a"). *cubin and *log are malloc'ed: free both, also
 * after an error, when they may be NULL. The log carries ptxas' register and spill counts. */
fa_code fa_store_compile(const fa_variant *variant, const char *target, void **cubin, size_t *bytes, char **log, fa_error *error);

/* fa_store_compile, then writes the cubin into `directory` as a shipped kernel. `file` receives its name there. */
fa_code fa_store_ship(const fa_variant *variant, const char *target, const char *directory, char *file, size_t file_bytes, char **log,
                      fa_error *error);

/* Where shipped kernels lie. Without a call: the folder "cubins" beside the module. */
void fa_store_set_shipped(const char *directory);

/* A text for the user the first time there is one (a cache that cannot be used, say), else NULL. Costs one load. */
const char *fa_store_take_note(void);

typedef struct {
  int memory, shipped, disk, compiled; /* kernels found in each place */
  double compile_seconds, load_seconds;
  char cache[512]; /* the folder, or why there is none */
  char shipped_from[512];
  char note[512]; /* "" when all is well */
} fa_store_stats;

void fa_store_read_stats(fa_store_stats *stats);

#endif
