/* test_mask.c: mask.h against the rule for a single pair, over all small lengths, windows and tiles. */
#include "core_tests.h"
#include "csrc/core/mask.h"

enum { LONGEST = 9, WIDEST = 5 };

/* The rule itself, pair by pair. */
static int visible(fa_rule rule, int len_q, int len_k, int i, int j) {
  int diagonal = i + len_k - len_q;
  if (rule.causal == 1 && j > diagonal) return 0;
  if (rule.causal == 2 && j > i) return 0;
  if (rule.window_left >= 0 && j < diagonal - rule.window_left) return 0;
  if (rule.window_right >= 0 && j > diagonal + rule.window_right) return 0;
  return 1;
}

static int row_agrees(fa_rule rule, int len_q, int len_k, int i) {
  int lo = fa_row_lo(rule, len_q, len_k, i), hi = fa_row_hi(rule, len_q, len_k, i);
  for (int j = 0; j < len_k; j++)
    if (visible(rule, len_q, len_k, i, j) != (j >= lo && j < hi)) return 0;
  return lo >= 0 && hi <= len_k;
}

/* Every pair of the tile lies inside the visited keys, and all keys inside the unmasked ones are visible to every row. */
static int rows_agree(fa_rule rule, int len_q, int len_k, int m0, int m1) {
  fa_range visit = fa_visited_keys(rule, len_q, len_k, m0, m1), whole = fa_unmasked_keys(rule, len_q, len_k, m0, m1);
  for (int i = m0; i < m1; i++)
    for (int j = 0; j < len_k; j++) {
      int sees = visible(rule, len_q, len_k, i, j);
      if (sees && (j < visit.lo || j >= visit.hi)) return 0;
      if (!sees && j >= whole.lo && j < whole.hi) return 0;
    }
  return 1;
}

static int keys_agree(fa_rule rule, int len_q, int len_k, int n0, int n1) {
  fa_range rows = fa_visiting_rows(rule, len_q, len_k, n0, n1);
  for (int i = 0; i < len_q; i++)
    for (int j = n0; j < n1; j++)
      if (visible(rule, len_q, len_k, i, j) && (i < rows.lo || i >= rows.hi)) return 0;
  return 1;
}

static void test_rule(fa_rule rule, int len_q, int len_k) {
  int wrong = 0;
  for (int i = 0; i < len_q; i++) wrong += !row_agrees(rule, len_q, len_k, i);
  for (int m0 = 0; m0 < len_q; m0++)
    for (int m1 = m0 + 1; m1 <= len_q; m1++) wrong += !rows_agree(rule, len_q, len_k, m0, m1);
  for (int n0 = 0; n0 < len_k; n0++)
    for (int n1 = n0 + 1; n1 <= len_k; n1++) wrong += !keys_agree(rule, len_q, len_k, n0, n1);
  CHECK(wrong == 0, "causal %d, window (%d, %d), lengths %d and %d: %d disagreements", rule.causal, rule.window_left, rule.window_right,
        len_q, len_k, wrong);
}

void test_mask(void) {
  for (int len_q = 0; len_q <= LONGEST; len_q++)
    for (int len_k = 0; len_k <= LONGEST; len_k++)
      for (int causal = 0; causal <= 2; causal++)
        for (int left = -1; left <= WIDEST; left++)
          for (int right = -1; right <= (causal ? -1 : WIDEST); right++) test_rule((fa_rule){causal, left, right}, len_q, len_k);

  /* The largest lengths and bounds stay within int. */
  fa_rule wide = {0, FA_WINDOW_MAX - 1, FA_WINDOW_MAX - 1};
  CHECK(fa_row_lo(wide, FA_LENGTH_MAX, 1, 0) == 0, "lowest row");
  CHECK(fa_row_hi(wide, 1, FA_LENGTH_MAX, 0) == FA_LENGTH_MAX, "highest row");
  fa_range rows = fa_visiting_rows(wide, FA_LENGTH_MAX, 1, 0, 1);
  CHECK(rows.lo == 0 && rows.hi == FA_LENGTH_MAX, "rows %d to %d", rows.lo, rows.hi);
}
