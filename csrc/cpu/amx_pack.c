/* amx_pack.c: see amx_pack.h. */
#include "amx.h"
#ifdef FA_HAS_AMX
#include "amx_pack.h"

#include "amx_tile.h"

AMX_BEGIN

static const _Alignas(64) uint16_t zero_row[FA_MAX_HEAD_DIM];

/* 32 floats -> 32 halves, and what their rounding left: nothing where it is not finite. */
AMX_INLINE void split(const float *src, f32x16 sign, int parts, uint16_t *high, uint16_t *low) {
  f32x16 x = f32_mul(f32_load(src), sign), y = f32_mul(f32_load(src + 16), sign);
  i32_store(high, bf16_rows(x, y));
  if (parts == 1) return;
  i32x16 pairs = bf16_pairs(x, y);
  f32x16 x_low = f32_sub(x, bf16_even(pairs)), y_low = f32_sub(y, bf16_odd(pairs));
  i32_store(low, bf16_rows(f32_finite_or_zero(x_low), f32_finite_or_zero(y_low)));
}

static void copy_rows(fa_amx_rows *out, const fa_head *head, const fa_view *view, const void *first, int rows, int dim, int negate) {
  const f32x16 sign = f32_splat(negate ? -1.0f : 1.0f);
  head->ops->load(out->loaded, out->strips * 32, first, head->problem->dtype, view->s, view->d, rows, dim);
  for (int r = 0; r < rows; r++)
    for (int strip = 0; strip < out->strips; strip++) {
      split(out->loaded + (r * out->strips + strip) * 32, sign, out->parts, out->copy[0][r] + strip * 32, out->copy[1][r] + strip * 32);
      out->row[0][r] = out->copy[0][r];
      out->row[1][r] = out->copy[1][r];
    }
}

static void take_rows(fa_amx_rows *out, const fa_head *head, const fa_view *view, void *first, int rows, int dim, int negate) {
  out->strips = fa_amx_strips(dim);
  out->parts = fa_amx_parts(head->problem->dtype);
  for (int r = 0; r < 32; r++) out->row[0][r] = out->row[1][r] = zero_row;
  if (rows <= 0) return;
  if (out->parts == 2 || negate || view->d != 1 || dim % 32 != 0) {
    copy_rows(out, head, view, first, rows, dim, negate);
    return;
  }
  for (int r = 0; r < rows && r < 32; r++) out->row[0][r] = (const uint16_t *)first + r * view->s;
}

void fa_amx_take_queries(fa_amx_rows *out, const fa_head *head, const fa_view *view, int start, int rows, int dim, int negate) {
  take_rows(out, head, view, fa_query_row(head, view, start), fa_min(rows, 32), dim, negate);
}

void fa_amx_take_keys(fa_amx_rows *out, const fa_head *head, const fa_view *view, int start, int rows, int dim) {
  take_rows(out, head, view, fa_key_row(head, view, start), fa_min(rows, 32), dim, 0);
}

/* The four forms of one tile: 16 rows of 32 dims, or 32 rows of 16 dims. */
AMX_INLINE void put_tile(const uint16_t *const *row, const fa_amx_form form, int strip, int half, uint16_t *tile) {
  const int over_dims = form == FA_AMX_DIMS_LEFT || form == FA_AMX_DIMS_RIGHT, column = strip * 32 + half * 16;
  i32x16 line[16];
  for (int i = 0; i < 16; i++)
    line[i] = over_dims ? i32_load(row[half * 16 + i] + strip * 32) : i16_interleave(row[2 * i] + column, row[2 * i + 1] + column);
  if (form == FA_AMX_DIMS_RIGHT || form == FA_AMX_ROWS_LEFT) i32_transpose(line);
  for (int i = 0; i < 16; i++) i32_store(tile + i * 32, line[i]);
}

AMX_INLINE void put_tiles(const fa_amx_rows *rows, const fa_amx_form form, uint16_t *tiles) {
  for (int strip = 0; strip < rows->strips; strip++)
    for (int part = 0; part < rows->parts; part++)
      for (int half = 0; half < 2; half++, tiles += TILE_HALVES) put_tile(rows->row[part], form, strip, half, tiles);
}

void fa_amx_put(const fa_amx_rows *rows, fa_amx_form form, uint16_t *tiles) {
  switch (form) {
    case FA_AMX_DIMS_LEFT: put_tiles(rows, FA_AMX_DIMS_LEFT, tiles); break;
    case FA_AMX_DIMS_RIGHT: put_tiles(rows, FA_AMX_DIMS_RIGHT, tiles); break;
    case FA_AMX_ROWS_LEFT: put_tiles(rows, FA_AMX_ROWS_LEFT, tiles); break;
    case FA_AMX_ROWS_RIGHT: put_tiles(rows, FA_AMX_ROWS_RIGHT, tiles); break;
  }
}

/* The sum of each of 16 vectors. */
AMX_INLINE f32x16 sum_lanes(const f32x16 sum[16]) {
  _Alignas(64) float lanes[16][16], turned[16][16];
  for (int i = 0; i < 16; i++) f32_store(lanes[i], sum[i]);
  flip(lanes[0], 16, 16, 16, turned[0], 16);
  f32x16 total = f32_load(turned[0]);
  for (int i = 1; i < 16; i++) total = f32_add(total, f32_load(turned[i]));
  return total;
}

void fa_amx_dot_rows(const fa_amx_rows *a, const fa_amx_rows *b, float sums[32]) {
  for (int r = 0; r < 32; r += 16) {
    f32x16 sum[16];
    for (int i = 0; i < 16; i++) {
      sum[i] = f32_splat(0);
      for (int part = a->parts * a->parts - 1; part >= 0; part--) /* products of low parts first */
        for (int d = 0; d < a->strips * 32; d += 32)
          sum[i] = bf16_dot(sum[i], i32_load(a->row[part / 2][r + i] + d), i32_load(b->row[part % 2][r + i] + d));
    }
    f32_store(sums + r, sum_lanes(sum));
  }
}

int fa_amx_finite(const fa_amx_rows *rows) {
  _Alignas(64) uint16_t largest[32];
  i32x16 top = i32_load(zero_row);
  for (int r = 0; r < 32; r++)
    for (int d = 0; d < rows->strips * 32; d += 32) top = bf16_larger(i32_load(rows->row[0][r] + d), top);
  i32_store(largest, top);
  for (int i = 0; i < 32; i++)
    if (largest[i] >= 0x7F80) return 0;
  return 1;
}

AMX_END
#endif
