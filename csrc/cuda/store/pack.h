/* pack.h: compiled kernels, made small for the disk. Instructions repeat much of one another: a third is left. */
#ifndef FA_STORE_PACK_H
#define FA_STORE_PACK_H

#include <stddef.h>

/* The most bytes that fa_pack writes for so many. */
size_t fa_pack_bound(size_t bytes);

/* Packs `bytes` bytes into `packed`, which holds fa_pack_bound of them. Returns how many it took, 0 when there was no memory to work in. */
size_t fa_pack(const void *data, size_t bytes, void *packed);

/* Unpacks exactly `bytes` bytes. Returns 0 when `packed` is not what fa_pack made of so many; reads and writes nothing beyond either end. */
int fa_unpack(const void *packed, size_t packed_bytes, void *data, size_t bytes);

#endif
