/* sha256.h: SHA-256 (FIPS 180-4) of text and bytes fed in pieces. */
#ifndef FA_SHA256_H
#define FA_SHA256_H

#include <stddef.h>
#include <stdint.h>

typedef struct {
  unsigned char bytes[32];
} fa_digest;

typedef struct {
  uint32_t state[8];
  uint64_t length; /* bytes fed so far */
  unsigned char block[64];
} fa_sha256;

void fa_sha256_start(fa_sha256 *hash);
void fa_sha256_feed(fa_sha256 *hash, const void *data, size_t bytes);
fa_digest fa_sha256_end(fa_sha256 *hash);

#endif
