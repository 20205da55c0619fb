/* override.c: see override.h. Another thread may be reading any list that was wanted once, so none is changed or freed, and one that is wanted
 * again is found again. */
#include "override.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "../../core/error.h"

enum { NAME_BYTES = 32 };

typedef struct list {
  struct list *before;
  int count, values[FA_MAX_CONSTANTS];
  char names[FA_MAX_CONSTANTS][NAME_BYTES];
} list;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static list *newest;
static _Atomic(const list *) wanted;

static int same(const list *l, const fa_constant *constants, int count) {
  int equal = l->count == count;
  for (int i = 0; equal && i < count; i++) equal = l->values[i] == constants[i].value && !strcmp(l->names[i], constants[i].name);
  return equal;
}

/* Under the lock. */
static list *list_of(const fa_constant *constants, int count) {
  for (list *l = newest; l; l = l->before)
    if (same(l, constants, count)) return l;
  list *made = calloc(1, sizeof *made);
  if (!made) return NULL;
  for (int i = 0; i < count; i++) {
    memcpy(made->names[i], constants[i].name, strlen(constants[i].name));
    made->values[i] = constants[i].value;
  }
  made->count = count;
  made->before = newest;
  return newest = made;
}

fa_code fa_store_override(const fa_constant *constants, int count, fa_error *error) {
  if (count > FA_MAX_CONSTANTS) return fa_fail(error, FA_ERR_VALUE, "constants: %d given, at most %d fit", count, FA_MAX_CONSTANTS);
  for (int i = 0; i < count; i++)
    if (strlen(constants[i].name) >= NAME_BYTES)
      return fa_fail(error, FA_ERR_VALUE, "constants: '%.60s' is longer than %d characters", constants[i].name, NAME_BYTES - 1);
  pthread_mutex_lock(&lock);
  const list *found = list_of(constants, count);
  pthread_mutex_unlock(&lock);
  if (!found) return fa_fail(error, FA_ERR_MEMORY, "no memory for %d constants", count);
  atomic_store_explicit(&wanted, found, memory_order_release);
  return FA_OK;
}

const fa_variant *fa_overridden(const fa_variant *variant, fa_variant *changed, fa_constant room[FA_MAX_CONSTANTS]) {
  const list *now = atomic_load_explicit(&wanted, memory_order_acquire);
  if (!now || !now->count || variant->constant_count > FA_MAX_CONSTANTS) return variant;
  *changed = *variant;
  changed->constants = room;
  for (int i = 0; i < variant->constant_count; i++) {
    room[i] = variant->constants[i];
    for (int j = 0; j < now->count; j++)
      if (!strcmp(room[i].name, now->names[j])) room[i].value = now->values[j];
  }
  return changed;
}
