/* disk.h: kernels as files. A file is a header with the key's digest and the payload's, then the packed cubin. */
#ifndef FA_STORE_DISK_H
#define FA_STORE_DISK_H

#include "sha256.h"

typedef struct {
  fa_digest key;
  int nvrtc_version; /* that compiled it */
  void *cubin;       /* malloc'ed by fa_disk_read */
  size_t bytes;
} fa_disk_kernel;

/* Opens the user's cache folder: FLASH_ATTN_C_CACHE, else $XDG_CACHE_HOME/flash_attn_c, else ~/.cache/flash_attn_c; `make`: makes it
 * where need be. Returns a directory's file descriptor, or -1 with the reason; `wanted` tells whether that is a fault (1) or the user's
 * choice (0, FLASH_ATTN_C_CACHE=off). The folder must be a real one, mode 0700, owned by the user: what lies in it is run. */
int fa_disk_open_cache(int make, char *path, char *reason, size_t reason_bytes, int *wanted);

typedef enum { FA_DISK_FOUND, FA_DISK_ABSENT, FA_DISK_DAMAGED } fa_disk_status;

/* Reads a file of that key. check_owner: only a file of the user's own will do. */
fa_disk_status fa_disk_read(int directory, const char *file, const fa_digest *key, int check_owner, fa_disk_kernel *kernel);

/* Writes under a temporary name, syncs, renames. Returns 0 or errno. */
int fa_disk_write(int directory, const char *file, const fa_disk_kernel *kernel);

/* Removes the files that were not used for the longest time until the folder holds at most `bytes`, and temporary files that a killed
 * process left an hour ago or more. */
void fa_disk_trim(int directory, int64_t bytes);

#endif
