/* compile.c: hands a kernel's text, its headers under every name that an #include gives them, and its options to NVRTC. */
#include "compile.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../core/error.h"
#include "sources.h"

enum { MOST_HEADERS = 32, NAME_BYTES = 96 };

typedef struct {
  int count;
  char names[3 * MOST_HEADERS][NAME_BYTES];
  fa_include includes[3 * MOST_HEADERS];
} header_set;

static void add_header(header_set *set, const char *directory, const char *name, const char *text) {
  if (set->count == 3 * MOST_HEADERS) return;
  snprintf(set->names[set->count], NAME_BYTES, "%s%s", directory, name);
  set->includes[set->count] = (fa_include){set->names[set->count], text};
  set->count++;
}

/* kernels/X.h is included as "X.h"; core/X.h as "../../core/X.h" by kernels and as "X.h" by its neighbours. */
static void collect_headers(header_set *set) {
  set->count = 0;
  for (const fa_embedded_source *s = fa_embedded_sources; s->name; s++) {
    const char *slash = strrchr(s->name, '/'), *name = slash ? slash + 1 : s->name;
    const size_t length = strlen(name);
    if (length < 2 || strcmp(name + length - 2, ".h")) continue;
    add_header(set, "", name, s->text);
    if (!strncmp(s->name, "core/", 5)) add_header(set, "../../core/", name, s->text);
  }
}

fa_code fa_compile_key(const fa_key *key, const fa_arch *arch, int driver_version, fa_nvrtc_info *info, void **cubin, size_t *bytes,
                       char **log, fa_error *error) {
  *cubin = NULL;
  *log = NULL;
  fa_code code = fa_nvrtc_open(driver_version, info, error);
  if (code) return code;
  if (info->version < arch->least_nvrtc)
    return fa_fail(error, FA_ERR_RUNTIME,
                   "NVRTC %d.%d (%.200s) cannot compile for %s: version %d.%d or later is needed, FLASH_ATTN_C_NVRTC can name one",
                   info->version / 1000, info->version % 1000 / 10, info->path, arch->target, arch->least_nvrtc / 1000,
                   arch->least_nvrtc % 1000 / 10);
  header_set *headers = malloc(sizeof *headers);
  if (!headers) return fa_fail(error, FA_ERR_MEMORY, "%zu bytes for the headers of %.200s", sizeof *headers, key->name);
  collect_headers(headers);
  const fa_compile_job job = {key->name, key->source, headers->count, headers->includes, key->option_count, key->options};
  code = fa_nvrtc_compile(&job, cubin, bytes, log, error);
  free(headers);
  return code;
}
