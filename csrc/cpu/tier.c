/* tier.c: which tier runs. */
#include "tier.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../core/error.h"
#include "amx.h"
#include "cpuid.h"

#define FA_TIER(name, needs, loops) extern const fa_tier fa_tier_##loops;
#include "tiers.def"
#undef FA_TIER

static const struct {
  const char *name;
  fa_cpu_feature needs;
  const fa_tier *tier;
} rows[] = {
#define FA_TIER(name, needs, loops) {#name, needs, &fa_tier_##loops},
#include "tiers.def"
#undef FA_TIER
};

enum { ROW_COUNT = sizeof rows / sizeof rows[0] };

void fa_cpu_tier_list(char *text, size_t bytes) {
  size_t used = (size_t)snprintf(text, bytes, "[");
  for (int i = 0; i < ROW_COUNT; i++)
    if (fa_cpu_has(rows[i].needs) && used < bytes)
      used += (size_t)snprintf(text + used, bytes - used, "%s\"%s\"", i ? ", " : "", rows[i].name);
  if (used < bytes) snprintf(text + used, bytes - used, "]");
}

static int strongest(void) {
  int best = 0;
  for (int i = 1; i < ROW_COUNT; i++)
    if (fa_cpu_has(rows[i].needs)) best = i;
  return best;
}

static fa_code choose(int *row, fa_error *error) {
  const char *wanted = getenv("FLASH_ATTN_C_CPU");
  char usable[256];
  *row = strongest();
  if (!wanted || !*wanted) return FA_OK;
  for (int i = 0; i < ROW_COUNT; i++) {
    if (strcmp(wanted, rows[i].name) != 0 || !fa_cpu_has(rows[i].needs)) continue;
    *row = i;
    return FA_OK;
  }
  fa_cpu_tier_list(usable, sizeof usable);
  return fa_fail(error, FA_ERR_RUNTIME, "FLASH_ATTN_C_CPU: '%s' is not a tier that this machine can run; it can run %s", wanted, usable);
}

static fa_code chosen_row(int *row, fa_error *error) {
  static atomic_int chosen = -1; /* two threads may both choose; they choose the same */
  *row = atomic_load_explicit(&chosen, memory_order_relaxed);
  if (*row >= 0) return FA_OK;
  fa_code code = choose(row, error);
  if (code == FA_OK) atomic_store_explicit(&chosen, *row, memory_order_relaxed);
  return code;
}

fa_code fa_cpu_tier(const fa_tier **tier, const char **name, fa_error *error) {
  int row;
  fa_code code = chosen_row(&row, error);
  if (code != FA_OK) return code;
  *tier = rows[row].tier;
  if (name) *name = rows[row].name;
  return FA_OK;
}

int fa_cpu_uses_amx(void) {
  fa_error unread;
  int row;
  return chosen_row(&row, &unread) == FA_OK && rows[row].needs == FA_CPU_AMX;
}
