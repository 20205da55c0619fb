/* engine.h: the CPU engine's doors. */
#ifndef FA_CPU_ENGINE_H
#define FA_CPU_ENGINE_H

#include "../core/problem.h"

/* Runs the problem on the passes that suit it best. */
fa_code fa_cpu_run(const fa_problem *problem, fa_direction direction, fa_error *error);
fa_code fa_cpu_explain(const fa_problem *problem, fa_direction direction, char *text, size_t bytes, fa_error *error);

/* The passes on tiles of float or double: every tier has them, for every problem. */
fa_code fa_cpu_forward(const fa_problem *problem, fa_error *error);
fa_code fa_cpu_backward(const fa_problem *problem, fa_error *error);

/* The forward's optional extra output, one more sweep over the scores. */
fa_code fa_cpu_probs(const fa_problem *problem, fa_error *error);

/* JSON object for fa_describe: {"tier": "avx2", "tiers": ["portable", "avx2"], "threads": 2, "thread_source": "own"}. */
void fa_cpu_describe(char *text, size_t bytes);

#endif
