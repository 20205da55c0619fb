/* key.h: what a compiled kernel depends on, as a name for people and a digest for machines. */
#ifndef FA_STORE_KEY_H
#define FA_STORE_KEY_H

#include "sha256.h"
#include "store.h"

enum { FA_MAX_CONSTANTS = 64, FA_MAX_OPTIONS = FA_MAX_CONSTANTS + 8, FA_OPTION_BYTES = 96 };

/* Kernels compiled for a row run on every device of its major version with this minor or a later one. */
typedef struct {
  int cc_major, cc_minor;
  const char *target; /* as NVRTC names it */
  int least_nvrtc;    /* the first version that knows it, 1000 * major + 10 * minor */
} fa_arch;

const fa_arch *fa_arch_of_device(int cc_major, int cc_minor); /* NULL: no kernel of ours runs there */
const fa_arch *fa_arch_named(const char *target);             /* NULL: no such row */

typedef struct {
  const char *source;              /* text of kernels/KERNEL.cu */
  char name[FA_KERNEL_NAME_BYTES]; /* "fwd_sm80-HEAD_DIM=128-...-sm_90a" */
  char option_text[FA_MAX_OPTIONS][FA_OPTION_BYTES];
  const char *options[FA_MAX_OPTIONS]; /* for the compiler */
  int option_count;
  fa_digest digest; /* of source, headers, options, architecture and our own ABI: all but the compiler */
} fa_key;

/* Fails when there is no such kernel file or a name in the variant is too long. */
fa_code fa_key_make(const fa_variant *variant, const fa_arch *arch, fa_key *key, fa_error *error);

/* The digest with the compiler in it: the disk cache's key. */
fa_digest fa_key_with_compiler(const fa_key *key, int nvrtc_version, int64_t nvrtc_file_bytes);

/* "NAME-0123456789abcdef.cubin", the name shortened to what a file name can hold. */
void fa_key_file(const fa_key *key, const fa_digest *digest, char *file, size_t bytes);

#endif
