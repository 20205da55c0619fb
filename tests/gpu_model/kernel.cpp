/* kernel.cpp: one kernel (KERNEL_FILE, KERNEL) for the model, called with the address of its parameter. */
#include "model.h"

#include KERNEL_FILE

template <class Arguments>
static void call(void (*kernel)(Arguments), const void *arguments) {
  kernel(*(const Arguments *)arguments);
}

extern "C" void model_kernel(const void *arguments) { call(KERNEL, arguments); }
