/* forward_plan.h: how the forward cuts a problem into tasks: from the shapes alone, so that results do not depend on the threads. */
#ifndef FA_CPU_FORWARD_PLAN_H
#define FA_CPU_FORWARD_PLAN_H

#include "job.h"

/* Tiles of so few rows read every key once, as it lies. */
enum { FA_FEW_ROWS = 8, FA_MAX_TOGETHER = 16 };

typedef struct {
  int block_m;       /* query rows of a tile: of a divisor of the block mask's size, where there is one */
  int stack;         /* query heads of a group whose rows share a tile: short sequences of queries fill it together */
  int stacks;        /* tiles that a group's heads make at one place */
  int splits;        /* ranges of keys that are attended apart and combined */
  int split_columns; /* keys of a range, a multiple of FA_BLOCK_N */
  int together;      /* key heads that a task takes through its range side by side: a divisor of their number */
} fa_forward_plan;

fa_forward_plan fa_forward_plan_of(const fa_problem *problem);

/* What is kept of the ranges until they are combined; 0 bytes where keys are not split. */
size_t fa_cpu_forward_workspace(const fa_problem *problem, const fa_tile_ops *ops);

#endif
