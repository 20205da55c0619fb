/* backward.h: what the backward's passes share. */
#ifndef FA_CPU_BACKWARD_H
#define FA_CPU_BACKWARD_H

#include <stdatomic.h>

#include "gradient_tile.h"

typedef struct {
  double *delta;     /* [heads_q][total_q] */
  double *dalibi;    /* [batch][heads_q][tiles_m] */
  void *dq;          /* [heads_q][total_q][dim_qk]; NULL where the result itself holds the sums */
  atomic_int *steps; /* [tasks of the pass over keys] how far each has added to dq (see backward_keys.c) */
} fa_backward_shared;

/* rowsum(dout * out) - dlse of rows m, m + 1, ... */
double *fa_delta_of(const fa_backward_shared *shared, const fa_head *head, int m);

/* The sums that become dq, from row m on, and the distance between rows. */
void *fa_dq_sums(const fa_backward_shared *shared, const fa_head *head, int m, ptrdiff_t *ld);

/* The head and first row of a task that is one tile of query rows. */
fa_head fa_query_tile(const fa_job *job, int64_t item, int *m0);

/* For explain, too. */
int fa_backward_block_m(const fa_problem *problem);
size_t fa_cpu_backward_workspace(const fa_problem *problem, const fa_tile_ops *ops);

/* The passes; see backward.c. */
fa_code fa_cpu_backward_rows(fa_job *job, fa_error *error);
int64_t fa_backward_keys_tasks(const fa_problem *problem);
fa_code fa_cpu_backward_keys(fa_job *job, fa_error *error);
fa_code fa_cpu_bias_gradient(fa_job *job, fa_error *error);

#endif
