/* test_threads.c: fa_parallel takes each item once, keeps workers apart, and survives callers at the same time and a fork. */
#define _POSIX_C_SOURCE 200809L /* barriers, fork */
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "core_tests.h"
#include "csrc/cpu/cpuid.h"
#include "csrc/cpu/threads.h"

enum { ITEMS = 5000, WORKERS = 4 };

typedef struct {
  atomic_int taken[ITEMS];
  atomic_int inside[WORKERS]; /* how many run under this worker's number right now */
  atomic_int overlaps, nested_count_wrong;
} record;

static void item(int64_t i, int worker, void *context) {
  record *r = context;
  if (atomic_fetch_add(&r->inside[worker], 1) != 0) atomic_fetch_add(&r->overlaps, 1);
  if (fa_thread_count() != 1) atomic_fetch_add(&r->nested_count_wrong, 1);
  atomic_fetch_add(&r->taken[i], 1);
  atomic_fetch_sub(&r->inside[worker], 1);
}

static int count_wrong(const record *r) {
  int wrong = 0;
  for (int i = 0; i < ITEMS; i++) wrong += atomic_load(&r->taken[i]) != 1;
  return wrong;
}

static int run_once(record *r) {
  memset(r, 0, sizeof *r);
  fa_parallel(ITEMS, WORKERS, item, r);
  return count_wrong(r) + atomic_load(&r->overlaps) + atomic_load(&r->nested_count_wrong);
}

static void *caller(void *result) {
  record own;
  for (int i = 0; i < 50; i++) *(int *)result += run_once(&own);
  return NULL;
}

/* Two items that wait for each other: ends only when two threads run them. */
static void meet(int64_t i, int worker, void *context) {
  pthread_barrier_t *barrier = context;
  (void)i, (void)worker;
  pthread_barrier_wait(barrier);
}

static void test_two_threads_run(void) {
  pthread_barrier_t barrier;
  pthread_barrier_init(&barrier, NULL, 2);
  fa_parallel(2, 2, meet, &barrier);
  pthread_barrier_destroy(&barrier);
  CHECK(1, "two threads met");
}

static void test_callers_at_once(void) {
  pthread_t threads[3];
  int wrong[3] = {0, 0, 0};
  for (int i = 0; i < 3; i++) pthread_create(&threads[i], NULL, caller, &wrong[i]);
  for (int i = 0; i < 3; i++) pthread_join(threads[i], NULL);
  CHECK(wrong[0] + wrong[1] + wrong[2] == 0, "%d wrong items", wrong[0] + wrong[1] + wrong[2]);
}

static void test_fork(void) {
  static record r;
  int status = -1;
  pid_t child = fork();
  if (child == 0) {
    alarm(20); /* a hang ends as a failure */
    _exit(run_once(&r) != 0);
  }
  waitpid(child, &status, 0);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "child status %d", status);
}

void test_threads(void) {
  static record r;
  CHECK(fa_thread_count() >= 1, "%d", fa_thread_count());
  CHECK(strcmp(fa_thread_source(), "own") == 0, "%s", fa_thread_source());
  CHECK(run_once(&r) == 0, "one loop");
  fa_parallel(0, WORKERS, item, &r);
  CHECK(count_wrong(&r) == 0, "an empty loop takes nothing");
  test_two_threads_run();
  test_callers_at_once();
  test_fork();
  CHECK(fa_cpu_has(FA_CPU_ANY), "plain C");
  CHECK(!fa_cpu_has(FA_CPU_AVX512) || fa_cpu_has(FA_CPU_AVX2), "AVX-512 without AVX2");
  CHECK(!fa_cpu_has(FA_CPU_AMX) || fa_cpu_has(FA_CPU_AVX512), "AMX without AVX-512");
}
