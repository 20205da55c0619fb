/* ship.c: compiling with no GPU, for the list of shipped kernels and for the tests that read the compiler's log. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "../../core/error.h"
#include "compile.h"
#include "disk.h"

static fa_code compile(const fa_variant *variant, const char *target, fa_key *key, fa_disk_kernel *made, char **log, fa_error *error) {
  fa_nvrtc_info info;
  const fa_arch *arch = fa_arch_named(target);
  *made = (fa_disk_kernel){0};
  *log = NULL;
  if (!arch) return fa_fail(error, FA_ERR_VALUE, "arch: '%.32s' is none of sm_80, sm_86, sm_89, sm_90a, sm_100, sm_120", target);
  fa_code code = fa_key_make(variant, arch, key, error);
  if (!code) code = fa_compile_key(key, arch, 0, &info, &made->cubin, &made->bytes, log, error);
  if (code) return code;
  made->key = key->digest;
  made->nvrtc_version = info.version;
  return FA_OK;
}

fa_code fa_store_compile(const fa_variant *variant, const char *target, void **cubin, size_t *bytes, char **log, fa_error *error) {
  fa_key key;
  fa_disk_kernel made;
  fa_code code = compile(variant, target, &key, &made, log, error);
  *cubin = made.cubin;
  *bytes = made.bytes;
  return code;
}

fa_code fa_store_ship(const fa_variant *variant, const char *target, const char *directory, char *file, size_t file_bytes, char **log,
                      fa_error *error) {
  fa_key key;
  fa_disk_kernel made;
  fa_code code = compile(variant, target, &key, &made, log, error);
  if (code) return code;
  fa_key_file(&key, &key.digest, file, file_bytes);
  int fd = open(directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  int failure = fd < 0 ? errno : fa_disk_write(fd, file, &made);
  if (fd >= 0) close(fd);
  free(made.cubin);
  return failure ? fa_fail(error, FA_ERR_RUNTIME, "%.200s in %.200s: %s", file, directory, strerror(failure)) : FA_OK;
}
