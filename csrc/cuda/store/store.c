/* store.c: variant -> loaded kernel.
 *
 *     memory ---- hit ----> return                          no lock: rows are only ever added, published by one atomic store
 *       | miss: under the build lock, look again, then
 *     shipped cubins ----> load                             key without the compiler: what was tested is what runs
 *     disk cache     ----> load                             key with the compiler
 *     NVRTC          ----> load, write to the disk cache
 *
 * A file that is damaged, or that the driver refuses, is passed over for the next source.
 */
#define _GNU_SOURCE
#include "store.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "../../core/error.h"
#include "compile.h"
#include "disk.h"
#include "override.h"
#include "paths.h"

enum { BUCKETS = 256 };
static const int64_t cache_limit_bytes = (int64_t)1 << 30;

typedef struct row {
  struct row *next;
  uint32_t hash;
  int device, constant_count;
  const char *kernel, *entry; /* literals of the engine, as are the names of constants */
  fa_constant *constants;
  fa_kernel loaded;
} row;

static _Atomic(row *) buckets[BUCKETS];
static pthread_mutex_t build_lock = PTHREAD_MUTEX_INITIALIZER;

static pthread_mutex_t stats_lock = PTHREAD_MUTEX_INITIALIZER;
static fa_store_stats stats;
static char note[sizeof stats.note];
static atomic_int note_waiting;
static char shipped_folder[FA_PATH_BYTES];

static double seconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* ---- what the user is told ---- */

static void __attribute__((format(printf, 1, 2))) leave_note(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  pthread_mutex_lock(&stats_lock);
  if (!note[0]) {
    vsnprintf(note, sizeof note, format, arguments);
    atomic_store_explicit(&note_waiting, 1, memory_order_release);
  }
  pthread_mutex_unlock(&stats_lock);
  va_end(arguments);
}

const char *fa_store_take_note(void) {
  if (!atomic_load_explicit(&note_waiting, memory_order_acquire)) return NULL;
  return atomic_exchange(&note_waiting, 0) ? note : NULL;
}

static void count(int *place, double compile_seconds, double load_seconds) {
  pthread_mutex_lock(&stats_lock);
  ++*place;
  stats.memory++;
  stats.compile_seconds += compile_seconds;
  stats.load_seconds += load_seconds;
  pthread_mutex_unlock(&stats_lock);
}

static int shipped_path(char *path) {
  pthread_mutex_lock(&stats_lock);
  int known = shipped_folder[0] && fa_path_format(path, "%s", shipped_folder);
  pthread_mutex_unlock(&stats_lock);
  char module[FA_PATH_BYTES];
  return known || (fa_path_of_module(module) && fa_path_format(path, "%s/cubins", module));
}

void fa_store_set_shipped(const char *directory) {
  pthread_mutex_lock(&stats_lock);
  fa_path_format(shipped_folder, "%s", directory);
  pthread_mutex_unlock(&stats_lock);
}

void fa_store_read_stats(fa_store_stats *out) {
  int wanted;
  char path[FA_PATH_BYTES], reason[sizeof out->cache];
  pthread_mutex_lock(&stats_lock);
  *out = stats;
  memcpy(out->note, note, sizeof note);
  pthread_mutex_unlock(&stats_lock);
  const int fd = fa_disk_open_cache(0, path, reason, sizeof reason, &wanted);
  snprintf(out->cache, sizeof out->cache, "%s", fd < 0 ? reason : path);
  if (fd >= 0) close(fd);
  if (!shipped_path(out->shipped_from)) out->shipped_from[0] = '\0';
}

/* ---- memory ---- */

static uint32_t hash_text(uint32_t hash, const char *text) {
  for (; *text; text++) hash = (hash ^ (unsigned char)*text) * 16777619u;
  return hash;
}

static uint32_t hash_of(int device, const fa_variant *variant) {
  uint32_t hash = hash_text(hash_text(2166136261u ^ (uint32_t)device, variant->kernel), variant->entry);
  for (int i = 0; i < variant->constant_count; i++) hash = (hash ^ (uint32_t)variant->constants[i].value) * 16777619u;
  return hash ^ hash >> 16;
}

static int same_text(const char *a, const char *b) { return a == b || !strcmp(a, b); }

static int is_row_of(const row *r, uint32_t hash, int device, const fa_variant *variant) {
  if (r->hash != hash || r->device != device || r->constant_count != variant->constant_count) return 0;
  if (!same_text(r->kernel, variant->kernel) || !same_text(r->entry, variant->entry)) return 0;
  for (int i = 0; i < r->constant_count; i++)
    if (r->constants[i].value != variant->constants[i].value || !same_text(r->constants[i].name, variant->constants[i].name)) return 0;
  return 1;
}

static const fa_kernel *find_loaded(uint32_t hash, int device, const fa_variant *variant) {
  for (const row *r = atomic_load_explicit(&buckets[hash % BUCKETS], memory_order_acquire); r; r = r->next)
    if (is_row_of(r, hash, device, variant)) return &r->loaded;
  return NULL;
}

/* Under the build lock. */
static row *new_row(uint32_t hash, int device, const fa_variant *variant) {
  row *r = calloc(1, sizeof *r);
  const size_t bytes = (size_t)variant->constant_count * sizeof(fa_constant);
  if (r) r->constants = malloc(bytes + 1);
  if (!r || !r->constants) {
    free(r);
    return NULL;
  }
  memcpy(r->constants, variant->constants, bytes);
  r->hash = hash;
  r->device = device;
  r->constant_count = variant->constant_count;
  r->kernel = variant->kernel;
  r->entry = variant->entry;
  return r;
}

static const fa_kernel *publish(row *r) {
  _Atomic(row *) *bucket = &buckets[r->hash % BUCKETS];
  r->next = atomic_load_explicit(bucket, memory_order_relaxed);
  atomic_store_explicit(bucket, r, memory_order_release);
  return &r->loaded;
}

/* ---- the other sources, under the build lock ---- */

typedef struct {
  int device;
  const fa_variant *variant;
  const fa_arch *arch;
  fa_key key;
  fa_kernel *kernel; /* to fill */
} request;

static fa_code load(const request *r, const void *cubin, int *place, double compile_seconds, fa_error *error) {
  const double start = seconds();
  fa_code code = fa_driver_load(r->device, cubin, r->variant->entry, r->variant->dynamic_smem_bytes, r->key.name, r->kernel, error);
  if (!code) count(place, compile_seconds, seconds() - start);
  return code;
}

static int load_file(const request *r, int directory, const fa_digest *digest, int own, int *place) {
  char file[NAME_MAX + 1];
  fa_disk_kernel kernel;
  fa_key_file(&r->key, digest, file, sizeof file);
  const fa_disk_status status = fa_disk_read(directory, file, digest, own, &kernel);
  if (status == FA_DISK_DAMAGED && !own) leave_note("the shipped kernel %.300s is damaged; it is compiled again", file);
  if (status != FA_DISK_FOUND) return 0;
  fa_error refused;
  const int fits = kernel.nvrtc_version / 1000 <= fa_driver_version() / 1000 && !load(r, kernel.cubin, place, 0, &refused);
  free(kernel.cubin);
  return fits;
}

static int load_shipped(const request *r) {
  char path[FA_PATH_BYTES];
  if (!shipped_path(path)) return 0;
  int directory = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (directory < 0) return 0;
  const int found = load_file(r, directory, &r->key.digest, 0, &stats.shipped);
  close(directory);
  return found;
}

static int load_cached(const request *r, int directory) {
  fa_nvrtc_info compiler;
  if (directory < 0 || fa_nvrtc_identify(fa_driver_version(), &compiler, NULL)) return 0;
  const fa_digest digest = fa_key_with_compiler(&r->key, compiler.version, compiler.file_bytes);
  return load_file(r, directory, &digest, 1, &stats.disk);
}

static void write_cached(const request *r, int directory, const fa_nvrtc_info *compiler, void *cubin, size_t bytes, const char *path) {
  char file[NAME_MAX + 1];
  const fa_disk_kernel kernel = {fa_key_with_compiler(&r->key, compiler->version, compiler->file_bytes), compiler->version, cubin, bytes};
  fa_key_file(&r->key, &kernel.key, file, sizeof file);
  const int failure = fa_disk_write(directory, file, &kernel);
  if (failure)
    leave_note("the kernel cache %.300s cannot be written (%s): kernels are compiled again in every process", path, strerror(failure));
  fa_disk_trim(directory, cache_limit_bytes);
}

static fa_code compile_and_load(const request *r, int directory, const char *path, fa_error *error) {
  fa_nvrtc_info compiler;
  void *cubin = NULL;
  size_t bytes = 0;
  char *log = NULL;
  const double start = seconds();
  fa_code code = fa_compile_key(&r->key, r->arch, fa_driver_version(), &compiler, &cubin, &bytes, &log, error);
  if (!code) code = load(r, cubin, &stats.compiled, seconds() - start, error);
  if (!code && directory >= 0) write_cached(r, directory, &compiler, cubin, bytes, path);
  free(cubin);
  free(log);
  return code;
}

static fa_code obtain(const request *r, fa_error *error) {
  if (load_shipped(r)) return FA_OK;
  char path[FA_PATH_BYTES], reason[400];
  int wanted;
  const int directory = fa_disk_open_cache(1, path, reason, sizeof reason, &wanted);
  if (directory < 0 && wanted) leave_note("no kernel cache, kernels are compiled again in every process: %s", reason);
  fa_code code = load_cached(r, directory) ? FA_OK : compile_and_load(r, directory, path, error);
  if (directory >= 0) close(directory);
  return code;
}

static fa_code build(uint32_t hash, const fa_device_limits *limits, const fa_variant *variant, const fa_kernel **kernel, fa_error *error) {
  const fa_arch *arch = fa_arch_of_device(limits->cc_major, limits->cc_minor);
  if (!arch)
    return fa_fail(error, FA_ERR_UNSUPPORTED, "%s (device %d) has compute capability %d.%d: kernels exist for 8.x, 9.0, 10.x and 12.x",
                   limits->name, limits->ordinal, limits->cc_major, limits->cc_minor);
  row *r = new_row(hash, limits->ordinal, variant);
  request *wanted = calloc(1, sizeof *wanted);
  fa_code code = r && wanted ? FA_OK : fa_fail(error, FA_ERR_MEMORY, "no memory for the kernel %.200s", variant->kernel);
  if (!code) {
    wanted->device = limits->ordinal;
    wanted->variant = variant;
    wanted->arch = arch;
    wanted->kernel = &r->loaded;
    code = fa_key_make(variant, arch, &wanted->key, error);
  }
  if (!code) code = obtain(wanted, error);
  if (!code) *kernel = publish(r);
  if (code && r) {
    free(r->constants);
    free(r);
  }
  free(wanted);
  return code;
}

fa_code fa_store_get(int device, const fa_variant *variant, const fa_kernel **kernel, fa_error *error) {
  const fa_device_limits *limits;
  fa_variant changed;
  fa_constant room[FA_MAX_CONSTANTS];
  fa_code code = fa_driver_device(device, &limits, error); /* first: it refuses a forked child, where the lock below may be held for ever */
  if (code) return code;
  variant = fa_overridden(variant, &changed, room);
  const uint32_t hash = hash_of(device, variant);
  if ((*kernel = find_loaded(hash, device, variant))) return FA_OK;
  pthread_mutex_lock(&build_lock);
  *kernel = find_loaded(hash, device, variant);
  code = *kernel ? FA_OK : build(hash, limits, variant, kernel, error);
  pthread_mutex_unlock(&build_lock);
  return code;
}
