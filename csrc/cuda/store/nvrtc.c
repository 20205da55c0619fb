/* nvrtc.c: opens NVRTC and runs one compilation. */
#define _GNU_SOURCE
#include "nvrtc.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "../../core/error.h"
#include "nvrtc_find.h"
#include "paths.h"

typedef void *program; /* nvrtcProgram */

static struct {
  const char *(*error_string)(int result);
  int (*version)(int *major, int *minor);
  int (*create)(program *p, const char *text, const char *name, int headers, const char *const *header_texts,
                const char *const *header_names);
  int (*destroy)(program *p);
  int (*compile)(program p, int options, const char *const *option_texts);
  int (*log_size)(program p, size_t *bytes);
  int (*log)(program p, char *text);
  int (*cubin_size)(program p, size_t *bytes);
  int (*cubin)(program p, char *bytes);
} rtc;

/* `opened` is stored last, with release, under the lock. Compilations take no lock: NVRTC is thread-safe. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static atomic_int opened;
static fa_nvrtc_info open_info;

static int resolve(void *library) {
  const struct {
    const char *symbol;
    void *slot;
  } wanted[] = {
      {"nvrtcGetErrorString", &rtc.error_string}, {"nvrtcVersion", &rtc.version},         {"nvrtcCreateProgram", &rtc.create},
      {"nvrtcDestroyProgram", &rtc.destroy},      {"nvrtcCompileProgram", &rtc.compile},  {"nvrtcGetProgramLogSize", &rtc.log_size},
      {"nvrtcGetProgramLog", &rtc.log},           {"nvrtcGetCUBINSize", &rtc.cubin_size}, {"nvrtcGetCUBIN", &rtc.cubin},
  };
  for (size_t i = 0; i < sizeof wanted / sizeof wanted[0]; i++) {
    void *symbol = dlsym(library, wanted[i].symbol);
    if (!symbol) return 0;
    memcpy(wanted[i].slot, &symbol, sizeof symbol);
  }
  return 1;
}

static int serves(const fa_nvrtc_info *info, int driver_version) {
  return info->version / 1000 >= FA_NVRTC_OLDEST && (!driver_version || info->version / 1000 <= driver_version / 1000);
}

/* NVRTC opens its builtins by bare name, and wheels carry no run path: mapped beforehand, they are found under that name. */
static void map_builtins(const char *path, int major, int minor) {
  char builtins[FA_PATH_BYTES], folder[FA_PATH_BYTES];
  if (fa_path_format(folder, "%s", path) && fa_path_up(folder, 1) &&
      fa_path_format(builtins, "%s/libnvrtc-builtins.so.%d.%d", folder, major, minor))
    dlopen(builtins, RTLD_NOW | RTLD_LOCAL);
}

/* Loads one candidate and completes what is known of it. */
static int try_candidate(const fa_nvrtc_info *candidate, int driver_version) {
  void *library = dlopen(candidate->path, RTLD_NOW | RTLD_LOCAL);
  if (!library) return 0;
  int major = 0, minor = 0;
  if (resolve(library) && rtc.version(&major, &minor) == 0) {
    Dl_info where;
    struct stat st;
    open_info = *candidate;
    open_info.version = major * 1000 + minor * 10;
    if (dladdr(*(void **)&rtc.version, &where) && where.dli_fname) {
      fa_path_format(open_info.path, "%s", where.dli_fname);
      map_builtins(where.dli_fname, major, minor);
      if (!stat(where.dli_fname, &st)) open_info.file_bytes = st.st_size;
    }
    if (serves(&open_info, driver_version)) return 1;
  }
  dlclose(library);
  return 0;
}

static fa_code not_found(int driver_version, fa_error *error) {
  const char *wanted = getenv("FLASH_ATTN_C_NVRTC");
  if (wanted && *wanted)
    return fa_fail(error, FA_ERR_RUNTIME, "FLASH_ATTN_C_NVRTC=%.200s is no NVRTC library of CUDA 12.0 or later%s, nor a folder with one",
                   wanted, driver_version ? " that this driver serves" : "");
  const char *package = driver_version / 1000 == 12 ? "nvidia-cuda-nvrtc-cu12" : "nvidia-cuda-nvrtc";
  return fa_fail(error, FA_ERR_RUNTIME, "NVRTC (libnvrtc.so) was not found: pip install %s, or set FLASH_ATTN_C_NVRTC to the library",
                 package);
}

static fa_code already_open(int driver_version, fa_nvrtc_info *info, fa_error *error) {
  *info = open_info;
  if (serves(&open_info, driver_version)) return FA_OK;
  return fa_fail(error, FA_ERR_RUNTIME,
                 "the NVRTC in use (%.200s, CUDA %d.%d) is newer than the driver (CUDA %d.%d): update the driver, or set "
                 "FLASH_ATTN_C_NVRTC to one of CUDA %d",
                 info->path, info->version / 1000, info->version % 1000 / 10, driver_version / 1000, driver_version % 1000 / 10,
                 driver_version / 1000);
}

fa_code fa_nvrtc_open(int driver_version, fa_nvrtc_info *info, fa_error *error) {
  if (!atomic_load_explicit(&opened, memory_order_acquire)) {
    fa_nvrtc_info list[FA_NVRTC_CANDIDATES];
    pthread_mutex_lock(&lock);
    const int count = atomic_load_explicit(&opened, memory_order_relaxed) ? 0 : fa_nvrtc_candidates(driver_version, list);
    for (int i = 0; i < count && !atomic_load_explicit(&opened, memory_order_relaxed); i++)
      if (try_candidate(&list[i], driver_version)) atomic_store_explicit(&opened, 1, memory_order_release);
    pthread_mutex_unlock(&lock);
    if (!atomic_load_explicit(&opened, memory_order_acquire)) return not_found(driver_version, error);
  }
  return already_open(driver_version, info, error);
}

fa_code fa_nvrtc_identify(int driver_version, fa_nvrtc_info *info, fa_error *error) {
  if (!atomic_load_explicit(&opened, memory_order_acquire)) {
    fa_nvrtc_info list[FA_NVRTC_CANDIDATES];
    if (fa_nvrtc_candidates(driver_version, list) && list[0].version && serves(&list[0], driver_version)) {
      *info = list[0];
      return FA_OK;
    }
  }
  return fa_nvrtc_open(driver_version, info, error);
}

static char *read_log(program p) {
  size_t bytes = 0;
  if (rtc.log_size(p, &bytes)) return NULL;
  char *text = calloc(bytes + 1, 1);
  if (text && bytes && rtc.log(p, text)) text[0] = '\0';
  return text;
}

static fa_code read_cubin(program p, const char *name, void **cubin, size_t *bytes, fa_error *error) {
  int result = rtc.cubin_size(p, bytes);
  if (result || !*bytes) return fa_fail(error, FA_ERR_RUNTIME, "NVRTC gave no code for %.200s: %s", name, rtc.error_string(result));
  if (!(*cubin = malloc(*bytes))) return fa_fail(error, FA_ERR_MEMORY, "%zu bytes for the code of %.200s", *bytes, name);
  if ((result = rtc.cubin(p, *cubin)))
    return fa_fail(error, FA_ERR_RUNTIME, "NVRTC gave no code for %.200s: %s", name, rtc.error_string(result));
  return FA_OK;
}

/* The first error line: the rest is in the log. */
static fa_code compile_failed(const char *name, int result, const char *log, fa_error *error) {
  const char *line = log ? strstr(log, "error") : NULL;
  while (line && line > log && line[-1] != '\n') line--;
  const int length = line ? (int)strcspn(line, "\n") : 0;
  return fa_fail(error, FA_ERR_RUNTIME, "NVRTC %d.%d could not compile %.150s: %s%s%.*s", open_info.version / 1000,
                 open_info.version % 1000 / 10, name, rtc.error_string(result), line ? ": " : "", length < 220 ? length : 220,
                 line ? line : "");
}

fa_code fa_nvrtc_compile(const fa_compile_job *job, void **cubin, size_t *bytes, char **log, fa_error *error) {
  enum { MOST_INCLUDES = 96 };
  const char *texts[MOST_INCLUDES], *names[MOST_INCLUDES];
  *cubin = NULL;
  *bytes = 0;
  *log = NULL;
  if (job->include_count > MOST_INCLUDES)
    return fa_fail(error, FA_ERR_RUNTIME, "%d headers, at most %d fit", job->include_count, MOST_INCLUDES);
  for (int i = 0; i < job->include_count; i++) {
    names[i] = job->includes[i].name;
    texts[i] = job->includes[i].text;
  }
  program p = NULL;
  int result = rtc.create(&p, job->text, job->name, job->include_count, texts, names);
  if (result) return fa_fail(error, FA_ERR_RUNTIME, "NVRTC refused %.200s: %s", job->name, rtc.error_string(result));
  result = rtc.compile(p, job->option_count, job->options);
  *log = read_log(p);
  fa_code code = result ? compile_failed(job->name, result, *log, error) : read_cubin(p, job->name, cubin, bytes, error);
  rtc.destroy(&p);
  if (code) {
    free(*cubin);
    *cubin = NULL;
  }
  return code;
}
