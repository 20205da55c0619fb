/* cpuid.h: what the processor offers and the operating system has switched on. */
#ifndef FA_CPUID_H
#define FA_CPUID_H

typedef enum {
  FA_CPU_ANY = 0, /* plain C */
  FA_CPU_AVX2,    /* with FMA and F16C */
  FA_CPU_AVX512,  /* F, BW, DQ, VL, with all of FA_CPU_AVX2 */
  FA_CPU_AMX,     /* tiles with bf16 products, AVX512_BF16, all of FA_CPU_AVX512, and the kernel's permission to use tiles */
  FA_CPU_FEATURES
} fa_cpu_feature;

/* Asked of the processor and the system once. Callable before any other function of the library. */
int fa_cpu_has(fa_cpu_feature feature);

#endif
