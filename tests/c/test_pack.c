/* test_pack.c: what is packed comes back, and damaged packings are refused or give other bytes, never more of them. Buffers are of the exact size,
 * so that the address sanitizer sees a step beyond either end. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "core_tests.h"
#include "csrc/cuda/store/pack.h"

static uint32_t state = 1;
static uint32_t next_random(void) { return state = state * 1664525u + 1013904223u, state >> 8; }

/* Bytes of which one in `novelty` is new and the others repeat what lay `period` bytes before. */
static unsigned char *make_data(size_t bytes, unsigned novelty, size_t period) {
  unsigned char *data = calloc(bytes + 1, 1);
  for (size_t i = 0; i < bytes; i++) data[i] = i < period || next_random() % novelty == 0 ? (unsigned char)next_random() : data[i - period];
  return data;
}

/* Packs, and moves the packing to a buffer of its size. */
static unsigned char *pack(const unsigned char *data, size_t bytes, size_t *packed_bytes) {
  unsigned char *room = malloc(fa_pack_bound(bytes));
  *packed_bytes = fa_pack(data, bytes, room);
  CHECK(*packed_bytes > 0 && *packed_bytes <= fa_pack_bound(bytes), "%zu bytes became %zu", bytes, *packed_bytes);
  unsigned char *packed = malloc(*packed_bytes);
  memcpy(packed, room, *packed_bytes);
  free(room);
  return packed;
}

static void test_round_trip(size_t bytes, unsigned novelty, size_t period) {
  size_t packed_bytes;
  unsigned char *data = make_data(bytes, novelty, period), *packed = pack(data, bytes, &packed_bytes);
  unsigned char *again = malloc(bytes + !bytes), *more = malloc(bytes + 1);
  CHECK(fa_unpack(packed, packed_bytes, again, bytes) && !memcmp(data, again, bytes), "%zu bytes, novelty %u, period %zu", bytes, novelty,
        period);
  CHECK(!fa_unpack(packed, packed_bytes, more, bytes + 1), "%zu bytes are not one more", bytes);
  CHECK(!bytes || !fa_unpack(packed, packed_bytes, more, bytes - 1), "%zu bytes are not one less", bytes);
  CHECK(!fa_unpack(packed, packed_bytes - 1, again, bytes), "%zu bytes, the packing cut short", bytes);
  if (novelty > 100 && period < 100 && bytes > 10000) CHECK(packed_bytes < bytes / 4, "%zu bytes became %zu", bytes, packed_bytes);
  free(data);
  free(packed);
  free(again);
  free(more);
}

static void test_damage(void) {
  enum { BYTES = 3000, ROUNDS = 4000 };
  size_t packed_bytes;
  unsigned char *data = make_data(BYTES, 20, 16), *packed = pack(data, BYTES, &packed_bytes), *again = malloc(BYTES);
  int refused = 0;
  for (int i = 0; i < ROUNDS; i++) {
    const size_t at = next_random() % packed_bytes;
    const unsigned char was = packed[at];
    packed[at] = (unsigned char)next_random();
    refused += !fa_unpack(packed, packed_bytes, again, BYTES);
    packed[at] = was;
  }
  CHECK(refused > ROUNDS / 4, "%d of %d damaged packings were refused", refused, ROUNDS);
  CHECK(!fa_unpack(packed, 0, again, BYTES), "an empty packing");
  free(data);
  free(packed);
  free(again);
}

void test_pack(void) {
  static const size_t sizes[] = {0, 1, 3, 4, 5, 14, 15, 16, 19, 20, 254, 255, 256, 270, 273, 274, 275, 528, 529, 65535, 65540, 200001};
  static const size_t periods[] = {1, 3, 16, 65535, 65536};
  for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
    for (size_t j = 0; j < sizeof periods / sizeof *periods; j++) {
      test_round_trip(sizes[i], 1, periods[j]);
      test_round_trip(sizes[i], 10, periods[j]);
      test_round_trip(sizes[i], 1u << 30, periods[j]);
    }
  test_damage();
}
