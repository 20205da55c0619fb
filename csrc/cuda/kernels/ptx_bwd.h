/* ptx_bwd.h: the instructions that only the backward kernels use, as in ptx.h. */
#ifndef FA_PTX_BWD_H
#define FA_PTX_BWD_H

#include "../../core/portable.h"

/* One lane adds four neighbouring floats at once: from sm_90 on. */
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define FA_VECTOR_RED 1
#else
#define FA_VECTOR_RED 0
#endif

FA_INLINE void red_global_add_f32(float *address, float x) {
  asm volatile("red.global.add.f32 [%0], %1;" ::"l"(address), "f"(x) : "memory");
}

#if FA_VECTOR_RED
FA_INLINE void red_global_add_v4_f32(float *address, const float x[4]) {
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(address), "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]) : "memory");
}
#else
FA_INLINE void red_global_add_v4_f32(float *address, const float x[4]) {
  for (int i = 0; i < 4; i++) red_global_add_f32(address + i, x[i]);
}
#endif

#endif
