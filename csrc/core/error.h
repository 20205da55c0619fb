/* error.h: errors are values. The message is made where the fact is known, in the caller's names and numbers. */
#ifndef FA_ERROR_H
#define FA_ERROR_H

#include "../flash_attn.h"

/* Fills *error (which may be NULL) and returns code, so that a check reads `return fa_fail(error, FA_ERR_VALUE, "k: ...")`. */
fa_code fa_fail(fa_error *error, fa_code code, const char *format, ...) __attribute__((format(printf, 3, 4)));

#endif
