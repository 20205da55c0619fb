/* paths.c: questions to the dynamic linker about files. */
#define _GNU_SOURCE
#include "paths.h"

#include <dlfcn.h>
#include <link.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

int fa_path_format(char *path, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  int length = vsnprintf(path, FA_PATH_BYTES, format, arguments);
  va_end(arguments);
  return length >= 0 && length < FA_PATH_BYTES;
}

int fa_path_up(char *path, int levels) {
  for (; levels > 0; levels--) {
    char *slash = strrchr(path, '/');
    if (!slash || slash == path) return 0;
    *slash = '\0';
  }
  return 1;
}

int fa_path_of_module(char *directory) {
  static const char here = 0;
  Dl_info info;
  return dladdr(&here, &info) && info.dli_fname && fa_path_format(directory, "%s", info.dli_fname) && fa_path_up(directory, 1);
}

typedef struct {
  const char *prefix;
  const char *const *excluded;
  char *path;
} mapped_query;

static int is_wanted(struct dl_phdr_info *library, size_t size, void *context) {
  (void)size;
  const mapped_query *query = context;
  const char *slash = library->dlpi_name ? strrchr(library->dlpi_name, '/') : NULL;
  if (!slash || strncmp(slash + 1, query->prefix, strlen(query->prefix))) return 0;
  for (const char *const *word = query->excluded; *word; word++)
    if (strstr(slash, *word)) return 0;
  return fa_path_format(query->path, "%s", library->dlpi_name);
}

int fa_path_mapped(const char *prefix, const char *const *excluded, char *path) {
  mapped_query query = {prefix, excluded, path};
  return dl_iterate_phdr(is_wanted, &query);
}
