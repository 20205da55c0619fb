/* philox.h: counter-based random numbers (Philox 4x32, 10 rounds) for dropout. Read by both engines; plain C, also under NVRTC.
 *
 * The word for a pair (query row i, key column j) of (batch b, head h) depends on (seed, offset, b, h, i, j) alone, never on tiles,
 * layout, threads or engine: the CPU and the GPU drop the same entries. One block of four words serves four neighbouring columns:
 *
 *     key     = first two words of philox(key = seed, counter = (offset, "drop"))     once a launch
 *     counter = (j / 4, i, h, b), word j % 4                                           once for four columns
 */
#ifndef FA_PHILOX_H
#define FA_PHILOX_H

#include "portable.h"

typedef struct {
  uint32_t word[4];
} fa_philox_block;

typedef struct {
  uint32_t word[2];
} fa_philox_key;

FA_INLINE fa_philox_block fa_philox(fa_philox_key key, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = key.word[0], k1 = key.word[1];
  for (int round = 0; round < 10; round++) {
    uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
    uint32_t n0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0, n2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
    c1 = (uint32_t)p1;
    c3 = (uint32_t)p0;
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  fa_philox_block out = {{c0, c1, c2, c3}};
  return out;
}

FA_INLINE fa_philox_key fa_dropout_key(uint64_t seed, uint64_t offset) {
  fa_philox_key seed_key = {{(uint32_t)seed, (uint32_t)(seed >> 32)}};
  fa_philox_block mixed = fa_philox(seed_key, (uint32_t)offset, (uint32_t)(offset >> 32), 0x64726F70u, 0u);
  fa_philox_key key = {{mixed.word[0], mixed.word[1]}};
  return key;
}

/* Words for columns 4*j4 .. 4*j4+3. An entry is dropped when its word is below fa_dropout_threshold(p). */
FA_INLINE fa_philox_block fa_dropout_words(fa_philox_key key, int b, int h, int i, int j4) {
  return fa_philox(key, (uint32_t)j4, (uint32_t)i, (uint32_t)h, (uint32_t)b);
}

/* p in [0, 1) to 32 bits, rounded to nearest; p == 0 drops nothing. */
FA_INLINE uint32_t fa_dropout_threshold(double p) {
  double scaled = p * 4294967296.0 + 0.5;
  return scaled >= 4294967295.0 ? 4294967295u : (uint32_t)scaled;
}

#endif
