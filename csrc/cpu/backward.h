/* backward.h: what the backward's passes share. */
#ifndef FA_CPU_BACKWARD_H
#define FA_CPU_BACKWARD_H

#include "gradient_tile.h"

typedef struct {
  int parts;      /* copies of dQ, summed in order */
  double *delta;  /* [heads_q][total_q] */
  void *dq;       /* [parts][heads_q][total_q][dim_qk] */
  double *dalibi; /* [batch][heads_q][tiles_m] */
} fa_backward_shared;

/* rowsum(dout * out) - dlse of rows m, m + 1, ... */
const double *fa_delta_of(const fa_backward_shared *shared, const fa_head *head, int m);

/* For explain. */
int fa_cpu_backward_parts(const fa_problem *problem);
size_t fa_cpu_backward_workspace(const fa_problem *problem, const fa_tile_ops *ops);

/* The bias's gradient: recomputes the score gradients once more, tile by tile of dbias, so that each element has one owner. */
fa_code fa_cpu_bias_gradient(fa_job *job, fa_error *error);

#endif
