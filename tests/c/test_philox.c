/* test_philox.c: the published test vectors of Philox 4x32-10, and the statistics of what dropout makes of it. */
#include <math.h>
#include <string.h>

#include "core_tests.h"
#include "csrc/core/philox.h"

static void test_vectors(void) {
  static const struct {
    uint32_t counter[4], key[2], expected[4];
  } rows[] = {
      {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
      {{~0u, ~0u, ~0u, ~0u}, {~0u, ~0u}, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
      {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}, {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
  };
  for (int i = 0; i < 3; i++) {
    fa_philox_key key = {{rows[i].key[0], rows[i].key[1]}};
    const uint32_t *c = rows[i].counter;
    fa_philox_block block = fa_philox(key, c[0], c[1], c[2], c[3]);
    CHECK(memcmp(block.word, rows[i].expected, sizeof block.word) == 0, "vector %d: %08x %08x %08x %08x", i, block.word[0], block.word[1],
          block.word[2], block.word[3]);
  }
}

static void test_thresholds(void) {
  CHECK(fa_dropout_threshold(0.0) == 0, "p 0");
  CHECK(fa_dropout_threshold(0.5) == 0x80000000u, "p 1/2");
  CHECK(fa_dropout_threshold(1.0 - 1e-12) == 0xffffffffu, "p almost 1");
  CHECK(fa_dropout_threshold(1e-12) == 0, "p almost 0");
}

/* The share of words below the threshold stays within 5 standard deviations of p, and so do neighbours that are dropped together. */
static void test_share(double p, uint64_t seed) {
  enum { ROWS = 200, BLOCKS = 250, WORDS = ROWS * BLOCKS * 4 };
  uint32_t threshold = fa_dropout_threshold(p);
  fa_philox_key key = fa_dropout_key(seed, 3);
  int dropped = 0, both = 0, last = 0;
  for (int i = 0; i < ROWS; i++)
    for (int j4 = 0; j4 < BLOCKS; j4++) {
      fa_philox_block block = fa_dropout_words(key, 1, 2, i, j4);
      for (int w = 0; w < 4; w++) {
        int drop = block.word[w] < threshold;
        dropped += drop;
        both += drop && last;
        last = drop;
      }
    }
  double spread = 5 * sqrt(p * (1 - p) / WORDS), pair_spread = 5 * sqrt(p * p * (1 - p * p) * 3 / WORDS);
  CHECK(fabs((double)dropped / WORDS - p) < spread, "p %g, seed %llu: share %g", p, (unsigned long long)seed, (double)dropped / WORDS);
  CHECK(fabs((double)both / WORDS - p * p) < pair_spread, "p %g, seed %llu: pairs %g", p, (unsigned long long)seed, (double)both / WORDS);
}

static void test_keys_differ(void) {
  fa_philox_key base = fa_dropout_key(7, 11);
  const uint64_t other[][2] = {{8, 11}, {7, 12}, {11, 7}, {7 + (1ull << 32), 11}, {7, 11 + (1ull << 32)}};
  for (int i = 0; i < 5; i++) {
    fa_philox_key key = fa_dropout_key(other[i][0], other[i][1]);
    CHECK(memcmp(&key, &base, sizeof key) != 0, "key %d", i);
  }
}

void test_philox(void) {
  static const double shares[] = {0.01, 0.1, 0.5, 0.9};
  test_vectors();
  test_thresholds();
  test_keys_differ();
  for (int i = 0; i < 4; i++)
    for (uint64_t seed = 0; seed < 3; seed++) test_share(shares[i], seed);
}
