/* scores_sm90.h: from the products of one key block to weights, on the accumulators of a warpgroup.
 *
 * Expects BLOCK_N, MASKING, SCORE, DROPOUT.
 */
#ifndef FA_SCORES_SM90_H
#define FA_SCORES_SM90_H

#include "shift_sm90.h"
#include "softmax.h"

#define S_FRAGS (BLOCK_N / 8)
#define MOST_WEIGHT 32768.0f /* 16 bits hold it, and the sum over all keys stays far from infinity */
#define SHRINKABLE 1e30f     /* so that 1 over it is a normal number */
#define KEPT_WORDS ((S_FRAGS + 7) / 8)

/* Values of SCORE from where on there is a bias or a mask: of any strides, element by element; one of the two, as shift_sm90.h wants it. */
#define SCORE_AND_BIAS 2
#define SCORE_AND_TILES 3

/* What masks and scores depend on. Where they are needed the tile is read again, rather than kept in registers through the loop. */
typedef struct {
  const fa_arg_problem *problem;
  uint32_t tile_smem;
  int warp_row;        /* first row of the warp within the tile */
  int n0;              /* first key of the block */
  fa_philox_key key;   /* DROPOUT */
  uint32_t shift_smem; /* SCORE_AND_TILES: the warp's place, */
  int next_n0;         /* and the keys to fetch next; below 0: none */
} block_place;

/* Scale, softcap, ALiBi; bias and mask. */
FA_INLINE void change_scores(float s[S_FRAGS][4], const block_place *at) {
  const fa_arg_problem *p = at->problem;
  work t = receive_work(p, at->tile_smem);
  int lane = laneid(), column = at->n0 + 2 * (lane & 3);
#pragma unroll
  for (int r = 0; r < 2; r++) {
    row_place row = place_of_row(p, &t, at->warp_row + (lane >> 2) + 8 * r);
    fa_tile tile = {t.b, row.h, 0, 0, 0, 0, t.len_q, t.len_k, 0, 0};
    fa_score_head head = fa_score_of_head(p, &tile);
    int scale_is_all = SCORE == SCORE_AND_TILES && head.softcap == 0.0f;
    if (SCORE != SCORE_AND_BIAS) head.bias = head.mask = 0;
    if (r == 0 && !scale_is_all) fa_cap_scores(s, 0, S_FRAGS, &head); /* the same for all heads */
    if (r == 0 && SCORE == SCORE_AND_TILES) apply_shifts(s, scale_is_all ? head.scale : 1.0f, p, at->shift_smem);
    fa_shift_row(s, S_FRAGS, r, p, &head, row.used ? t.len_q : 0, t.len_k, row.position, column);
  }
  if (SCORE == SCORE_AND_TILES && at->next_n0 >= 0) fetch_shifts(p, at->tile_smem, at->shift_smem, at->warp_row, at->next_n0);
}

/* Which weights of the block dropout lets this lane keep: bit 8 * e + 7 - n % 8 of word n / 8 is element e of fragment n. Needs no score: drawn
 * while the products run. One Philox block has four columns of one row, and a lane holds two columns of two rows: even lanes draw for the first
 * row, odd lanes for the second, and neighbours swap halves. */
FA_INLINE void draw_kept(uint32_t kept[KEPT_WORDS], const block_place *at) {
  const fa_arg_problem *p = at->problem;
  work t = receive_work(p, at->tile_smem);
  int lane = laneid(), odd = lane & 1, column = at->n0 + 2 * (lane & 2);
  row_place row = place_of_row(p, &t, at->warp_row + (lane >> 2) + 8 * odd);
#pragma unroll
  for (int i = 0; i < KEPT_WORDS; i++) {
    uint32_t mine = 0, other;
#pragma unroll 2
    for (int n = 0; n < fa_min(8, S_FRAGS - 8 * i); n++) {
      fa_philox_block drawn = fa_dropout_words(at->key, t.b, row.h, row.position, (column + 8 * (8 * i + n)) >> 2);
#pragma unroll
      for (int j = 0; j < 4; j++)
        if (drawn.word[j] >= p->dropout_threshold) mine |= 128u << (8 * j) >> n;
    }
    other = __shfl_xor_sync(0xFFFFFFFFu, mine, 1);
    kept[i] = odd ? prmt(other, mine, 0x7632) : prmt(mine, other, 0x5410);
  }
}

/* Packed weights that are not kept become 0. */
FA_INLINE void drop_weights(uint32_t p[2 * S_FRAGS], const uint32_t kept[KEPT_WORDS]) {
#pragma unroll
  for (int n = 0; n < S_FRAGS; n++) { /* a byte's highest bit, twice, for each of its two weights */
    uint32_t bits = kept[n / 8] << (n % 8);
    p[2 * n] &= prmt(bits, 0, 0x9988);
    p[2 * n + 1] &= prmt(bits, 0, 0xBBAA);
  }
}

/* Scores outside the rows' intervals of keys become -infinity. */
FA_INLINE void mask_scores(float s[S_FRAGS][4], const block_place *at) {
  const fa_arg_problem *p = at->problem;
  work t = receive_work(p, at->tile_smem);
  int lane = laneid(), column = at->n0 + 2 * (lane & 3);
#pragma unroll
  for (int r = 0; r < 2; r++) {
    int row = place_of_row(p, &t, at->warp_row + (lane >> 2) + 8 * r).position;
    int hi = (MASKING ? fa_row_hi(p->rule, t.len_q, t.len_k, row) : t.len_k) - column;
#pragma unroll
    for (int n = 0; n < S_FRAGS; n++)
#pragma unroll
      for (int e = 0; e < 2; e++)
        if (8 * n + e >= hi) s[n][2 * r + e] = MINUS_INFINITY;
    if (MASKING && p->rule.window_left >= 0) {
      int lo = fa_row_lo(p->rule, t.len_q, t.len_k, row) - column;
#pragma unroll
      for (int n = 0; n < S_FRAGS; n++)
#pragma unroll
        for (int e = 0; e < 2; e++)
          if (8 * n + e < lo) s[n][2 * r + e] = MINUS_INFINITY;
    }
  }
}

/* Whether the running maxima may stay: no score of the warp exceeds its row's by more than LAZY. Every lane looks at its own columns alone, and says
 * no too when one of its rows has no positive score: as long as one is positive floats compare like integers, of which the GPU takes the maximum of
 * three at a time. Even and odd fragments make two chains, which do not wait for each other. */
FA_INLINE int maxima_may_stay(float s[S_FRAGS][4], float to_log2, const float max[2]) {
  int top[4] = {__float_as_int(s[0][0]), __float_as_int(s[0][2]), __float_as_int(s[1][0]), __float_as_int(s[1][2])}, stay = 1;
#pragma unroll
  for (int n = 0; n < S_FRAGS; n++)
#pragma unroll
    for (int r = 0; r < 2; r++) {
      int *here = &top[n % 2 * 2 + r];
      *here = fa_max(fa_max(__float_as_int(s[n][2 * r]), __float_as_int(s[n][2 * r + 1])), *here);
    }
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float largest = __int_as_float(fa_max(top[r], top[2 + r])) * to_log2;
    stay = stay && largest >= 0.0f && largest <= max[r] + LAZY;
  }
  return __all_sync(0xFFFFFFFFu, stay);
}

/* Moves the running maxima of the warp's rows to where they are. `rescale` is what sums and O have to be multiplied with. */
FA_INLINE void move_maxima(float s[S_FRAGS][4], float to_log2, float max[2], float rescale[2]) {
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float top = s[0][2 * r];
#pragma unroll
    for (int n = 0; n < S_FRAGS; n++) top = fmaxf(top, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
    float moved = fmaxf(max[r], fa_quad_max(top * to_log2));
    rescale[r] = moved == MINUS_INFINITY ? 1.0f : ex2_approx(max[r] - moved);
    max[r] = moved;
  }
}

/* Prepares the scores of a block for weigh, with the running maxima of earlier blocks where those will do: returns whether they have moved to where this
 * block's are, and sums and O have to be multiplied with `rescale`. Without masks and shifts nothing is looked at: see weights_are_within. */
FA_INLINE int prepare_scores(float s[S_FRAGS][4], const block_place *at, float to_log2, int masked, float max[2], float rescale[2]) {
  if (SCORE) change_scores(s, at);
  if (masked) mask_scores(s, at);
  int moved = masked || !LAZY_RESCALE || (SCORE && !(SCORE == SCORE_AND_TILES && maxima_may_stay(s, to_log2, max)));
  if (moved) move_maxima(s, to_log2, max, rescale);
  return moved;
}

/* x, but not before y is known. `zero` is 0, which only the host knows. */
FA_INLINE float after(float x, float y, int zero) { return __uint_as_float(__float_as_uint(x) | (__float_as_uint(y) & (uint32_t)zero)); }

/* What the weights of a block go by: the maxima; and the sums as they were two fragments ago. */
typedef struct {
  float shift[2], known[2];
} weighing;

/* taken: the maxima are those after this block. Where that is -infinity the row has seen nothing, and its weights are 0; where it was before this block,
 * they become infinite, which weights_are_within does not let pass. */
FA_INLINE weighing weighing_from(const float max[2], int taken) {
  weighing w;
#pragma unroll
  for (int r = 0; r < 2; r++) w.shift[r] = taken && max[r] == MINUS_INFINITY ? 0.0f : max[r];
  return w;
}

/* Fragments first to end - 1 of the scores become weights exp2(score * to_log2 - max), and sum[] grows by this lane's part of them. The exponential
 * unit is what is short: so that it starts at once and never waits, the multiplications for two fragments wait for the weights of the two before
 * the last, or ptxas would do all of them first. */
FA_INLINE void weigh(float s[S_FRAGS][4], int first, int end, float to_log2, weighing *w, float sum[2], int zero) {
#pragma unroll
  for (int n = first; n < end; n++)
#pragma unroll
    for (int r = 0; r < 2; r++) {
      if (n % 2 == 0) {
        if (n >= 4) w->shift[r] = after(w->shift[r], w->known[r], zero);
        w->known[r] = sum[r];
      }
#pragma unroll
      for (int e = 2 * r; e < 2 * r + 2; e++) {
        s[n][e] = ex2_approx(__fmaf_rn(s[n][e], to_log2, -w->shift[r]));
        sum[r] += s[n][e];
      }
    }
}

/* Weights that go by the maxima of earlier blocks may be large. How large is seen afterwards, for nothing, in the sums of each lane over the block: looking
 * for maxima beforehand would take as long as half the exponentials. */
FA_INLINE int weights_are_within(float most, const float added[2]) { return __all_sync(0xFFFFFFFFu, added[0] <= most && added[1] <= most); }

/* Rows with large weights: maxima grow by a whole number, and sums and O have to be multiplied with `rescale`. */
FA_INLINE void shrink_weights(float s[S_FRAGS][4], float max[2], float added[2], float rescale[2]) {
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float largest = fa_quad_max(added[r]), growth = largest > MOST_WEIGHT ? ceilf(__log2f(largest)) : 0.0f;
    rescale[r] = ex2_approx(-growth);
    max[r] += growth;
    added[r] *= rescale[r];
#pragma unroll
    for (int n = 0; n < S_FRAGS; n++) s[n][2 * r] *= rescale[r], s[n][2 * r + 1] *= rescale[r];
  }
}

FA_INLINE void pack_weights(uint32_t p[2 * S_FRAGS], float s[S_FRAGS][4]) {
#pragma unroll
  for (int n = 0; n < S_FRAGS; n++) {
    p[2 * n] = fa_pack(s[n][0], s[n][1]);
    p[2 * n + 1] = fa_pack(s[n][2], s[n][3]);
  }
}

#endif
