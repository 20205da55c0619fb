/* tier_target.h: compile the rest of a file for a given instruction set, whatever flags the build uses. Everything that must run on any
 * CPU (the usable() questions, the choice of a tier) lives in files that do not include this. Standard headers come first, so that
 * no library inline is compiled for the wider machine. */
#ifndef FA_TIER_TARGET_H
#define FA_TIER_TARGET_H

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define FA_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define FA_TARGET_BEGIN(isa) FA_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define FA_TARGET_END _Pragma("clang attribute pop")
#else
#define FA_TARGET_BEGIN(isa) FA_PRAGMA(GCC push_options) FA_PRAGMA(GCC target(isa))
#define FA_TARGET_END _Pragma("GCC pop_options")
#endif

#endif
