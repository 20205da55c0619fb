/* nvrtc_find.c: the places where wheels, toolkits and users put libnvrtc. */
#define _GNU_SOURCE
#include "nvrtc_find.h"

#include <dirent.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "paths.h"

enum { HINTS = 8 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char hints[HINTS][FA_PATH_BYTES];
static int hint_count;

void fa_nvrtc_hint(const char *directory) {
  pthread_mutex_lock(&lock);
  int known = 0;
  for (int i = 0; i < hint_count; i++) known |= !strcmp(hints[i], directory);
  if (!known && hint_count < HINTS && fa_path_format(hints[hint_count], "%s", directory)) hint_count++;
  pthread_mutex_unlock(&lock);
}

typedef struct {
  fa_nvrtc_info *list;
  int count, latest_major;
} search;

/* The builtins that must lie beside the library carry the whole version in their name. */
static int version_beside(const char *path) {
  char directory[FA_PATH_BYTES];
  int major, minor, version = 0, several = 0;
  if (!fa_path_format(directory, "%s", path) || !fa_path_up(directory, 1)) return 0;
  DIR *dir = opendir(directory);
  if (!dir) return 0;
  for (struct dirent *entry; (entry = readdir(dir));)
    if (sscanf(entry->d_name, "libnvrtc-builtins.so.%d.%d", &major, &minor) == 2) {
      several |= version && version != major * 1000 + minor * 10;
      version = major * 1000 + minor * 10;
    }
  closedir(dir);
  return several ? 0 : version;
}

static void consider(search *s, const char *path) {
  struct stat st;
  char real[4096]; /* PATH_MAX, as realpath writes it */
  if (s->count == FA_NVRTC_CANDIDATES || stat(path, &st) || !S_ISREG(st.st_mode) || !realpath(path, real)) return;
  for (int i = 0; i < s->count; i++)
    if (!strcmp(s->list[i].path, path)) return;
  int version = version_beside(real);
  if (version / 1000 > s->latest_major) return;
  fa_nvrtc_info *info = &s->list[s->count++];
  info->version = version;
  info->file_bytes = st.st_size;
  snprintf(info->path, sizeof info->path, "%s", path);
}

static void consider_folder(search *s, const char *folder) {
  char path[FA_PATH_BYTES];
  for (int major = s->latest_major; major >= FA_NVRTC_OLDEST; major--) {
    if (fa_path_format(path, "%s/libnvrtc.so.%d", folder, major)) consider(s, path);
    if (fa_path_format(path, "%s/nvidia/cu%d/lib/libnvrtc.so.%d", folder, major, major)) consider(s, path);
    if (fa_path_format(path, "%s/nvidia/cuda_nvrtc/lib/libnvrtc.so.%d", folder, major)) consider(s, path);
  }
}

static void consider_mapped(search *s) {
  static const char *const not_the_compiler[] = {"-builtins", ".alt", NULL};
  char path[FA_PATH_BYTES];
  if (fa_path_mapped("libnvrtc", not_the_compiler, path)) consider(s, path);
}

static void consider_site_packages(search *s) {
  static const char *const none[] = {NULL};
  char path[FA_PATH_BYTES];
  if (fa_path_of_module(path) && fa_path_up(path, 1)) consider_folder(s, path);
  if (fa_path_mapped("libc10", none, path) && fa_path_up(path, 3)) consider_folder(s, path);
  pthread_mutex_lock(&lock);
  for (int i = 0; i < hint_count; i++) consider_folder(s, hints[i]);
  pthread_mutex_unlock(&lock);
}

static void consider_toolkits(search *s) {
  const char *const roots[] = {getenv("CUDA_HOME"), getenv("CUDA_PATH"), "/usr/local/cuda"};
  char path[FA_PATH_BYTES];
  for (size_t i = 0; i < sizeof roots / sizeof roots[0]; i++)
    if (roots[i] && fa_path_format(path, "%s/lib64", roots[i])) consider_folder(s, path);
}

/* Only the dynamic linker knows where these are, so nothing is known of them before they are loaded. */
static void add_linker_names(search *s) {
  for (int major = s->latest_major; major >= FA_NVRTC_OLDEST && s->count < FA_NVRTC_CANDIDATES; major--) {
    fa_nvrtc_info *info = &s->list[s->count++];
    memset(info, 0, sizeof *info);
    snprintf(info->path, sizeof info->path, "libnvrtc.so.%d", major);
  }
}

int fa_nvrtc_candidates(int driver_version, fa_nvrtc_info list[FA_NVRTC_CANDIDATES]) {
  const int driver_major = driver_version / 1000;
  search s = {list, 0, driver_major && driver_major < FA_NVRTC_LATEST ? driver_major : FA_NVRTC_LATEST};
  const char *wanted = getenv("FLASH_ATTN_C_NVRTC");
  if (wanted && *wanted) {
    consider(&s, wanted);
    consider_folder(&s, wanted);
    return s.count;
  }
  consider_mapped(&s);
  consider_site_packages(&s);
  consider_toolkits(&s);
  add_linker_names(&s);
  return s.count;
}
