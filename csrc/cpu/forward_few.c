/* forward_few.c: tiles of few query rows, which read every key once: memory sets their speed, so keys are read as they lie, a strip of
 * rows at a time for all heads at hand, whose rows lie side by side. The memory then sees a few streams that run through it. */
#include "forward_few.h"

#include "head.h"

enum { STRIP_KEYS = 8 };

/* Rows of 64 keys. */
typedef struct {
  const char *at;
  fa_dtype dtype;
  ptrdiff_t row; /* elements between rows */
} key_rows;

static int lies_as_read(const fa_view *view, int dim) { return view->d == 1 && dim % FA_TILE_PAD == 0; }

int fa_reads_in_place(const fa_problem *p) { return lies_as_read(&p->k, p->dim_qk) && lies_as_read(&p->v, p->dim_v); }

/* Elsewhere they are loaded into a tile first. */
static key_rows rows_of(const fa_head *head, const fa_view *view, int dim, int n0, int columns, void *tile) {
  if (lies_as_read(view, dim)) return (key_rows){fa_key_row(head, view, n0), head->problem->dtype, (ptrdiff_t)view->s};
  fa_load_key_rows(head, view, n0, columns, dim, tile, fa_tile_ld(dim));
  return (key_rows){tile, head->ops->real_bytes == 8 ? FA_F64 : FA_F32, fa_tile_ld(dim)};
}

static const void *row_at(const key_rows *rows, int j) { return rows->at + j * rows->row * fa_dtype_bytes(rows->dtype); }

/* Asks for the strip after the one at hand: the next rows of the same heads. */
static void ask_for_strip(const key_rows *rows, int j, int dim) {
  int64_t bytes = dim * fa_dtype_bytes(rows->dtype);
  for (int r = j + STRIP_KEYS; r < j + 2 * STRIP_KEYS; r++)
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch((const char *)row_at(rows, r) + at, 0, 2);
}

static void multiply_keys(const fa_forward_tile *tiles, int count, int n0, int columns) {
  const fa_problem *p = tiles->heads->problem;
  const fa_tile_ops *ops = tiles->heads->ops;
  key_rows k[FA_MAX_TOGETHER];
  int dim = fa_pad(p->dim_qk), ld = fa_tile_ld(p->dim_qk);
  for (int i = 0; i < count; i++) k[i] = rows_of(tiles[i].heads, &p->k, p->dim_qk, n0, columns, tiles[i].kt);
  for (int j = 0; j < columns; j += STRIP_KEYS)
    for (int i = 0; i < count; i++) {
      ask_for_strip(k + i, j, dim);
      ops->dots(tiles[i].rows * tiles[i].count, fa_min(STRIP_KEYS, columns - j), dim, tiles[i].q, ld, row_at(k + i, j), k[i].dtype,
                k[i].row, fa_at(ops, tiles[i].s, j), FA_BLOCK_LD);
    }
}

static void multiply_values(const fa_forward_tile *tiles, int count, int n0, int columns) {
  const fa_problem *p = tiles->heads->problem;
  const fa_tile_ops *ops = tiles->heads->ops;
  key_rows v[FA_MAX_TOGETHER];
  int dim = fa_pad(p->dim_v), ld = fa_tile_ld(p->dim_v);
  for (int i = 0; i < count; i++) v[i] = rows_of(tiles[i].heads, &p->v, p->dim_v, n0, columns, tiles[i].v);
  for (int j = 0; j < columns; j += STRIP_KEYS)
    for (int i = 0; i < count; i++) {
      ask_for_strip(v + i, j, dim);
      ops->few(tiles[i].rows * tiles[i].count, dim, fa_min(STRIP_KEYS, columns - j), fa_at(ops, tiles[i].s, j), FA_BLOCK_LD,
               row_at(v + i, j), v[i].dtype, v[i].row, tiles[i].o, ld);
    }
}

void fa_attend_few(const fa_forward_tile *tiles, int count, int n0) {
  const fa_head *head = tiles->heads;
  const fa_problem *p = head->problem;
  int columns = fa_min(FA_BLOCK_N, head->seq.len_k - n0), partial = 0;
  multiply_keys(tiles, count, n0, columns);
  for (int i = 0; i < count; i++) partial |= fa_weigh_products(tiles + i, n0, &(fa_patch){0, tiles[i].rows, 0, fa_pad(columns)});
  if (!partial) {
    multiply_values(tiles, count, n0, columns);
    return;
  }
  for (int i = 0; i < count; i++) { /* values that must not reach all rows are looked at first */
    fa_load_key_rows(tiles[i].heads, &p->v, n0, columns, p->dim_v, tiles[i].v, fa_tile_ld(p->dim_v));
    fa_add_values(tiles + i, &(fa_patch){0, tiles[i].rows, 0, fa_pad(columns)}, columns, 1);
  }
}
