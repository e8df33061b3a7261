// Which keys of a tile the rows of a warpgroup see: a wgmma's accumulator holds the scores of 64 rows and N keys, of which
// a lane has those of two rows.
#pragma once

#include "forward/prefixes.cuh"
#include "softmax.cuh"

namespace fastprefix {

// What a lane needs in the loop. What masks need of its rows they find out again: registers are scarcer than time there.
struct Lane {
  const AttentionCall& c;
  const Divisor& by_G;
  const RowTile& t;
  int lane, group;
  float scale, cap;   // base 2; cap 0: none
};

FP_DEVICE int row_of_lane(const Lane& me, int half) {
  return me.t.first_row + me.group * 64 + thread_index() / 32 % 4 * 16 + accumulator_row(me.lane, half);
}
FP_DEVICE int position_of(const Lane& me, int half) { return me.t.start + quotient(row_of_lane(me, half), me.by_G); }
FP_DEVICE int prefix_of(const Lane& me, int half) {
  const int row = row_of_lane(me, half);
  return row < me.t.rows ? prefix_of_token(me.c, me.t.b, quotient(row, me.by_G)) : -1;
}

// Element e of a lane's scores: its key, counted from the tile's first, and which of the two rows it is of.
FP_DEVICE int key_of(int e, int lane) { return e / 4 * 8 + accumulator_column(lane) + e % 2; }
FP_DEVICE int row_of(int e) { return e / 2 % 2; }

// Keys of one of the lane's rows that it sees, as far as that is a range.
struct Range {
  int first, last;
};

template <int ELEMENTS>
FP_DEVICE void hide_outside(float (&x)[ELEMENTS], const Lane& me, int first, const Range (&seen)[2]) {
  FP_UNROLL
  for (int e = 0; e < ELEMENTS; e++) {
    const int key = first + key_of(e, me.lane), row = row_of(e);
    if (key < seen[row].first || key > seen[row].last) x[e] = NEGATIVE_INFINITY;
  }
}

// With a bias a tile of a prefix has so many keys at most: with more, Hopper's forward would spill registers.
constexpr int MOST_BIASED_KEYS = 64;

// The bias of a tile's tokens, as far as prefix n has any, onto its base-2 logits.
template <int ELEMENTS>
FP_DEVICE void add_bias(float (&x)[ELEMENTS], const Lane& me, int n, int first, int keys) {
  const int lane = thread_index_again() % 32;   // or the addresses would be found for calls without a bias, too
  const int own = first + accumulator_column(lane), left = keys - own;
  const float* bias = bias_of_prefix(me.c, n, tokens_before(me.c, n), me.t.h_kv) + own;
  FP_UNROLL
  for (int j = 0; j < ELEMENTS / 4; j++) {
    FP_UNROLL
    for (int e = 0; e < 2; e++) {
      const float its = j * 8 + e < left ? bias_at(bias, j * 8 + e) : 0.0f;
      x[4 * j + e] += its;
      x[4 * j + 2 + e] += its;
    }
  }
}

// A tile of prefix n: all of its tokens with their bias, for the rows that read it. By all lanes of a warp together.
template <int ELEMENTS>
FP_DEVICE void mask_prefix(float (&x)[ELEMENTS], const Lane& me, int n, int first, int keys, bool shared_by_all) {
  if constexpr (2 * ELEMENTS <= MOST_BIASED_KEYS)
    if (me.c.prefix_bias) add_bias(x, me, n, first, keys);
  if (first + 2 * ELEMENTS <= keys && shared_by_all) return;
  Range seen[2];
  FP_UNROLL for (int half = 0; half < 2; half++) seen[half] = {0, shared_by_all || prefix_of(me, half) == n ? keys - 1 : -1};
  hide_outside(x, me, first, seen);
}

FP_DEVICE Range seen_by(const Lane& me, int half) {
  const int position = position_of(me, half);
  return {me.c.window ? position - me.c.window + 1 : 0, me.c.causal ? smaller(me.t.high - 1, position) : me.t.high - 1};
}

// A key that padding and segments let all rows of segment `own` see.
FP_DEVICE bool is_seen(const AttentionCall& c, int b, int key, int own) {
  if (c.padding && ld_global(c.padding + b * c.padding_batch + key * c.padding_key) == 0) return false;
  return !c.segments.data || static_cast<int>(segment_at(c, b, key)) == own;
}

// Whether all rows see all of these keys but for their ranges' ends: most tiles of padded and packed batches.
template <int KEYS>
FP_DEVICE bool is_seen_by_all(const Lane& me, int first) {
  // Numbers at the bounds' ends stand for several ids, and equal none of them but one.
  bool all = me.t.least_segment == me.t.most_segment;
  FP_UNROLL
  for (int i = 0; i < KEYS / 32; i++) {
    const int key = first + i * 32 + me.lane;
    all = all && (key >= me.t.high || is_seen(me.c, me.t.b, key, me.t.least_segment));
  }
  return vote_all(all);
}

// Key by key, in a loop that is not unrolled: one bit for each of the lane's scores.
template <int ELEMENTS>
FP_DEVICE void hide_by_key(float (&x)[ELEMENTS], const Lane& me, int first, const Range (&seen)[2]) {
  uint32_t bits[2] = {0, 0};
  int segment[2] = {0, 0};
  if (me.c.segments.data)
    FP_UNROLL for (int half = 0; half < 2; half++) segment[half] = static_cast<int>(segment_at(me.c, me.t.b, position_of(me, half)));
  FP_NO_UNROLL
  for (int i = 0; i < ELEMENTS / 2; i++) {
    const int key = first + i / 2 * 8 + accumulator_column(me.lane) + i % 2;
    FP_UNROLL
    for (int half = 0; half < 2; half++) {
      const bool in_range = key >= seen[half].first && key <= seen[half].last;
      if (in_range && is_seen(me.c, me.t.b, key, segment[half])) bits[half] |= 1u << i;
    }
  }
  FP_UNROLL
  for (int e = 0; e < ELEMENTS; e++)
    if (!(bits[row_of(e)] >> (e / 4 * 2 + e % 2) & 1)) x[e] = NEGATIVE_INFINITY;
}

template <int ELEMENTS>
FP_DEVICE void hide_content(float (&x)[ELEMENTS], const Lane& me, int first) {
  constexpr int KEYS = 2 * ELEMENTS;
  const AttentionCall& c = me.c;
  const RowTile& t = me.t;
  const int last = first + KEYS - 1;
  const bool crossed = last >= t.high || (c.causal && last > t.first_position) || (c.window && first <= t.last_position - c.window);
  const bool by_key = (c.padding || c.segments.data) && !is_seen_by_all<KEYS>(me, first);
  if (!crossed && !by_key) return;
  const Range seen[2] = {seen_by(me, 0), seen_by(me, 1)};
  if (by_key)
    hide_by_key(x, me, first, seen);
  else
    hide_outside(x, me, first, seen);
}

}  // namespace fastprefix
