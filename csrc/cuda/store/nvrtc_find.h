/* nvrtc_find.h: where a usable libnvrtc may lie, best place first, without loading any. */
#ifndef FA_NVRTC_FIND_H
#define FA_NVRTC_FIND_H

#include "nvrtc.h"

enum { FA_NVRTC_CANDIDATES = 16, FA_NVRTC_OLDEST = 12, FA_NVRTC_LATEST = 15 }; /* the latter two: major versions looked for */

/* Fills `list` and returns how many there are. version is 0 where only loading the library would tell. The order is: FLASH_ATTN_C_NVRTC
 * (alone, when set), a copy that is mapped already, the site-packages folders of this module, of torch and of the hints, CUDA_HOME,
 * CUDA_PATH, /usr/local/cuda, and the dynamic linker's own path. With a driver_version, later major versions are left out. */
int fa_nvrtc_candidates(int driver_version, fa_nvrtc_info list[FA_NVRTC_CANDIDATES]);

#endif
