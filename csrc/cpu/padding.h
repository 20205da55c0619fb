/* padding.h: rows that the tensors hold and no sequence uses: what every pass writes there. */
#ifndef FA_CPU_PADDING_H
#define FA_CPU_PADDING_H

#include "head.h"

/* Rows [start, end) of a head's sequence: out 0, lse -inf. */
void fa_write_padding(const fa_head *head, int start, int end);

/* The same for tokens behind the last sequence of a packed batch: they belong to nobody, and are written all the same. */
void fa_write_slack(const fa_problem *problem, const fa_tile_ops *ops);

/* Gradient 0 for those tokens; cu and total are those of the view's side. */
void fa_clear_slack(const fa_problem *problem, const fa_tile_ops *ops, const fa_view *view, fa_ints cu, int64_t total, int heads, int dim);

#endif
