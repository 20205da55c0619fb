/* sources.h: the kernel files, embedded in the module at build time by setup.py. */
#ifndef FA_SOURCES_H
#define FA_SOURCES_H

typedef struct {
  const char *name; /* "kernels/fwd_sm80.cu", "kernels/ptx.h", "core/mask.h" */
  const char *text;
} fa_embedded_source;

extern const fa_embedded_source fa_embedded_sources[]; /* ends with a row of NULLs */

#endif
