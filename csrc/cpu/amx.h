/* amx.h: forward and backward for 16-bit inputs on AMX: the same mathematics as forward.c and backward.c, as products of bf16 tiles. */
#ifndef FA_CPU_AMX_H
#define FA_CPU_AMX_H

#include "../core/problem.h"

#if defined(FA_AMX_EMULATED) || (defined(__x86_64__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11))
#define FA_HAS_AMX 1
#endif

/* The tier in use is the one with AMX. */
int fa_cpu_uses_amx(void);

#ifdef FA_HAS_AMX
/* NULL, or why the passes over float tiles do this problem better. */
const char *fa_amx_unsuited(const fa_problem *problem, fa_direction direction);

fa_code fa_cpu_forward_amx(const fa_problem *problem, fa_error *error);
fa_code fa_cpu_backward_amx(const fa_problem *problem, fa_error *error);

/* For explain. */
int fa_amx_backward_parts(const fa_problem *problem);
size_t fa_amx_workspace(const fa_problem *problem, fa_direction direction);
#else
/* No problem suits passes that are not there, so nothing of the rest is reached. */
static inline const char *fa_amx_unsuited(const fa_problem *problem, fa_direction direction) {
  (void)problem, (void)direction;
  return "the compiler of this build does not know it";
}
#define fa_cpu_forward_amx fa_cpu_forward
#define fa_cpu_backward_amx fa_cpu_backward
#define fa_amx_backward_parts(problem) 1
#define fa_amx_workspace(problem, direction) ((size_t)0)
#endif

#endif
