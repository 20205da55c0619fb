/* key.c: variant and architecture -> compiler options, name, digest. */
#include "key.h"

#include <stdio.h>
#include <string.h>

#include "../../core/error.h"
#include "sources.h"

/* Goes up when the arguments of kernels or the meaning of a constant change without their text changing. */
static const char abi_name[] = "flash_attn_c kernels, abi 1";

/* Latest first: the first row that a device can run is its best. Only 9.0 has an `a` row: its matrix instructions exist there alone. */
static const fa_arch arch_rows[] = {
    {12, 0, "sm_120", 12080}, {10, 0, "sm_100", 12080}, {9, 0, "sm_90a", 12000},
    {8, 9, "sm_89", 12000},   {8, 6, "sm_86", 12000},   {8, 0, "sm_80", 12000},
};
enum { ARCH_COUNT = sizeof arch_rows / sizeof arch_rows[0] };

const fa_arch *fa_arch_of_device(int cc_major, int cc_minor) {
  for (int i = 0; i < ARCH_COUNT; i++) {
    const fa_arch *row = &arch_rows[i];
    const int exact = strchr(row->target, 'a') != NULL;
    if (row->cc_major == cc_major && (exact ? row->cc_minor == cc_minor : row->cc_minor <= cc_minor)) return row;
  }
  return NULL;
}

const fa_arch *fa_arch_named(const char *target) {
  for (int i = 0; i < ARCH_COUNT; i++)
    if (!strcmp(arch_rows[i].target, target)) return &arch_rows[i];
  return NULL;
}

static const char *find_source(const char *kernel) {
  char name[128];
  snprintf(name, sizeof name, "kernels/%s.cu", kernel);
  for (const fa_embedded_source *s = fa_embedded_sources; s->name; s++)
    if (!strcmp(s->name, name)) return s->text;
  return NULL;
}

static int add_option(fa_key *key, const char *text) {
  const size_t bytes = strlen(text) + 1;
  if (bytes > FA_OPTION_BYTES || key->option_count == FA_MAX_OPTIONS) return 0;
  char *option = key->option_text[key->option_count];
  memcpy(option, text, bytes);
  key->options[key->option_count++] = option;
  return 1;
}

static fa_code write_options(const fa_variant *variant, const fa_arch *arch, fa_key *key, fa_error *error) {
  char text[FA_OPTION_BYTES * 2];
  snprintf(text, sizeof text, "--gpu-architecture=%s", arch->target);
  add_option(key, text);
  add_option(key, "--std=c++17");
  add_option(key, "--ptxas-options=-v");
  add_option(key, "--diag-suppress=177"); /* a helper in a shared header that this kernel does not call */
  if (variant->constant_count > FA_MAX_CONSTANTS)
    return fa_fail(error, FA_ERR_RUNTIME, "kernel %s: %d constants, at most %d fit", variant->kernel, variant->constant_count,
                   FA_MAX_CONSTANTS);
  for (int i = 0; i < variant->constant_count; i++) {
    const fa_constant *c = &variant->constants[i];
    snprintf(text, sizeof text, "-D%s=%d", c->name, c->value);
    if (!add_option(key, text))
      return fa_fail(error, FA_ERR_RUNTIME, "kernel %s: constant name %.64s... is too long", variant->kernel, c->name);
  }
  return FA_OK;
}

static void write_name(const fa_variant *variant, const fa_arch *arch, fa_key *key) {
  size_t used = 0;
  const size_t room = sizeof key->name;
  int n = snprintf(key->name, room, "%s", variant->kernel);
  if (strcmp(variant->kernel, variant->entry) && n >= 0 && (size_t)n < room)
    n += snprintf(key->name + n, room - (size_t)n, ".%s", variant->entry);
  used = n < 0 ? 0 : (size_t)n;
  for (int i = 0; i < variant->constant_count && used < room; i++)
    used += (size_t)snprintf(key->name + used, room - used, "-%s=%d", variant->constants[i].name, variant->constants[i].value);
  if (used < room) snprintf(key->name + used, room - used, "-%s", arch->target);
}

/* Each field with its length before it, so that no two lists of fields give one stream. */
static void feed_text(fa_sha256 *hash, const char *text) {
  const uint64_t bytes = strlen(text);
  fa_sha256_feed(hash, &bytes, sizeof bytes);
  fa_sha256_feed(hash, text, bytes);
}

static void write_digest(const fa_variant *variant, fa_key *key) {
  fa_sha256 hash;
  fa_sha256_start(&hash);
  feed_text(&hash, abi_name);
  feed_text(&hash, variant->entry);
  feed_text(&hash, key->source);
  for (const fa_embedded_source *s = fa_embedded_sources; s->name; s++) {
    const size_t length = strlen(s->name);
    if (length < 2 || strcmp(s->name + length - 2, ".h")) continue;
    feed_text(&hash, s->name);
    feed_text(&hash, s->text);
  }
  for (int i = 0; i < key->option_count; i++) feed_text(&hash, key->options[i]);
  key->digest = fa_sha256_end(&hash);
}

fa_code fa_key_make(const fa_variant *variant, const fa_arch *arch, fa_key *key, fa_error *error) {
  key->option_count = 0;
  key->source = find_source(variant->kernel);
  if (!key->source) return fa_fail(error, FA_ERR_RUNTIME, "no kernel file %.64s.cu in this build", variant->kernel);
  fa_code code = write_options(variant, arch, key, error);
  if (code) return code;
  write_name(variant, arch, key);
  write_digest(variant, key);
  return FA_OK;
}

fa_digest fa_key_with_compiler(const fa_key *key, int nvrtc_version, int64_t nvrtc_file_bytes) {
  const int64_t compiler[2] = {nvrtc_version, nvrtc_file_bytes};
  fa_sha256 hash;
  fa_sha256_start(&hash);
  fa_sha256_feed(&hash, key->digest.bytes, sizeof key->digest.bytes);
  fa_sha256_feed(&hash, compiler, sizeof compiler);
  return fa_sha256_end(&hash);
}

void fa_key_file(const fa_key *key, const fa_digest *digest, char *file, size_t bytes) {
  char hex[17];
  for (int i = 0; i < 8; i++) snprintf(hex + 2 * i, 3, "%02x", digest->bytes[i]);
  snprintf(file, bytes, "%.180s-%s.cubin", key->name, hex);
}
