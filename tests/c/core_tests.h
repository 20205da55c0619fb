/* core_tests.h: one counter of checks for all C tests. A failed check prints where it stands and goes on. */
#ifndef FA_CORE_TESTS_H
#define FA_CORE_TESTS_H

#include <stdio.h>

extern int passed_count, failed_count;

#define CHECK(condition, ...)                                         \
  do {                                                                \
    if (condition) {                                                  \
      passed_count++;                                                 \
    } else {                                                          \
      failed_count++;                                                 \
      fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      fprintf(stderr, __VA_ARGS__);                                   \
      fprintf(stderr, "\n");                                          \
    }                                                                 \
  } while (0)

void test_mask(void);
void test_philox(void);
void test_numeric(void);
void test_pack(void);
void test_problem(void);
void test_threads(void);
void test_workspace(void);

#endif
