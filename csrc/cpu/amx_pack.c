/* amx_pack.c: see amx_pack.h. */
#include "amx.h"
#ifdef FA_HAS_AMX
#include "amx_pack.h"

#include "amx_tile.h"

AMX_BEGIN

/* 32 floats -> 32 halves, and what their rounding left: nothing where it is not finite. */
AMX_INLINE void split(const float *src, f32x16 sign, int parts, uint16_t *high, uint16_t *low) {
  f32x16 x = f32_mul(f32_load(src), sign), y = f32_mul(f32_load(src + 16), sign);
  i32_store(high, bf16_rows(x, y));
  if (parts == 1) return;
  i32x16 pairs = bf16_pairs(x, y);
  f32x16 x_low = f32_sub(x, bf16_even(pairs)), y_low = f32_sub(y, bf16_odd(pairs));
  i32_store(low, bf16_rows(f32_finite_or_zero(x_low), f32_finite_or_zero(y_low)));
}

void fa_amx_take_rows(fa_amx_rows *out, const float *tile, int ld, int rows, int dim, int parts, int negate) {
  const f32x16 sign = f32_splat(negate ? -1.0f : 1.0f);
  out->strips = fa_amx_strips(dim);
  out->parts = parts;
  for (int r = 0; r < 32; r++)
    for (int strip = 0; strip < out->strips; strip++) {
      _Alignas(64) float edge[32] = {0};
      const float *src = tile + (int64_t)r * ld + strip * 32;
      if (r >= rows || strip * 32 + 32 > ld) {
        if (r < rows) memcpy(edge, src, (size_t)(ld - strip * 32) * sizeof(float));
        src = edge;
      }
      split(src, sign, parts, out->part[0][r] + strip * 32, out->part[1][r] + strip * 32);
    }
}

/* The four forms of one tile: 16 rows of 32 dims, or 32 rows of 16 dims. */
AMX_INLINE void put_tile(const uint16_t (*rows)[FA_MAX_HEAD_DIM], fa_amx_form form, int strip, int half, uint16_t *tile) {
  i32x16 line[16];
  int over_dims = form == FA_AMX_DIMS_LEFT || form == FA_AMX_DIMS_RIGHT;
  int column = strip * 32 + half * 16;
  for (int i = 0; i < 16; i++)
    line[i] = over_dims ? i32_load(rows[half * 16 + i] + strip * 32) : i16_interleave(rows[2 * i] + column, rows[2 * i + 1] + column);
  if (form == FA_AMX_DIMS_RIGHT || form == FA_AMX_ROWS_LEFT) i32_transpose(line);
  for (int i = 0; i < 16; i++) i32_store(tile + i * 32, line[i]);
}

void fa_amx_put(const fa_amx_rows *rows, fa_amx_form form, uint16_t *tiles) {
  for (int strip = 0; strip < rows->strips; strip++)
    for (int part = 0; part < rows->parts; part++)
      for (int half = 0; half < 2; half++, tiles += TILE_HALVES) put_tile(rows->part[part], form, strip, half, tiles);
}

void fa_amx_row_sizes(const float *tile, int rows, int ld, float *norm, float *top) {
  *norm = *top = 0;
  for (int r = 0; r < rows; r++) {
    _Alignas(64) float squares[16], largest[16];
    f32x16 sum = f32_splat(0), most = sum;
    for (int d = 0; d < ld; d += 16) {
      f32x16 finite = f32_finite_or_zero(f32_load(tile + r * ld + d));
      sum = f32_fma(finite, finite, sum);
      most = f32_max(f32_max(f32_sub(f32_splat(0), finite), finite), most);
    }
    f32_store(squares, sum);
    f32_store(largest, most);
    float total = 0;
    for (int i = 0; i < 16; i++) {
      total += squares[i];
      *top = largest[i] > *top ? largest[i] : *top;
    }
    if (total > *norm) *norm = total;
  }
}

AMX_END
#endif
