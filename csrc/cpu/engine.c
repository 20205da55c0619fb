/* engine.c: which passes a problem runs on, and what the CPU engine says of itself: the plan of a problem, and what it found on the
 * machine. */
#include "engine.h"

#include <stdio.h>

#include "../core/error.h"
#include "amx.h"
#include "backward.h"
#include "forward_plan.h"
#include "threads.h"

/* Whether the passes on AMX tiles run this. If not, `why` is the reason, or NULL where the question does not arise. */
static int takes_amx(const fa_problem *p, fa_direction direction, const char **why) {
  *why = NULL;
  if (p->dtype == FA_F32 || p->dtype == FA_F64 || !fa_cpu_uses_amx()) return 0;
  *why = fa_amx_unsuited(p, direction);
  return *why == NULL;
}

fa_code fa_cpu_run(const fa_problem *p, fa_direction direction, fa_error *error) {
  const char *why;
  int amx = takes_amx(p, direction, &why);
  if (direction == FA_BACKWARD) return (amx ? fa_cpu_backward_amx : fa_cpu_backward)(p, error);
  if (!amx) return fa_cpu_forward(p, error);
  fa_code code = fa_cpu_forward_amx(p, error);
  return code == FA_OK && p->probs.data ? fa_cpu_probs(p, error) : code;
}

typedef struct {
  const char *loops; /* in the kernel's name */
  const char *note;
  int block_m, splits;
  size_t workspace;
} cpu_plan;

static cpu_plan plan_of(const fa_problem *p, fa_direction direction, const fa_tier *tier, const char *name) {
  cpu_plan plan = {.loops = name, .splits = 1};
  if (takes_amx(p, direction, &plan.note)) {
    plan.block_m = 32;
    plan.workspace = fa_amx_workspace(p, direction);
    if (direction == FA_BACKWARD) plan.splits = fa_amx_backward_parts(p);
    return plan;
  }
  if (fa_cpu_uses_amx()) plan.loops = "avx512";
  if (direction == FA_BACKWARD) {
    plan.block_m = fa_backward_block_m(p);
    plan.workspace = fa_cpu_backward_workspace(p, fa_ops_for(tier, p->dtype));
    return plan;
  }
  fa_forward_plan forward = fa_forward_plan_of(p);
  plan.block_m = forward.block_m;
  plan.splits = forward.splits;
  plan.workspace = fa_cpu_forward_workspace(p, fa_ops_for(tier, p->dtype));
  return plan;
}

fa_code fa_cpu_explain(const fa_problem *p, fa_direction direction, char *text, size_t bytes, fa_error *error) {
  const fa_tier *tier;
  const char *name;
  fa_code code = fa_cpu_tier(&tier, &name, error);
  if (code != FA_OK) return code;
  cpu_plan plan = plan_of(p, direction, tier, name);
  int needed = snprintf(
      text, bytes,
      "{\"engine\": \"cpu\", \"kernel\": \"%s_%s\", \"tier\": \"%s\", \"arithmetic\": \"%s\", \"block_m\": %d, \"block_n\": %d, "
      "\"splits\": %d, \"threads\": %d, \"thread_source\": \"%s\", \"workspace_bytes\": %zu, \"deterministic\": true, \"notes\": [%s%s%s]}",
      direction == FA_BACKWARD ? "backward" : "forward", plan.loops, name, p->dtype == FA_F64 ? "float64" : "float32", plan.block_m,
      FA_BLOCK_N, plan.splits, fa_thread_count(), fa_thread_source(), plan.workspace, plan.note ? "\"amx: " : "",
      plan.note ? plan.note : "", plan.note ? "\"" : "");
  if (needed < 0 || (size_t)needed >= bytes)
    return fa_fail(error, FA_ERR_VALUE, "text: %zu bytes are too few, %d needed", bytes, needed + 1);
  return FA_OK;
}

void fa_cpu_describe(char *text, size_t bytes) {
  const fa_tier *tier;
  const char *name = "none";
  char tiers[256];
  fa_error error = {FA_OK, ""};
  fa_cpu_tier_list(tiers, sizeof tiers);
  if (fa_cpu_tier(&tier, &name, &error) != FA_OK) name = error.message;
  snprintf(text, bytes, "{\"tier\": \"%s\", \"tiers\": %s, \"threads\": %d, \"thread_source\": \"%s\"}", name, tiers, fa_thread_count(),
           fa_thread_source());
}
