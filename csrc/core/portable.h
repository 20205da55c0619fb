/* portable.h: what the headers that both the host compiler and NVRTC read need to agree on. No other include is allowed there. */
#ifndef FA_PORTABLE_H
#define FA_PORTABLE_H

#ifdef __CUDACC_RTC__
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
typedef int int32_t;
typedef long long int64_t;
#define FA_INLINE __device__ __forceinline__
#else
#include <stdint.h>
#define FA_INLINE static inline
#endif

FA_INLINE int fa_min(int a, int b) { return a < b ? a : b; }
FA_INLINE int fa_max(int a, int b) { return a > b ? a : b; }
FA_INLINE int fa_ceil_div(int a, int b) { return (a + b - 1) / b; }

#endif
