/* padding.c: see padding.h. */
#include "padding.h"

#include <math.h>

static const double zeros[FA_MAX_HEAD_DIM]; /* serves tiles of float too */

void fa_write_padding(const fa_head *head, int start, int end) {
  const fa_problem *p = head->problem;
  for (int i = start; i < end; i++) {
    head->ops->store(fa_query_row(head, &p->out, i), p->dtype, 0, p->out.d, zeros, 0, 1, p->dim_v, NULL);
    fa_set_statistic(head, &p->lse, i, -INFINITY);
  }
}

void fa_write_slack(const fa_problem *p, const fa_tile_ops *ops) {
  if (!p->lengths.packed) return;
  int64_t end = p->lengths.cu_q.data[p->batch * p->lengths.cu_q.stride];
  for (int h = 0; h < p->heads_q && end < p->total_q; h++) {
    fa_head head = {.problem = p, .ops = ops, .h = h};
    head.seq.q_start = end;
    fa_write_padding(&head, 0, (int)(p->total_q - end));
  }
}

void fa_clear_slack(const fa_problem *p, const fa_tile_ops *ops, const fa_view *view, fa_ints cu, int64_t total, int heads, int dim) {
  if (!view->data || !p->lengths.packed) return;
  for (int h = 0; h < heads; h++)
    for (int64_t row = cu.data[p->batch * cu.stride]; row < total; row++)
      ops->store((char *)view->data + (h * view->h + row * view->s) * fa_dtype_bytes(p->dtype), p->dtype, 0, view->d, zeros, 0, 1, dim,
                 NULL);
}
