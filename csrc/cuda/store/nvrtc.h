/* nvrtc.h: NVIDIA's run-time compiler, found on the machine and opened on first need. */
#ifndef FA_NVRTC_H
#define FA_NVRTC_H

#include <stddef.h>
#include <stdint.h>

#include "../../flash_attn.h"
#include "paths.h"

typedef struct {
  int version;        /* 1000 * major + 10 * minor, as the driver counts */
  int64_t file_bytes; /* tells patch releases of one version apart */
  char path[FA_PATH_BYTES];
} fa_nvrtc_info;

typedef struct {
  const char *name, *text;
} fa_include;

/* One translation unit. */
typedef struct {
  const char *name, *text;
  int include_count;
  const fa_include *includes;
  int option_count;
  const char *const *options;
} fa_compile_job;

/* A directory to search, such as site-packages: copied. Later hints are searched later; more than a few are ignored. */
void fa_nvrtc_hint(const char *directory);

/* Which NVRTC an fa_nvrtc_open would use, without loading its 100 MB where the files around it tell the version. */
fa_code fa_nvrtc_identify(int driver_version, fa_nvrtc_info *info, fa_error *error);

/* Opens NVRTC when it is not open yet. driver_version 0: any NVRTC will do; else only one whose cubins that driver loads. */
fa_code fa_nvrtc_open(int driver_version, fa_nvrtc_info *info, fa_error *error);

/* *cubin and *log are malloc'ed, and NULL when there is none; the log is there also after a failed compilation. */
fa_code fa_nvrtc_compile(const fa_compile_job *job, void **cubin, size_t *bytes, char **log, fa_error *error);

#endif
