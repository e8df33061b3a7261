// A consumer of the forward for sm_90a: a warpgroup with 64 rows. While its tensor cores multiply the next tile's keys and
// this tile's values, its other units compute a softmax (FlashAttention-3, Shah et al. 2024, section 3.2).
#pragma once

#include "forward/prefixes.cuh"
#include "softmax.cuh"

namespace fastprefix {

template <class T, class Shared, int D, int BLOCK_N, int BLOCK_P, int STAGES>
struct ForwardConsumer {
  struct State {
    float o[D / 2], m[2], l[2];   // of rows accumulator_row(lane, 0 and 1) of the warp's 16; m before the scale
    int step;                     // tiles that were read
  };
  // What a lane needs in the loop. What masks need of its rows they find out again: registers are scarcer than time there.
  struct Lane {
    const ForwardParams& p;
    const RowTile& t;
    int lane, group;
    float scale, cap;   // base 2; cap 0: none
  };
  FP_DEVICE int row_of_lane(const Lane& me, int half) {
    return me.t.first_row + me.group * 64 + thread_index() / 32 % 4 * 16 + accumulator_row(me.lane, half);
  }
  FP_DEVICE int position_of(const Lane& me, int half) { return me.t.start + quotient(row_of_lane(me, half), me.p.by_G); }
  FP_DEVICE int prefix_of(const Lane& me, int half) {
    const int row = row_of_lane(me, half);
    return row < me.t.rows ? prefix_of_token(me.p.call, me.t.b, quotient(row, me.p.by_G)) : -1;
  }

  FP_DEVICE void release(uint32_t barrier) {
    if (thread_index() % 32 == 0) mbarrier_arrive(barrier);
  }

  template <int N>
  FP_DEVICE void multiply_keys(float (&x)[N / 2], uint32_t rows, uint32_t tile) {
    FP_UNROLL
    for (int step = 0; step < D / 16; step++) {
      const uint32_t panel = step / 4, columns = step % 4 * 32;
      wgmma_ss<T, false>(x, matrix_descriptor(rows + panel * (Shared::ROWS / Shared::PANELS) + columns, 16, 1024),
                     matrix_descriptor(tile + panel * N * 128 + columns, 16, 1024), step > 0);
    }
  }
  template <int N>
  FP_DEVICE void multiply_values(float (&o)[D / 2], const uint32_t (&weights)[N / 16][4], uint32_t tile) {
    FP_UNROLL
    for (int step = 0; step < N / 16; step++)
      wgmma_rs<T, true>(o, weights[step], matrix_descriptor(tile + step * 16 * 128, N * 128, 1024), true);
  }

  // One step of the running softmax; x becomes its weights, and o's rows are to be multiplied with alpha.
  template <int N>
  FP_DEVICE void update(State& state, float (&x)[N / 2], float (&alpha)[2], float scale) {
    FP_UNROLL
    for (int half = 0; half < 2; half++) {
      float m = state.m[half];
      FP_UNROLL
      for (int j = 0; j < N / 8; j++) m = larger(m, larger(x[4 * j + 2 * half], x[4 * j + 2 * half + 1]));
      m = larger(m, shfl_xor(m, 1));
      m = larger(m, shfl_xor(m, 2));
      const float shift = shift_of(m) * scale;
      alpha[half] = ex2_approx(state.m[half] * scale - shift);
      float sum = 0.0f;
      FP_UNROLL
      for (int j = 0; j < N / 8; j++) {
        FP_UNROLL
        for (int e = 4 * j + 2 * half; e < 4 * j + 2 * half + 2; e++) {
          x[e] = ex2_approx(x[e] * scale - shift);
          sum += x[e];
        }
      }
      state.m[half] = m;
      state.l[half] = state.l[half] * alpha[half] + sum;   // of this lane's keys
    }
  }
  FP_DEVICE void rescale(State& state, const float (&alpha)[2]) {
    FP_UNROLL
    for (int j = 0; j < D / 8; j++) FP_UNROLL for (int e = 0; e < 4; e++) state.o[4 * j + e] *= alpha[e / 2];
  }
  template <int N>
  FP_DEVICE void pack_weights(uint32_t (&weights)[N / 16][4], const float (&x)[N / 2]) {
    FP_UNROLL
    for (int step = 0; step < N / 16; step++)
      FP_UNROLL for (int i = 0; i < 4; i++) weights[step][i] = pack<T>(x[8 * step + 2 * i], x[8 * step + 2 * i + 1]);
  }

  // `count` tiles of N keys. `see` hides keys of the next tile.
  template <int N, class See>
  FP_DEVICE void attend(State& state, const Lane& me, int count, See&& see) {
    if (count == 0) return;
    const uint32_t rows = Shared::rows() + me.group * 64 * 128;
    float x[N / 2], alpha[2];
    uint32_t weights[N / 16][4];
    mbarrier_wait(Shared::full_k(state.step % STAGES), state.step / STAGES & 1);
    wgmma_fence();
    multiply_keys<N>(x, rows, Shared::k_tile(state.step % STAGES));
    wgmma_commit_group();
    wgmma_wait_group<0>();
    pin(x);
    release(Shared::empty_k(state.step % STAGES));
    see(x);
    update<N>(state, x, alpha, me.scale);
    rescale(state, alpha);
    pack_weights<N>(weights, x);
    FP_NO_UNROLL
    for (int i = 1; i < count; i++) {
      const int last = state.step % STAGES, phase = state.step / STAGES & 1;
      state.step++;
      const int stage = state.step % STAGES;
      mbarrier_wait(Shared::full_k(stage), state.step / STAGES & 1);
      wgmma_fence();
      multiply_keys<N>(x, rows, Shared::k_tile(stage));
      wgmma_commit_group();
      mbarrier_wait(Shared::full_v(last), phase);
      wgmma_fence();
      multiply_values<N>(state.o, weights, Shared::v_tile(last));
      wgmma_commit_group();
      wgmma_wait_group<1>();   // the scores are there, the values still under way
      pin(x);
      release(Shared::empty_k(stage));
      see(x);
      update<N>(state, x, alpha, me.scale);
      wgmma_wait_group<0>();
      pin(state.o);
      release(Shared::empty_v(last));
      rescale(state, alpha);
      pack_weights<N>(weights, x);
    }
    const int last = state.step % STAGES;
    mbarrier_wait(Shared::full_v(last), state.step / STAGES & 1);
    wgmma_fence();
    multiply_values<N>(state.o, weights, Shared::v_tile(last));
    wgmma_commit_group();
    wgmma_wait_group<0>();
    pin(state.o);
    release(Shared::empty_v(last));
    state.step++;
  }

  template <int N>
  FP_DEVICE void cap_logits(float (&x)[N / 2], const Lane& me) {
    if (me.cap == 0.0f) return;
    const Logits to{fabsf(me.p.call.scale) / me.p.call.softcap, me.cap};   // its sign is in q
    FP_UNROLL for (int e = 0; e < N / 2; e++) x[e] = logit(x[e], to);
  }

  // Keys of one of the lane's rows that it sees, as far as that is a range.
  struct Range {
    int first, last;
  };

  // Element e of a lane's scores: its key, counted from the tile's first, and which of the two rows it is of.
  FP_DEVICE int key_of(int e, int lane) { return e / 4 * 8 + accumulator_column(lane) + e % 2; }
  FP_DEVICE int row_of(int e) { return e / 2 % 2; }

  template <int N>
  FP_DEVICE void hide_outside(float (&x)[N / 2], const Lane& me, int first, const Range (&seen)[2]) {
    FP_UNROLL
    for (int e = 0; e < N / 2; e++) {
      const int key = first + key_of(e, me.lane), row = row_of(e);
      if (key < seen[row].first || key > seen[row].last) x[e] = NEGATIVE_INFINITY;
    }
  }

  // A tile of prefix n: all of its tokens, for the rows that read it.
  FP_DEVICE void see_prefix(float (&x)[BLOCK_P / 2], const Lane& me, int n, int first, int keys, bool shared_by_all) {
    cap_logits<BLOCK_P>(x, me);
    if (first + BLOCK_P <= keys && shared_by_all) return;
    Range seen[2];
    FP_UNROLL for (int half = 0; half < 2; half++) seen[half] = {0, shared_by_all || prefix_of(me, half) == n ? keys - 1 : -1};
    hide_outside<BLOCK_P>(x, me, first, seen);
  }

  FP_DEVICE Range seen_by(const Lane& me, int half) {
    const AttentionCall& c = me.p.call;
    const int position = position_of(me, half);
    return {c.window ? position - c.window + 1 : 0, c.causal ? smaller(me.t.high - 1, position) : me.t.high - 1};
  }

  // A key that padding and segments let all rows of segment `own` see.
  FP_DEVICE bool is_seen(const Lane& me, int key, int own) {
    const AttentionCall& c = me.p.call;
    if (c.padding && ld_global(c.padding + me.t.b * c.padding_batch + key * c.padding_key) == 0) return false;
    return !c.segments.data || segment_at(c, me.t.b, key) == own;
  }

  // Whether all rows see all keys of the tile but for their ranges' ends: most tiles of padded and packed batches.
  FP_DEVICE bool is_seen_by_all(const Lane& me, int first) {
    bool all = me.t.least_segment == me.t.most_segment;
    FP_UNROLL
    for (int i = 0; i < BLOCK_N / 32; i++) {
      const int key = first + i * 32 + me.lane;
      all = all && (key >= me.t.high || is_seen(me, key, me.t.least_segment));
    }
    return vote_all(all);
  }

  // Key by key, in a loop that is not unrolled: one bit for each of the lane's scores.
  FP_DEVICE void hide_by_key(float (&x)[BLOCK_N / 2], const Lane& me, int first, const Range (&seen)[2]) {
    uint32_t bits[2] = {0, 0};
    int segment[2] = {0, 0};
    if (me.p.call.segments.data)
      FP_UNROLL for (int half = 0; half < 2; half++) segment[half] = segment_at(me.p.call, me.t.b, position_of(me, half));
    FP_NO_UNROLL
    for (int i = 0; i < BLOCK_N / 4; i++) {
      const int key = first + i / 2 * 8 + accumulator_column(me.lane) + i % 2;
      FP_UNROLL
      for (int half = 0; half < 2; half++) {
        const bool in_range = key >= seen[half].first && key <= seen[half].last;
        if (in_range && is_seen(me, key, segment[half])) bits[half] |= 1u << i;
      }
    }
    FP_UNROLL
    for (int e = 0; e < BLOCK_N / 2; e++)
      if (!(bits[row_of(e)] >> (e / 4 * 2 + e % 2) & 1)) x[e] = NEGATIVE_INFINITY;
  }

  FP_DEVICE void see_content(float (&x)[BLOCK_N / 2], const Lane& me, int first) {
    cap_logits<BLOCK_N>(x, me);
    const AttentionCall& c = me.p.call;
    const RowTile& t = me.t;
    const int last = first + BLOCK_N - 1;
    const bool crossed = last >= t.high || (c.causal && last > t.first_position) || (c.window && first <= t.last_position - c.window);
    const bool by_key = (c.padding || c.segments.data) && !is_seen_by_all(me, first);
    if (!crossed && !by_key) return;
    const Range seen[2] = {seen_by(me, 0), seen_by(me, 1)};
    if (by_key)
      hide_by_key(x, me, first, seen);
    else
      hide_outside<BLOCK_N>(x, me, first, seen);
  }
};

}  // namespace fastprefix
