/* override.h: constants that a benchmark wants instead of the plan's, to learn what each is worth. */
#ifndef FA_STORE_OVERRIDE_H
#define FA_STORE_OVERRIDE_H

#include "key.h"

/* From now on a kernel that has a constant of one of these names is compiled with this value for it; no list, the start, asks for none. The names are
 * copied. A call under way on another thread may still see the list before. */
fa_code fa_store_override(const fa_constant *constants, int count, fa_error *error);

/* The variant with the constants that are wanted: itself, or *changed with the array `room`. */
const fa_variant *fa_overridden(const fa_variant *variant, fa_variant *changed, fa_constant room[FA_MAX_CONSTANTS]);

#endif
