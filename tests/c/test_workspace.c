/* test_workspace.c: blocks are large enough, aligned and never handed out twice; large ones come back, and what is too large does not stay. */
#include <pthread.h>
#include <stdint.h>
#include <string.h>

#include "core_tests.h"
#include "csrc/cpu/workspace.h"

enum { CALLERS = 4, ROUNDS = 2000 };

static const size_t MEGABYTE = (size_t)1 << 20;

/* Holds two blocks at a time, marked as its own, and counts marks that somebody else has written over. */
static void *caller(void *context) {
  int *wrong = context;
  for (int i = 0; i < ROUNDS; i++) {
    size_t bytes[2] = {MEGABYTE + (size_t)(i % 7) * 4096, (size_t)(i % 3) * MEGABYTE + 100};
    char *blocks[2];
    for (int j = 0; j < 2; j++) {
      blocks[j] = fa_workspace_take(bytes[j]);
      if (!blocks[j] || (uintptr_t)blocks[j] % 64) ++*wrong;
      memcpy(blocks[j], &context, sizeof context);
      memcpy(blocks[j] + bytes[j] - sizeof context, &context, sizeof context);
    }
    for (int j = 0; j < 2; j++) {
      *wrong += memcmp(blocks[j], &context, sizeof context) || memcmp(blocks[j] + bytes[j] - sizeof context, &context, sizeof context);
      fa_workspace_give(blocks[j]);
    }
  }
  return NULL;
}

void test_workspace(void) {
  pthread_t threads[CALLERS];
  int wrong[CALLERS] = {0};
  for (int i = 0; i < CALLERS; i++) CHECK(!pthread_create(&threads[i], NULL, caller, &wrong[i]), "caller %d", i);
  for (int i = 0; i < CALLERS; i++) {
    pthread_join(threads[i], NULL);
    CHECK(wrong[i] == 0, "%d blocks of caller %d", wrong[i], i);
  }
  char *first = fa_workspace_take(8 * MEGABYTE);
  fa_workspace_give(first);
  char *again = fa_workspace_take(7 * MEGABYTE), *other = fa_workspace_take(7 * MEGABYTE);
  CHECK(again == first, "a block that was given back serves the next call");
  CHECK(other != first, "one block for two holders");
  fa_workspace_give(again);
  fa_workspace_give(other);
  fa_workspace_give(NULL);
}
