/* compile.h: a key to machine code, by NVRTC. */
#ifndef FA_STORE_COMPILE_H
#define FA_STORE_COMPILE_H

#include "key.h"
#include "nvrtc.h"

/* Opens NVRTC (for the driver of that version, 0: for any) and compiles. *info tells which NVRTC it was. *cubin and *log are
 * fa_nvrtc_compile's. */
fa_code fa_compile_key(const fa_key *key, const fa_arch *arch, int driver_version, fa_nvrtc_info *info, void **cubin, size_t *bytes,
                       char **log, fa_error *error);

#endif
