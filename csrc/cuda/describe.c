/* describe.c: what the CUDA side found on this machine, as one JSON object. */
#include <stdarg.h>
#include <stdio.h>

#include "driver.h"
#include "engine.h"
#include "store/key.h"
#include "store/nvrtc.h"

typedef struct {
  char *text;
  size_t bytes, used; /* used may pass bytes: the caller's text was too small */
} writer;

static void __attribute__((format(printf, 2, 3))) put(writer *w, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  const int fits = w->used < w->bytes;
  int n = vsnprintf(fits ? w->text + w->used : NULL, fits ? w->bytes - w->used : 0, format, arguments);
  va_end(arguments);
  if (n > 0) w->used += (size_t)n;
}

static void put_string(writer *w, const char *text) {
  put(w, "\"");
  for (; *text; text++) {
    const unsigned char c = (unsigned char)*text;
    if (c == '"' || c == '\\')
      put(w, "\\%c", c);
    else if (c < 32)
      put(w, "\\u%04x", c);
    else
      put(w, "%c", c);
  }
  put(w, "\"");
}

static void put_member(writer *w, const char *name, const char *text) {
  put(w, ", \"%s\": ", name);
  put_string(w, text);
}

static void put_device(writer *w, int device) {
  fa_error error;
  fa_device_limits limits;
  put(w, "%s{\"index\": %d", device ? ", " : "", device);
  if (fa_driver_limits(device, &limits, &error)) {
    put_member(w, "error", error.message);
  } else {
    const fa_arch *arch = fa_arch_of_device(limits.cc_major, limits.cc_minor);
    put_member(w, "name", limits.name);
    put(w, ", \"compute_capability\": \"%d.%d\"", limits.cc_major, limits.cc_minor);
    put_member(w, "kernels", arch ? arch->target : "none for this architecture");
    put(w, ", \"sm_count\": %d, \"smem_per_block_bytes\": %d, \"l2_bytes\": %d", limits.sm_count, limits.smem_per_block_optin,
        limits.l2_bytes);
  }
  put(w, "}");
}

static void put_driver(writer *w) {
  fa_error error;
  int count = 0;
  const fa_code code = fa_driver_count(&count, &error);
  put(w, "\"driver\": ");
  if (code)
    put(w, "null");
  else
    put(w, "\"%d.%d\"", fa_driver_version() / 1000, fa_driver_version() % 1000 / 10);
  if (code) put_member(w, "driver_error", error.message);
  put(w, ", \"devices\": [");
  for (int i = 0; i < count && i < FA_MAX_DEVICES; i++) put_device(w, i);
  put(w, "]");
}

static void put_nvrtc(writer *w) {
  fa_error error;
  fa_nvrtc_info info;
  if (fa_nvrtc_identify(fa_driver_version(), &info, &error)) {
    put(w, ", \"nvrtc\": null");
    put_member(w, "nvrtc_error", error.message);
    return;
  }
  put(w, ", \"nvrtc\": \"%d.%d\"", info.version / 1000, info.version % 1000 / 10);
  put_member(w, "nvrtc_path", info.path);
}

static void put_store(writer *w) {
  fa_store_stats stats;
  fa_store_read_stats(&stats);
  put_member(w, "cache", stats.cache);
  put_member(w, "shipped_kernels", stats.shipped_from);
  if (stats.note[0]) put_member(w, "note", stats.note);
  put(w,
      ", \"loaded\": {\"all\": %d, \"shipped\": %d, \"cached\": %d, \"compiled\": %d, \"compile_seconds\": %.3f, \"load_seconds\": %.3f}",
      stats.memory, stats.shipped, stats.disk, stats.compiled, stats.compile_seconds, stats.load_seconds);
}

void fa_cuda_describe(char *text, size_t bytes) {
  writer w = {text, bytes, 0};
  put(&w, "{");
  put_driver(&w);
  put_nvrtc(&w);
  put_store(&w);
  put(&w, "}");
  if (w.used >= bytes) snprintf(text, bytes, "{}");
}
