/* engine.c: what the CPU engine says of itself: the plan of a problem, and what it found on the machine. */
#include "engine.h"

#include <stdio.h>

#include "../core/error.h"
#include "backward.h"
#include "threads.h"

fa_code fa_cpu_explain(const fa_problem *p, fa_direction direction, char *text, size_t bytes, fa_error *error) {
  const fa_tier *tier;
  const char *name;
  fa_code code = fa_cpu_tier(&tier, &name, error);
  if (code != FA_OK) return code;
  size_t workspace = direction == FA_BACKWARD ? fa_cpu_backward_workspace(p, fa_ops_for(tier, p->dtype)) : 0;
  int needed = snprintf(
      text, bytes,
      "{\"engine\": \"cpu\", \"kernel\": \"%s_%s\", \"tier\": \"%s\", \"arithmetic\": \"%s\", \"block_m\": %d, \"block_n\": %d, "
      "\"splits\": %d, \"threads\": %d, \"thread_source\": \"%s\", \"workspace_bytes\": %zu, \"deterministic\": true, \"notes\": []}",
      direction == FA_BACKWARD ? "backward" : "forward", name, name, p->dtype == FA_F64 ? "float64" : "float32", fa_block_m(p), FA_BLOCK_N,
      direction == FA_BACKWARD ? fa_cpu_backward_parts(p) : 1, fa_thread_count(), fa_thread_source(), workspace);
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
