/* core_tests.c: runs the C-level tests and counts their checks. */
#include "core_tests.h"

int passed_count, failed_count;

int main(void) {
  test_mask();
  test_philox();
  test_numeric();
  test_pack();
  test_problem();
  test_threads();
  test_workspace();
  printf("%d passed, %d failed\n", passed_count, failed_count);
  return failed_count != 0;
}
