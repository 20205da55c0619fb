/* forward_few.h: tiles of at most FA_FEW_ROWS query rows. */
#ifndef FA_CPU_FORWARD_FEW_H
#define FA_CPU_FORWARD_FEW_H

#include "forward_tile.h"

/* Whether keys and values are read where they lie: then tiles of several heads can take them up side by side. */
int fa_reads_in_place(const fa_problem *problem);

/* Takes up keys [n0, n0 + 64) for `count` tiles of one batch entry, at the same rows of other heads. */
void fa_attend_few(const fa_forward_tile *tiles, int count, int n0);

#endif
