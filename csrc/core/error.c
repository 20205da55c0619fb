/* error.c: one place that writes an fa_error. */
#include "error.h"

#include <stdarg.h>
#include <stdio.h>

fa_code fa_fail(fa_error *error, fa_code code, const char *format, ...) {
  if (!error) return code;
  va_list arguments;
  va_start(arguments, format);
  error->code = code;
  vsnprintf(error->message, sizeof error->message, format, arguments);
  va_end(arguments);
  return code;
}
