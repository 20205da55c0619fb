/* pack.c: byte strings as literals and references to what came before (Lempel and Ziv, 1977).
 *
 * A packed string is a row of sequences, each of which adds some bytes of its own and a copy of earlier ones:
 *
 *     head        literals in the upper 4 bits, copied bytes - SHORTEST in the lower 4; 15: more follows
 *     more        of the literals' count: bytes of 255, then one below, all added to 15
 *     literals
 *     distance    2 bytes, lower first: where the copy starts, counted back from here; a copy may overlap itself
 *     more        of the copy's length
 *
 * The last sequence ends with its literals.
 */
#include "pack.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum {
  SHORTEST = 4,        /* bytes that pay for a reference */
  FARTHEST = 65535,    /* bytes back */
  HASH_BITS = 14,      /* of the table of last places */
  PLACES_TRIED = 64,   /* earlier places with the same hash that are looked at */
  RING = FARTHEST + 1, /* places that are remembered */
  FULL = 15,           /* of a head's four bits */
};

/* Where a hash of four bytes was seen last, and for each place the one before it with the same hash; -1: none. */
typedef struct {
  int64_t last[1 << HASH_BITS], before[RING];
} memory;

size_t fa_pack_bound(size_t bytes) { return bytes + bytes / 255 + 16; }

static unsigned hash_at(const unsigned char *p) {
  uint32_t four;
  memcpy(&four, p, 4);
  return four * 2654435761u >> (32 - HASH_BITS);
}

static void remember(memory *seen, const unsigned char *data, size_t at, size_t bytes) {
  if (bytes - at < SHORTEST) return;
  const unsigned hash = hash_at(data + at);
  seen->before[at % RING] = seen->last[hash];
  seen->last[hash] = (int64_t)at;
}

/* The longest earlier string that is repeated at `at`; its length, 0 when none pays. */
static size_t find_repeat(const memory *seen, const unsigned char *data, size_t at, size_t bytes, size_t *distance) {
  size_t best = 0;
  if (bytes - at < SHORTEST) return 0;
  int64_t place = seen->last[hash_at(data + at)];
  for (int tried = 0; place >= 0 && at - (size_t)place <= FARTHEST && tried < PLACES_TRIED; tried++) {
    size_t length = 0;
    while (at + length < bytes && data[(size_t)place + length] == data[at + length]) length++;
    if (length > best) {
      best = length;
      *distance = at - (size_t)place;
    }
    place = seen->before[(size_t)place % RING];
  }
  return best >= SHORTEST ? best : 0;
}

static unsigned char *write_more(unsigned char *out, size_t count) {
  if (count < FULL) return out;
  for (count -= FULL; count >= 255; count -= 255) *out++ = 255;
  *out++ = (unsigned char)count;
  return out;
}

/* `length` 0: the last sequence, which has no copy. */
static unsigned char *write_sequence(unsigned char *out, const unsigned char *literals, size_t count, size_t distance, size_t length) {
  const size_t copied = length ? length - SHORTEST : 0;
  *out++ = (unsigned char)((count < FULL ? count : FULL) << 4 | (copied < FULL ? copied : FULL));
  out = write_more(out, count);
  memcpy(out, literals, count);
  out += count;
  if (!length) return out;
  *out++ = (unsigned char)distance;
  *out++ = (unsigned char)(distance >> 8);
  return write_more(out, copied);
}

size_t fa_pack(const void *data, size_t bytes, void *packed) {
  const unsigned char *in = data;
  unsigned char *out = packed;
  size_t at = 0, literals = 0, distance = 0;
  memory *seen = malloc(sizeof *seen);
  if (!seen) return 0;
  memset(seen->last, -1, sizeof seen->last);
  while (at < bytes) {
    const size_t length = find_repeat(seen, in, at, bytes, &distance);
    if (length) {
      out = write_sequence(out, in + literals, at - literals, distance, length);
      literals = at + length;
    }
    for (const size_t end = at + (length ? length : 1); at < end; at++) remember(seen, in, at, bytes);
  }
  out = write_sequence(out, in + literals, bytes - literals, 0, 0);
  free(seen);
  return (size_t)(out - (unsigned char *)packed);
}

/* Adds the bytes after a full head to *count. Returns 0 when they end too early or say more than `most`. */
static int read_more(const unsigned char **in, const unsigned char *end, size_t most, size_t *count) {
  if (*count < FULL) return *count <= most;
  for (unsigned char byte = 255; byte == 255; *count += byte) {
    if (*in == end || *count > most) return 0;
    byte = *(*in)++;
  }
  return *count <= most;
}

int fa_unpack(const void *packed, size_t packed_bytes, void *data, size_t bytes) {
  const unsigned char *in = packed, *end = in + packed_bytes;
  unsigned char *out = data;
  size_t made = 0;
  while (in < end) {
    const unsigned head = *in++;
    size_t count = head >> 4, length = head & FULL;
    if (!read_more(&in, end, bytes - made, &count) || count > (size_t)(end - in)) return 0;
    memcpy(out + made, in, count);
    in += count;
    made += count;
    if (in == end) return made == bytes;
    if (end - in < 2) return 0;
    const size_t distance = (size_t)in[0] | (size_t)in[1] << 8;
    in += 2;
    if (!read_more(&in, end, bytes - made, &length)) return 0;
    length += SHORTEST;
    if (distance == 0 || distance > made || length > bytes - made) return 0;
    for (const size_t stop = made + length; made < stop; made++) out[made] = out[made - distance];
  }
  return 0;
}
