/* kernel.cpp: one kernel (KERNEL_FILE, KERNEL) for the model, called with the addresses of its parameters. */
#include <utility>

#include "model.h"
#include "model_sm90.h"

#include KERNEL_FILE

template <class... A, size_t... I> static void call(void (*kernel)(A...), void *const *addresses, std::index_sequence<I...>) {
  kernel(*(const std::remove_reference_t<A> *)addresses[I]...);
}

template <class... A> static void call_all(void (*kernel)(A...), void *const *addresses) {
  call(kernel, addresses, std::make_index_sequence<sizeof...(A)>());
}

extern "C" void model_kernel(void *const *addresses) { call_all(KERNEL, addresses); }
