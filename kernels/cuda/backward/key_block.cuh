// A block of keys in the backward, as the kernels of all devices have it: its task, what of it a lane holds, and how it
// ends. A warp has 16 keys, of which `own` is the first, and a lane two of them; scores are held transposed, keys by rows.
#pragma once

#include "backward/key_task.cuh"
#include "forward/visible.cuh"

namespace fastprefix {

// BLOCK_N keys, and rows in steps of BLOCK_M. Of a prefix a block may leave the sums of several COPIES of itself, each of
// its own rows; BIASED: its tokens have a bias. That is a kernel of its own, for two ways to weigh would take registers.
template <class T, int D, int BLOCK_M, int BLOCK_N, int COPIES, bool OF_PREFIX, bool BIASED>
struct KeyBlock {
  static int64_t blocks(const BackwardParams& p) {
    const AttentionCall& c = p.call.forward;
    return int64_t{p.tiles} * c.H_kv * (OF_PREFIX ? int64_t{p.shares} * (c.packed ? 1 : c.N) : c.B);
  }

  FP_DEVICE KeyTask task_of(const BackwardParams& p) {
    const AttentionCall& c = p.call.forward;
    const int rest = block_index() / p.tiles, rows_of_sample = c.S * static_cast<int>(p.by_G.divisor);
    KeyTask t{};
    t.first_key = block_index() % p.tiles * BLOCK_N;   // the longest of a causal head begin first
    t.h_kv = rest % c.H_kv;
    if constexpr (OF_PREFIX) {
      t.share = rest / c.H_kv % p.shares;
      if (c.packed) {
        find_packed<BLOCK_N>(c, block_index() % p.tiles, t);
      } else {
        t.prefix = rest / c.H_kv / p.shares;
        t.keys = prefix_length(c, t.prefix);
        t.end_key = smaller(t.first_key + BLOCK_N, c.P);
      }
      int rows = c.B * rows_of_sample;
      if (p.bank_first) {
        t.first_unit = t.prefix < 0 ? 0 : ld_global(p.bank_first + t.prefix);
        const int units = t.prefix < 0 ? 0 : ld_global(p.bank_first + t.prefix + 1) - t.first_unit;
        rows = units * static_cast<int>(p.by_G.divisor) * (c.ids_by_row ? 1 : c.S);
      }
      if (t.first_key >= t.keys) rows = 0;
      const Share steps = share_of(cdiv(rows, BLOCK_M), t.share, p.shares);
      t.first_row = steps.first * BLOCK_M;
      t.end_row = smaller(steps.end * BLOCK_M, rows);
    } else {
      t.b = rest / c.H_kv;
      t.keys = c.T;
      t.end_key = smaller(t.first_key + BLOCK_N, c.T);
      t.start = first_position_of(c, t.b);
      // Tokens that a causal row or a window lets see any of the keys.
      const int first = c.causal ? larger(0, smaller(c.S, t.first_key - t.start)) : 0;
      const int end = c.window ? larger(first, smaller(c.S, t.end_key - 1 + c.window - t.start)) : c.S;
      const int G = static_cast<int>(p.by_G.divisor);
      t.first_row = t.b * rows_of_sample + first * G;
      t.end_row = t.b * rows_of_sample + end * G;
    }
    return t;
  }

  FP_DEVICE Place place(const BackwardParams& p, const KeyTask& t, int row) {
    const int token = quotient(row, p.by_G), h = t.h_kv * static_cast<int>(p.by_G.divisor) + remainder(row, token, p.by_G);
    int b = quotient(token, p.by_S), s = remainder(token, b, p.by_S);
    if (OF_PREFIX && p.bank_first) {
      const int unit = ld_global(p.bank_units + t.first_unit + (p.call.forward.ids_by_row ? token : b));
      b = p.call.forward.ids_by_row ? quotient(unit, p.by_S) : unit;
      if (p.call.forward.ids_by_row) s = remainder(unit, b, p.by_S);
    }
    return {b, s, h};
  }

  FP_DEVICE bool needs_k(const BackwardParams& p) { return OF_PREFIX ? p.call.dprefix_k != nullptr : p.call.dk.data != nullptr; }
  FP_DEVICE bool needs_v(const BackwardParams& p) { return OF_PREFIX ? p.call.dprefix_v != nullptr : p.call.dv.data != nullptr; }

  // Whether dS is needed, for dK or for the gradient of a prefix's bias.
  FP_DEVICE bool needs_ds(const BackwardParams& p) { return needs_k(p) || (BIASED && p.call.dprefix_bias); }

  FP_DEVICE int key_of_lane(int own, int half) { return own + accumulator_row(thread_index() % 32, half); }

  // The bias of a block's key, base 2.
  FP_DEVICE float bias_of_key(const AttentionCall& c, const KeyTask& t, int key) {
    const float* bias = bias_of_prefix(c, t.prefix, static_cast<int>(t.token), t.h_kv);
    return key < t.keys ? bias_at(bias, key) : 0.0f;
  }

  // Whether padding shows a key.
  FP_DEVICE bool is_shown(const AttentionCall& c, const KeyTask& t, int key) {
    return OF_PREFIX || !c.padding || (key < c.T && ld_global(c.padding + t.b * c.padding_batch + key * c.padding_key) != 0);
  }

  // Hides the rows from `first` on that do not see a key; `shown`: whether padding shows the lane's two keys.
  template <int ELEMENTS>
  FP_DEVICE void hide(float (&x)[ELEMENTS], const BackwardParams& p, const KeyTask& t, int own, int first, const bool (&shown)[2]) {
    const AttentionCall& c = p.call.forward;
    const int before = t.b * c.S * static_cast<int>(p.by_G.divisor);   // rows of other samples
    const int first_position = t.start + quotient(first - before, p.by_G);
    const int last_position = t.start + quotient(smaller(first + 2 * ELEMENTS, t.end_row) - 1 - before, p.by_G);
    const bool whole = (!c.causal || t.end_key - 1 <= first_position) && (!c.window || t.first_key > last_position - c.window) && !c.segments.data;
    if (whole && vote_all(shown[0] && shown[1])) return;
    int key[2];
    int segment[2] = {0, 0};   // low bits, by which ids are compared
    FP_UNROLL
    for (int half = 0; half < 2; half++) {
      key[half] = key_of_lane(own, half);
      if (c.segments.data) segment[half] = static_cast<int>(segment_at(c, t.b, key[half]));
    }
    // In a loop that is not unrolled, one bit for each of the lane's scores of a key.
    uint32_t bits[2] = {0, 0};
    FP_NO_UNROLL
    for (int i = 0; i < ELEMENTS / 2; i++) {
      const int row = first + i / 2 * 8 + accumulator_column(thread_index() % 32) + i % 2;
      const int position = t.start + quotient(row - before, p.by_G);
      const int of_row = c.segments.data ? static_cast<int>(segment_at(c, t.b, position)) : 0;
      FP_UNROLL
      for (int half = 0; half < 2; half++) {
        const bool hidden = (c.causal && key[half] > position) || (c.window && key[half] <= position - c.window) || of_row != segment[half];
        if (shown[half] && !hidden) bits[half] |= 1u << i;
      }
    }
    FP_UNROLL
    for (int e = 0; e < ELEMENTS; e++)
      if (!(bits[row_of(e)] >> (e / 4 * 2 + e % 2) & 1)) x[e] = NEGATIVE_INFINITY;
  }

  // Of logits and of do V^T: the weights, and dS without them. `stats` has what these need of each row. `bias`: of the lane's
  // two keys; its gradient is dS before the cap.
  template <int ELEMENTS>
  FP_DEVICE void weigh(float (&x)[ELEMENTS], float (&dp)[ELEMENTS], float (&dbias)[2], const float (&bias)[2], uint32_t stats, float cap, bool needs_ds) {
    FP_UNROLL
    for (int j = 0; j < ELEMENTS / 4; j++) {
      const Float4 two = ld_shared4(stats + (j * 8 + accumulator_column(thread_index() % 32)) * 8);   // of two rows
      FP_UNROLL
      for (int e = 4 * j; e < 4 * j + 4; e++) {
        const float ds = needs_ds ? dp[e] - two.x[e % 2 * 2 + 1] : 0.0f;
        if (needs_ds) dp[e] = through_cap(ds, x[e], cap);
        x[e] = ex2_approx((BIASED ? x[e] + bias[row_of(e)] : x[e]) - two.x[e % 2 * 2]);
        if (BIASED && needs_ds) dbias[row_of(e)] += x[e] * ds;
      }
    }
  }

  // Where a block's keys or values lie.
  FP_DEVICE int64_t first_of(const AttentionCall& c, const Rows& x, const KeyTask& t) {
    int64_t before = t.b * x.batch + t.h_kv * x.head;
    if (OF_PREFIX) before += c.packed ? t.token * x.row : larger(t.prefix, 0) * x.batch;
    return before;
  }
  FP_DEVICE void copy_keys(uint32_t to, const AttentionCall& c, bool of_k, const KeyTask& t) {
    const Rows& x = OF_PREFIX ? (of_k ? c.prefix_k : c.prefix_v) : (of_k ? c.k : c.v);
    const int64_t before = first_of(c, x, t);
    const int end = smaller(t.end_key, t.keys);
    copy_tile<BLOCK_N, D>(to, of_k ? c.D : c.D_v, x.data, [&](int key) {
      const int64_t number = t.first_key + key;
      return number < end ? element(x, before + number * x.row) : nullptr;
    });
  }

  // The lane's sums: gradients of the content, or, of a prefix, those of one share of the rows.
  FP_DEVICE void leave(const BackwardParams& p, const KeyTask& t, int own, int copy, float (&dk)[D / 2], const float (&dv)[D / 2], float (&dbias)[2]) {
    const AttentionCall& c = p.call.forward;
    FP_UNROLL for (int e = 0; e < D / 2; e++) dk[e] *= c.scale;
    if constexpr (OF_PREFIX) {
      const int64_t share = t.share * COPIES + copy, prefixes = c.packed ? 1 : c.N;
      const int64_t head = (share * prefixes + (c.packed ? 0 : t.prefix)) * c.H_kv + t.h_kv, at = head * c.P + t.token;
      if (needs_k(p)) leave_share(p.share_k + at * c.D, dk, t, own, c.D);
      if (needs_v(p)) leave_share(p.share_v + at * c.D_v, dv, t, own, c.D_v);
      if (BIASED && p.call.dprefix_bias) leave_bias(p.share_bias + at, dbias, t, own);
    } else {
      const int64_t h = t.h_kv, b = t.b;
      if (needs_k(p)) store(p.call.dk, b * p.call.dk.batch + h * p.call.dk.head, dk, t, own, c.D);
      if (needs_v(p)) store(p.call.dv, b * p.call.dv.batch + h * p.call.dv.head, dv, t, own, c.D_v);
    }
  }

  // Gives every key of the lane's two that is to be written, and two of its columns at a time, to `write`.
  template <class Write>
  FP_DEVICE void each_pair(const float (&x)[D / 2], const KeyTask& t, int own, int columns, Write&& write) {
    FP_UNROLL
    for (int half = 0; half < 2; half++) {
      const int64_t key = key_of_lane(own, half);
      if (key >= t.end_key) continue;
      FP_UNROLL
      for (int j = 0; j < D / 8; j++) {
        const int column = j * 8 + accumulator_column(thread_index() % 32);
        if (column < columns) write(key, column, x[4 * j + 2 * half], x[4 * j + 2 * half + 1]);
      }
    }
  }
  FP_DEVICE void leave_share(float* to, const float (&x)[D / 2], const KeyTask& t, int own, int columns) {
    each_pair(x, t, own, columns, [&](int64_t key, int column, float left, float right) {
      const bool exists = key < t.keys;
      st_global(reinterpret_cast<Float2*>(to + key * columns + column), exists ? Float2{{left, right}} : Float2{{0.0f, 0.0f}});
    });
  }
  // Four lanes have sums of the same keys' biases: now each has them all.
  FP_DEVICE void add_lanes(float (&dbias)[2]) {
    FP_UNROLL
    for (int half = 0; half < 2; half++) {
      dbias[half] += shfl_xor(dbias[half], 1);
      dbias[half] += shfl_xor(dbias[half], 2);
    }
  }
  FP_DEVICE void leave_bias(float* to, const float (&dbias)[2], const KeyTask& t, int own) {
    FP_UNROLL
    for (int half = 0; half < 2; half++) {
      const int64_t key = key_of_lane(own, half);
      if (thread_index() % 4 == 0 && key < t.end_key) st_global(to + key, key < t.keys ? dbias[half] : 0.0f);
    }
  }
  FP_DEVICE void store(const Rows& to, int64_t before, const float (&x)[D / 2], const KeyTask& t, int own, int columns) {
    uint16_t* data = static_cast<uint16_t*>(to.data) + before;
    each_pair(x, t, own, columns, [&](int64_t key, int column, float left, float right) {
      st_global(reinterpret_cast<uint32_t*>(data + key * to.row + column), pack<T>(left, right));
    });
  }
};

}  // namespace fastprefix
